//! Brings the controller back where no service manager does: starts it when its socket stays dead.

use std::{ffi::OsString, process::Stdio, time::Duration};
use tokio::{process::Command, sync::watch, time};
use tokio_util::sync::CancellationToken;

/// A controller that restarts by itself (upgrade, its own supervisor) is back before this.
const GRACE: Duration = Duration::from_secs(1);
/// First wait after a start that did not help.
const BACKOFF_MIN: Duration = Duration::from_secs(1);
/// Longest wait between two starts.
const BACKOFF_MAX: Duration = Duration::from_secs(30);
/// A controller that ran this long did not fail at start; the next failure begins from the shortest wait.
const STABLE_AFTER: Duration = Duration::from_secs(60);

/// Starts `command` whenever the router has been detached for [`GRACE`]; only one instance runs at a time, and the controller's own lock keeps
/// it from running beside one that somebody else started.
///
/// # Cancel safety
/// Dropped, a started controller lives on: its life does not depend on ours.
pub(crate) async fn run(
    command: Vec<OsString>,
    mut attached: watch::Receiver<bool>,
    cancel: CancellationToken,
) {
    let Some((program, args)) = command.split_first() else { return };
    let mut backoff = BACKOFF_MIN;
    loop {
        let stays_away = async {
            loop {
                attached.wait_for(|attached| !attached).await?;
                match time::timeout(GRACE, attached.wait_for(|attached| *attached)).await {
                    Err(_elapsed) => return Ok::<_, watch::error::RecvError>(()),
                    Ok(came_back) => drop(came_back?),
                }
            }
        };
        tokio::select! {
            () = cancel.cancelled() => return, // cancel-safe
            away = stays_away => if away.is_err() { return }, // cancel-safe
        }
        let started = crate::clock::now();
        tracing::warn!(program = %program.display(), "the controller is gone; starting it");
        tokio::select! {
            () = cancel.cancelled() => return, // the child lives on
            () = start_and_wait(program, args) => {} // dropped only at the end
        }
        if crate::clock::now().duration_since(started) >= STABLE_AFTER {
            backoff = BACKOFF_MIN;
        }
        tokio::select! {
            () = cancel.cancelled() => return, // cancel-safe
            () = time::sleep(backoff) => {} // cancel-safe
        }
        backoff = (backoff * 2).min(BACKOFF_MAX);
    }
}

async fn start_and_wait(program: &OsString, args: &[OsString]) {
    let mut command = std::process::Command::new(program);
    // Ours may have one where we were started by hand.
    skein_proxy::hide_proxies(&mut command);
    let child = Command::from(command)
        .args(args)
        .stdin(Stdio::null())
        .process_group(0) // Ctrl-C in a terminal is for us, not for it.
        .spawn();
    let exit = match child {
        Ok(mut child) => child.wait().await,
        Err(error) => {
            tracing::error!(%error, program = %program.display(), "the controller cannot be started");
            return;
        }
    };
    match exit {
        Ok(status) => tracing::warn!(%status, "the controller ended"),
        Err(error) => tracing::warn!(%error, "the controller cannot be waited for"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::task::JoinSet;

    #[tokio::test]
    async fn starts_the_controller_when_it_stays_away_and_again_when_it_dies() {
        let dir = tempfile::tempdir().unwrap();
        let marks = dir.path().join("starts");
        let script = format!("echo x >> {}", marks.display());
        let command = ["/bin/sh", "-c", &script].map(OsString::from).to_vec();
        let (attached, watching) = watch::channel(false);
        let cancel = CancellationToken::new();
        let mut tasks = JoinSet::new();
        tasks.spawn(run(command, watching, cancel.clone()));
        let starts = || std::fs::read_to_string(&marks).map_or(0, |text| text.lines().count());
        while starts() < 2 {
            time::sleep(Duration::from_millis(20)).await;
        }
        cancel.cancel();
        tasks.join_next().await.unwrap().unwrap();
        drop(attached);
    }

    #[tokio::test(start_paused = true)]
    async fn leaves_an_attached_controller_alone() {
        let dir = tempfile::tempdir().unwrap();
        let mark = dir.path().join("started");
        let command = vec!["/usr/bin/touch".into(), mark.clone().into_os_string()];
        let (attached, watching) = watch::channel(false);
        let cancel = CancellationToken::new();
        let mut tasks = JoinSet::new();
        tasks.spawn(run(command, watching, cancel.clone()));
        time::sleep(GRACE / 2).await;
        attached.send_replace(true);
        time::sleep(GRACE * 10).await;
        assert!(!mark.exists());
        cancel.cancel();
        tasks.join_next().await.unwrap().unwrap();
    }
}
