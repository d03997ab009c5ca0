//! A site's processes on this machine: what works before there is a controller, and after it is gone.

use std::{
    io,
    os::unix::{fs::OpenOptionsExt as _, process::CommandExt as _},
    path::{Path, PathBuf},
    process::Stdio,
    time::Duration,
};

use rustix::process::{Pid, test_kill_process};
use skein_api::{
    Service,
    status::{RouterStatus, SiteStatus},
};
use skein_controller::{
    Paths,
    platform::linux::{self, Units},
    site::{self, InitOptions},
};

use crate::{
    client::Client,
    clock,
    command::logs,
    error::{Exit, Failure},
    input,
    progress::Progress,
};

/// How long processes may take to start on a busy machine.
pub(crate) const START_TIMEOUT: Duration = Duration::from_secs(30);
/// How often a starting or ending process is looked at.
const POLL: Duration = Duration::from_millis(50);

/// Where a site's logs are.
#[derive(Debug)]
pub(crate) enum LogSource {
    /// Units of the journal, with what they run.
    Journal(Vec<(&'static str, String)>),
    /// Files, with what writes them.
    Files(Vec<(&'static str, PathBuf)>),
}

/// Waits until the controller answers and a router is attached.
///
/// # Errors
/// Nothing answers within [`START_TIMEOUT`].
pub(crate) async fn ready(paths: &Paths, progress: &mut Progress) -> Result<SiteStatus, Failure> {
    let deadline = clock::instant() + START_TIMEOUT;
    let mut last = Failure::new("the controller does not answer");
    while clock::instant() < deadline {
        match status(paths).await {
            Ok(status) if status.routers.iter().any(|router| router.state == "attached") => {
                return Ok(status);
            }
            Ok(_) => {
                progress.step("waiting for the router");
                last = Failure::new("the router does not attach to the controller");
            }
            Err(failure) => {
                progress.step("waiting for the controller");
                last = failure;
            }
        }
        clock::sleep(POLL).await;
    }
    Err(Failure::timeout(last)
        .because(format_args!("waited {} s", START_TIMEOUT.as_secs()))
        .next("see `skctl logs`"))
}

async fn status(paths: &Paths) -> Result<SiteStatus, Failure> {
    Client::connect_to(paths).await?.query("status").await
}

/// Runs journalctl for `units` in place of this process's output.
pub(crate) async fn journal(units: Vec<String>, lines: u32, follow: bool) -> Result<(), Failure> {
    let mut command = tokio::process::Command::new("journalctl");
    command.arg("--lines").arg(lines.to_string());
    if !rustix::process::geteuid().is_root() {
        command.arg("--user");
    }
    if follow {
        command.arg("--follow");
    }
    for unit in units {
        command.arg("--unit").arg(unit);
    }
    // The child ends with this process; output is passed on, so that a closed pipe is noticed here.
    command.stdin(Stdio::null()).kill_on_drop(true);
    let status = command
        .status()
        .await
        .map_err(|error| Failure::new("cannot run journalctl").because(error))?;
    if status.success() {
        Ok(())
    } else {
        Err(Failure::new(format_args!("journalctl ended with {status}")))
    }
}

/// Installs the site's own copies of the executable and starts its processes; the notes say what the user should know.
///
/// # Errors
/// The executable cannot be copied or started.
pub(crate) async fn start(paths: &Paths) -> Result<Vec<String>, Failure> {
    let paths = paths.clone();
    input::blocking(move || {
        install(&paths)?;
        remove_if_there(&paths.stopped_file())
            .map_err(|error| Failure::new("cannot start the site").because(error))?;
        match service(&paths)? {
            Service::Systemd => {
                Units::of(&paths).and_then(|units| units.start()).map_err(Failure::new)
            }
            Service::Auto | Service::None => spawn(&paths).map(|()| Vec::new()),
        }
    })
    .await
}

/// Puts this executable under the names of the site's processes into the site's directory, so that replacing skctl
/// changes nothing until `skctl upgrade`.
///
/// # Errors
/// The file system refuses.
pub(crate) fn install(paths: &Paths) -> Result<(), Failure> {
    paths.create().map_err(Failure::new)?;
    let installed = std::env::current_exe().and_then(|program| linux::install(paths, &program));
    installed.map_err(|error| {
        Failure::new(format_args!("cannot install executables in {}", paths.bin_dir().display()))
            .because(error)
    })
}

/// What keeps the site's processes running.
fn service(paths: &Paths) -> Result<Service, Failure> {
    // Without options this finds the site that is there and changes nothing.
    let found = site::create(paths, &InitOptions::default()).map_err(Failure::new)?;
    Ok(linux::chosen_service(found.site.spec.service))
}

fn remove_if_there(path: &Path) -> io::Result<()> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

fn spawn(paths: &Paths) -> Result<(), Failure> {
    let failed = |error: io::Error| Failure::new("cannot start the controller").because(error);
    let log = std::fs::OpenOptions::new()
        .create(true)
        .append(true)
        .mode(0o600)
        .open(paths.logs_dir().join("controller.log"))
        .map_err(failed)?;
    let child = controller(paths)
        .arg("--detached")
        .current_dir("/")
        .stdin(Stdio::null())
        .stdout(log.try_clone().map_err(failed)?)
        .stderr(log)
        .spawn()
        .map_err(failed)?;
    // It outlives this process, and whoever adopts it reaps it.
    drop(child);
    Ok(())
}

fn controller(paths: &Paths) -> std::process::Command {
    let mut command = std::process::Command::new(paths.bin_dir().join("skein-controller"));
    command.args(linux::controller_arguments(paths));
    command
}

/// Ends controller and router; flows are drained first.
///
/// # Errors
/// The controller does not end.
pub(crate) async fn stop(paths: &Paths, progress: &mut Progress) -> Result<(), Failure> {
    progress.step("draining");
    let of_site = paths.clone();
    if input::blocking(move || service(&of_site)).await? == Service::Systemd {
        let paths = paths.clone();
        return input::blocking(move || {
            Units::of(&paths).and_then(|units| units.stop()).map_err(Failure::new)
        })
        .await;
    }
    let routers = routers(paths).await?;
    Client::connect_to(paths).await?.shutdown(true).await?;
    ended(paths, &routers, progress).await
}

/// Process ids of the site's routers.
///
/// # Errors
/// The controller does not answer.
pub(crate) async fn routers(paths: &Paths) -> Result<Vec<Pid>, Failure> {
    let routers = status(paths).await?.routers;
    let pid = |router: RouterStatus| i32::try_from(router.pid).ok().and_then(Pid::from_raw);
    Ok(routers.into_iter().filter_map(pid).collect())
}

/// Waits until the controller no longer answers and the `routers` are gone.
///
/// # Errors
/// Some are still there after [`START_TIMEOUT`].
pub(crate) async fn ended(
    paths: &Paths,
    routers: &[Pid],
    progress: &mut Progress,
) -> Result<(), Failure> {
    progress.step("waiting for the processes to end");
    let deadline = clock::instant() + START_TIMEOUT;
    while clock::instant() < deadline {
        let controller = crate::net::connect_unix(&paths.site_socket()).await.is_ok();
        let router = routers.iter().any(|&pid| test_kill_process(pid).is_ok());
        if !controller && !router {
            return Ok(());
        }
        clock::sleep(POLL).await;
    }
    Err(Failure::timeout("the processes of the site do not end").next("see `skctl logs`"))
}

/// Removes everything the site has on this machine; its processes must have ended.
///
/// # Errors
/// The file system or systemd refuses.
pub(crate) async fn remove(paths: &Paths) -> Result<(), Failure> {
    let paths = paths.clone();
    input::blocking(move || {
        Units::of(&paths).and_then(|units| units.remove()).map_err(Failure::new)?;
        for dir in [paths.runtime(), paths.state()] {
            match std::fs::remove_dir_all(dir) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    let what = format_args!("cannot remove {}", dir.display());
                    return Err(Failure::new(what).because(error));
                }
                _ => {}
            }
        }
        Ok(())
    })
    .await
}

/// Where the site's logs are.
///
/// # Errors
/// The state of the site cannot be read.
pub(crate) fn logs(paths: &Paths) -> Result<LogSource, Failure> {
    Ok(match service(paths)? {
        Service::Systemd => {
            let [controller, router] = Units::of(paths).map_err(Failure::new)?.names();
            LogSource::Journal(vec![("controller", controller), ("router", router)])
        }
        Service::Auto | Service::None => LogSource::Files(logs::files(paths)),
    })
}

/// Runs the controller under this process, its log on standard error, until it ends or this process is told to end;
/// then controller and router end in order.
///
/// # Errors
/// The controller cannot be started, fails, or does not end.
pub(crate) async fn run_here(paths: &Paths) -> Result<(), Failure> {
    let failed = |error: io::Error| Failure::new("cannot run the controller").because(error);
    install(paths)?;
    remove_if_there(&paths.stopped_file()).map_err(failed)?;
    let mut command = controller(paths);
    // Ctrl-C is meant for this process, which ends the router too.
    command.stdin(Stdio::null()).process_group(0);
    let mut child = tokio::process::Command::from(command).spawn().map_err(failed)?;
    let status = tokio::select! {
        status = child.wait() => status.map_err(failed)?, // cancel-safe
        failure = crate::interrupted() => { // cancel-safe
            Client::connect_to(paths).await?.shutdown(true).await?;
            let ended = tokio::time::timeout(START_TIMEOUT, child.wait()).await;
            ended.map_err(|_| Failure::timeout("the controller does not end"))?.map_err(failed)?;
            return match failure {
                // That is how it is meant to end.
                Err(failure) if failure.exit() == Exit::Interrupted => Ok(()),
                other => other,
            };
        }
    };
    if status.success() {
        return Ok(());
    }
    Err(Failure::new(format_args!("the controller ended with {status}")))
}
