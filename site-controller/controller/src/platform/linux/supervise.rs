//! Keeps the router running where no service manager does. The router in turn restarts a controller that is gone.

use std::{fs, io, os::unix::process::CommandExt as _, process::Stdio, sync::Arc, time::Duration};

use tokio::process::{Child, Command};

use super::{Processes, controller_arguments, log_file, processes::is_router};
use crate::{clock, controller::Controller, process::sibling};
use rustix::process::Pid;

/// First wait before a router that ended is started again.
const RESTART_MIN: Duration = Duration::from_millis(250);
/// Longest wait: whatever keeps it from running is looked at by people.
const RESTART_MAX: Duration = Duration::from_secs(10);
/// A router that ran this long starts again at once.
const HEALTHY_AFTER: Duration = Duration::from_secs(30);
/// How often a router that another controller started is looked at.
const POLL: Duration = Duration::from_millis(200);
/// Name of the one router of a host.
const ROUTER: &str = "router";

/// Starts the router and restarts it until the site is meant to stop. The router outlives this process.
///
/// # Cancel safety
/// Dropping it leaves the router running.
pub(crate) async fn supervise(controller: Arc<Controller>) {
    let mut wait = RESTART_MIN;
    loop {
        if controller.shutdown.is_cancelled() || controller.is_stopped() {
            return;
        }
        let started = clock::instant();
        if let Some(pid) = running_router(&controller) {
            tracing::info!(pid = pid.as_raw_nonzero(), "a router runs already");
            tokio::select! {
                () = controller.shutdown.cancelled() => return, // cancel-safe
                () = until_gone(&controller, pid) => {} // cancel-safe
            }
        } else {
            match spawn(&controller) {
                Ok(mut child) => {
                    tokio::select! {
                        () = controller.shutdown.cancelled() => return, // cancel-safe
                        ended = child.wait() => { // cancel-safe
                            tracing::warn!(status = ?ended.ok(), "the router ended");
                        }
                    }
                }
                Err(error) => tracing::error!(%error, "cannot start the router"),
            }
        }
        wait = if started.elapsed() > HEALTHY_AFTER { RESTART_MIN } else { wait };
        tokio::select! {
            () = controller.shutdown.cancelled() => return, // cancel-safe
            () = tokio::time::sleep(wait) => {} // cancel-safe
        }
        wait = (wait * 2).min(RESTART_MAX);
    }
}

fn spawn(controller: &Controller) -> io::Result<Child> {
    let paths = controller.store.paths();
    let log = log_file(paths, "router.log")?;
    let mut command = std::process::Command::new(sibling(paths, "skein-router"));
    skein_proxy::hide_proxies(&mut command);
    command
        .arg("--name")
        .arg(ROUTER)
        .arg("--controller")
        .arg(format!("unix:{}", paths.control_socket().display()))
        .arg("--state")
        .arg(paths.router_dir())
        .arg("--respawn-controller")
        .arg(sibling(paths, "skein-controller"))
        .args(controller_arguments(paths))
        .arg("--respawned")
        .current_dir("/")
        .stdin(Stdio::null())
        .stdout(log.try_clone()?)
        .stderr(log)
        // It outlives this process, so signals to our group are not for it.
        .process_group(0);
    let child = Command::from(command).kill_on_drop(false).spawn()?;
    if let Some(pid) = child.id() {
        tracing::info!(pid, "router started");
        if let Err(error) = fs::write(paths.router_pid_file(), pid.to_string()) {
            // It runs all the same; only a controller that misses this one cannot find it before it attaches.
            tracing::warn!(%error, "the router's process id is not kept");
        }
    }
    Ok(child)
}

/// The router an earlier controller started, if it still runs.
fn running_router(controller: &Controller) -> Option<Pid> {
    let paths = controller.store.paths();
    let attached = {
        let state = controller.state();
        state.routers.get(ROUTER).filter(|router| router.session.is_some()).map(|router| router.pid)
    };
    let attached = attached.and_then(|pid| Pid::from_raw(i32::try_from(pid).ok()?));
    attached.filter(|&pid| is_router(paths, pid)).or_else(|| Processes::of(paths).router)
}

/// A process that is not our child cannot be waited for without a descriptor of it; looking is enough.
async fn until_gone(controller: &Controller, pid: Pid) {
    while is_router(controller.store.paths(), pid) {
        tokio::time::sleep(POLL).await;
    }
    tracing::warn!(pid = pid.as_raw_nonzero(), "the router ended");
}
