//! Ends: draining routers, restarting them, and leaving the network for good.

use std::{path::Path, sync::Arc, time::Duration};

use rustix::process::{Pid, Signal, kill_process};

use skein_wire::proto::site::Progress;

use crate::{
    controller::Controller,
    service::{DRAIN_TIMEOUT, ProgressSender, drain},
};

/// What a router may take beyond its drain deadline before it is called late.
const DRAIN_GRACE: Duration = Duration::from_secs(3);
/// How long a router may take to apply a configuration.
const APPLIED_TIMEOUT: Duration = Duration::from_secs(2);
/// How often an ending process is looked at.
const POLL: Duration = Duration::from_millis(20);
/// How long a router may take to come back.
const RESTART_TIMEOUT: Duration = Duration::from_secs(30);

/// Tells every router to end and waits until they are gone, to a deadline.
///
/// # Cancel safety
/// Routers that were told end all the same.
pub(crate) async fn drain_routers(controller: &Controller, farewell: bool) {
    let pids: Vec<u32> = {
        let state = controller.state();
        let attached = state.routers.values().filter(|router| router.session.is_some());
        attached.map(|router| router.pid).filter(|pid| *pid != std::process::id()).collect()
    };
    if controller.tell_all(drain(farewell)).await == 0 {
        return;
    }
    let mut changes = controller.changes();
    let gone = async {
        while controller.state().routers.values().any(|router| router.session.is_some()) {
            if changes.changed().await.is_err() {
                return;
            }
        }
        // The process outlives its stream by a little; its port is free only afterwards.
        while pids.iter().any(|pid| is_running(*pid)) {
            tokio::time::sleep(POLL).await;
        }
    };
    if tokio::time::timeout(DRAIN_TIMEOUT + DRAIN_GRACE, gone).await.is_err() {
        tracing::warn!("a router did not end in time and is killed");
        for pid in pids.into_iter().filter(|pid| is_running(*pid)) {
            let pid = i32::try_from(pid).ok().and_then(Pid::from_raw);
            if let Some(Err(error)) = pid.map(|pid| kill_process(pid, Signal::KILL)) {
                tracing::warn!(%error, "a router cannot be killed");
            }
        }
    }
}

/// Whether the process runs; one that only waits to be reaped does not.
fn is_running(pid: u32) -> bool {
    let stat = std::fs::read_to_string(Path::new("/proc").join(pid.to_string()).join("stat"));
    // proc_pid_stat(5): the state follows the name, which may contain anything but ends with the last parenthesis.
    stat.is_ok_and(|stat| {
        let state = stat.rsplit_once(") ").and_then(|(_, rest)| rest.chars().next());
        !matches!(state, None | Some('Z' | 'X'))
    })
}

/// Restarts the routers: whoever supervises them starts them again.
pub(crate) async fn restart_routers(controller: Arc<Controller>, progress: ProgressSender) {
    step(&progress, "draining the router").await;
    let before: Vec<u64> = epochs(&controller);
    drain_routers(&controller, false).await;
    step(&progress, "waiting for the router to come back").await;
    let mut changes = controller.changes();
    let back = async {
        loop {
            changes.mark_unchanged();
            let now = epochs(&controller);
            if !now.is_empty() && now.iter().all(|epoch| !before.contains(epoch)) {
                return;
            }
            if changes.changed().await.is_err() {
                return;
            }
        }
    };
    let is_back = tokio::time::timeout(RESTART_TIMEOUT, back).await.is_ok();
    let error = if is_back { "" } else { "the router does not come back; see `skctl logs`" };
    end(&progress, error, !is_back).await;
}

/// Leaves the network: a signed farewell, then the process ends. The state stays until `skctl` has seen every process end, so that a
/// departure that was interrupted can be repeated.
pub(crate) async fn run(controller: Arc<Controller>, progress: ProgressSender) {
    if let Some(error) = controller.mark_stopped() {
        step(&progress, &format!("going on although {error}")).await;
    }
    step(&progress, "saying farewell to the network").await;
    match controller.say_farewell() {
        Ok(version) => applied(&controller, version).await,
        // Without it others see the site as unreachable until its statement expires; that is no reason to keep it.
        Err(error) => tracing::error!(%error, "the last word is not said"),
    }
    drain_routers(&controller, true).await;
    end(&progress, "", false).await;
    controller.shutdown.cancel();
}

/// Waits until every router has taken the configuration of this version, to a deadline.
async fn applied(controller: &Controller, version: u64) {
    let mut changes = controller.changes();
    let applied = async {
        loop {
            changes.mark_unchanged();
            let is_applied = {
                let state = controller.state();
                let mut attached = state.routers.values().filter(|entry| entry.session.is_some());
                attached.all(|entry| entry.applied >= version)
            };
            if is_applied || changes.changed().await.is_err() {
                return;
            }
        }
    };
    if tokio::time::timeout(APPLIED_TIMEOUT, applied).await.is_err() {
        tracing::warn!("a router has not taken the last word in time");
    }
}

fn epochs(controller: &Controller) -> Vec<u64> {
    let state = controller.state();
    let attached = state.routers.values().filter(|router| router.session.is_some());
    attached.map(|router| router.boot_epoch).collect()
}

async fn step(progress: &ProgressSender, text: &str) {
    let message = Progress { step: text.to_owned(), ..Progress::default() };
    // Whoever asked may have gone; the work goes on.
    let _ = progress.send(Ok(message)).await;
}

async fn end(progress: &ProgressSender, error: &str, timed_out: bool) {
    let message =
        Progress { done: true, error: error.to_owned(), timed_out, ..Progress::default() };
    // As above.
    let _ = progress.send(Ok(message)).await;
}
