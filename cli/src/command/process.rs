//! `skctl start|stop|restart|upgrade`, and `skctl delete` of the site

use std::io::IsTerminal as _;

use clap::Args;
use skein_controller::{
    Paths,
    platform::linux::{Processes, Units},
};
use skein_wire::proto::site::{LeaveRequest, RestartRouterRequest};

use crate::{
    args::Global,
    client::{self, Client},
    command::link::follow,
    error::Failure,
    host, input,
    output::note,
    progress::Progress,
};

/// Starts the processes of a stopped site
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  skctl start")]
pub(crate) struct Start {}

/// Stops the processes of the site; its state stays
///
/// Running flows have time to end, then they are reset.
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  skctl stop")]
pub(crate) struct Stop {}

/// Restarts controller and router
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  skctl restart")]
pub(crate) struct Restart {}

/// Replaces the programs of the site by those of this skctl
///
/// The controller is replaced first, then the router, which drains: flows through this site move to other paths where
/// there are any.
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  curl -LO …/skctl && chmod +x skctl && ./skctl upgrade")]
pub(crate) struct Upgrade {}

pub(crate) async fn start(global: &Global) -> Result<(), Failure> {
    let paths = site(global)?;
    if Client::connect_to(&paths).await.is_ok() {
        note(global, "The site is running.");
        return Ok(());
    }
    let mut progress = Progress::start(global, "starting");
    for text in host::start(&paths).await? {
        note(global, format_args!("note: {text}"));
    }
    host::ready(&paths, &mut progress).await?;
    progress.finish();
    note(global, "The site is running.");
    Ok(())
}

pub(crate) async fn stop(global: &Global) -> Result<(), Failure> {
    let paths = site(global)?;
    if paths.stopped_file().exists() && Processes::of(&paths).is_empty() {
        note(global, "The site is stopped already. Start it with: skctl start");
        return Ok(());
    }
    let mut progress = Progress::start(global, "stopping");
    host::stop(&paths, &mut progress).await?;
    // Nobody answers at the endpoints they name.
    host::forget_in_hosts(&paths).await?;
    progress.finish();
    note(global, "The site is stopped. Start it with: skctl start");
    Ok(())
}

pub(crate) async fn restart(global: &Global) -> Result<(), Failure> {
    let paths = site(global)?;
    let mut progress = Progress::start(global, "stopping");
    // Also where the controller is gone: its router is to start anew too.
    host::stop(&paths, &mut progress).await?;
    for text in host::start(&paths).await? {
        note(global, format_args!("note: {text}"));
    }
    host::ready(&paths, &mut progress).await?;
    progress.finish();
    note(global, "The site is running.");
    Ok(())
}

pub(crate) async fn upgrade(global: &Global, _: Upgrade) -> Result<(), Failure> {
    let paths = site(global)?;
    let mut progress = Progress::start(global, "installing");
    let mut client = Client::connect_to(&paths).await?;
    host::install(&paths)?;
    progress.step("replacing the controller");
    let before = Processes::of(&paths).controller;
    client.shutdown(false).await?;
    // The routers stay: flows go on while the controller is replaced.
    host::controller_replaced(&paths, before).await?;
    host::start(&paths).await?;
    host::ready(&paths, &mut progress).await?;
    progress.step("replacing the router");
    let mut client = Client::connect_to(&paths).await?;
    let stream = client.raw().restart_router(RestartRouterRequest {}).await?.into_inner();
    follow(stream, &mut progress).await?;
    host::ready(&paths, &mut progress).await?;
    progress.finish();
    note(global, format_args!("The site runs version {}.", env!("CARGO_PKG_VERSION")));
    Ok(())
}

/// `skctl delete` without a resource.
pub(crate) async fn delete_site(global: &Global, yes: bool) -> Result<(), Failure> {
    let paths = remains(global)?;
    let namespace = paths.namespace();
    let question = format!("Remove the site of namespace {namespace:?} and its identity for good?");
    if !yes && !std::io::stdin().is_terminal() {
        return Err(Failure::usage("the site was not removed")
            .next("add --yes to remove it without asking"));
    }
    if !yes && !input::confirm(&question).await? {
        return Err(Failure::new("nothing was removed, as you said"));
    }
    let mut progress = Progress::start(global, "saying farewell");
    // First, so that systemd does not go on starting what is gone, wherever this is interrupted.
    host::disable_units(&paths).await?;
    if let Err(failure) = leave(&paths, &mut progress).await {
        note(
            global,
            format_args!("note: nobody is told, so others forget the site in an hour ({failure})"),
        );
    }
    host::stop(&paths, &mut progress).await?;
    progress.step("removing the state of the site");
    host::remove(&paths).await?;
    progress.finish();
    note(global, format_args!("Removed the site of namespace {namespace:?}."));
    Ok(())
}

async fn leave(paths: &Paths, progress: &mut Progress) -> Result<(), Failure> {
    let mut client = Client::connect_to(paths).await?;
    let stream = client.raw().leave(LeaveRequest {}).await?.into_inner();
    follow(stream, progress).await.map(drop)
}

/// A site, or what is left of one.
fn remains(global: &Global) -> Result<Paths, Failure> {
    let paths = client::paths(global)?;
    let is_there = paths.state().exists()
        || paths.runtime().exists()
        || Units::of(&paths).is_ok_and(|units| units.are_installed());
    if is_there { Ok(paths) } else { site(global) }
}

fn site(global: &Global) -> Result<Paths, Failure> {
    let paths = client::paths(global)?;
    if paths.has_site() {
        return Ok(paths);
    }
    Err(Failure::new(format_args!("there is no site in namespace {:?}", paths.namespace()))
        .because(format_args!("nothing in {}", paths.state().display()))
        .next("create one with `skctl init`, or name another namespace with -n"))
}
