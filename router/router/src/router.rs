//! A running router: its tasks, their owner, and their orderly end.

use crate::{
    Config,
    api::{self, Attachment},
    clock,
    control::{self, ControlConfig, DrainRequest},
    key::{KeyError, KeyStore},
    respawn,
};
use anyhow::Context as _;
use std::{path::PathBuf, time::Duration};
use tokio::{
    runtime::{Builder, Handle, Runtime},
    signal::unix::{SignalKind, signal},
    sync::{mpsc, oneshot},
    time,
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

/// How long flows may take to end after SIGTERM: below the 30 s our service units allow, so that the reset is ours and not a SIGKILL.
const DRAIN_ON_SIGNAL_MAX: Duration = Duration::from_secs(20);
/// What a drain may take beyond its deadline: farewell, goodbyes, joining.
const DRAIN_GRACE: Duration = Duration::from_secs(5);
/// An answer on its way to the controller gets this long after everything else has ended.
const LAST_WORDS: Duration = Duration::from_millis(200);

/// Where a router's tasks run. One runtime may serve both; a process keeps them apart so that a scrape or a shortest-path run never
/// delays bytes.
#[derive(Clone, Debug)]
pub struct Runtimes {
    /// Links, fabric, sessions, flows.
    pub data: Handle,
    /// Engine, attachment to the controller, metrics.
    pub control: Handle,
}

/// Why a router did not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The state directory or the key in it cannot be made or read.
    #[error("the router's state cannot be used: {}: {reason}", path.display())]
    State {
        /// The file or directory.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
}

impl From<KeyError> for StartError {
    fn from(error: KeyError) -> Self {
        Self::State { path: error.path, reason: error.source.to_string() }
    }
}

/// A running router. Dropped, it is cancelled as if its process had been killed; [`Router::drain`] ends it in an orderly way.
#[derive(Debug)]
pub struct Router {
    tasks: TaskTracker,
    cancel: CancellationToken,
    control_ended: CancellationToken,
    drains: mpsc::Sender<DrainRequest>,
}

impl Router {
    /// Starts a router's tasks. It attaches to its controller, and goes on trying, before it does anything else.
    ///
    /// # Errors
    /// The state directory cannot be used. Everything later is reported to the controller and in the log, and tried again.
    pub fn start(config: Config, runtimes: &Runtimes) -> Result<Self, StartError> {
        let key = KeyStore::open(&config.state_dir)?;
        let (tasks, cancel) = (TaskTracker::new(), CancellationToken::new());
        let control_ended = CancellationToken::new();
        let (controller, attachment): (_, Attachment) =
            api::attachment(config.controller.clone(), config.name.clone());
        if !config.respawn_controller.is_empty() {
            let (command, attached) =
                (config.respawn_controller.clone(), controller.attached.clone());
            let respawning = respawn::run(command, attached, cancel.clone());
            tasks.spawn_on(respawning, &runtimes.control);
        }
        tasks.spawn_on(attachment.run(cancel.clone()), &runtimes.control);
        let (drains, drain_requests) = mpsc::channel(1);
        let control = Box::pin(control::run(ControlConfig {
            config,
            controller,
            key,
            runtimes: runtimes.clone(),
            drains: drain_requests,
            cancel: cancel.clone(),
        }));
        let ended = control_ended.clone().drop_guard();
        let control = async move {
            control.await;
            drop(ended);
        };
        tasks.spawn_on(control, &runtimes.control);
        Ok(Self { tasks, cancel, control_ended, drains })
    }

    /// Stops accepting, withdraws addresses, lets flows end within `flows_max`, resets the rest, says goodbye to neighbours and joins every task;
    /// returns how many flows were reset.
    ///
    /// # Cancel safety
    /// Dropped midway, the drain goes on with its deadline; only the waiting ends.
    pub async fn drain(&self, flows_max: Duration, farewell: bool) -> u64 {
        let (done, drained) = oneshot::channel();
        let deadline = clock::now() + flows_max;
        let request = DrainRequest { deadline, farewell, done: Some(done) };
        let flows_reset = match self.drains.send(request).await {
            Ok(()) => time::timeout(flows_max + DRAIN_GRACE, drained).await,
            Err(_already_ended) => Ok(Ok(0)),
        };
        time::sleep(LAST_WORDS).await;
        self.cancel.cancel();
        self.tasks.close();
        self.tasks.wait().await;
        match flows_reset {
            Ok(Ok(flows_reset)) => flows_reset,
            Ok(Err(_)) | Err(_) => 0,
        }
    }

    /// Waits until the router has ended by itself: its controller told it to drain.
    ///
    /// # Cancel safety
    /// Cancel-safe.
    pub async fn ended(&self) {
        self.control_ended.cancelled().await;
    }
}

impl Drop for Router {
    fn drop(&mut self) {
        self.cancel.cancel();
    }
}

/// Runs one router as this process, with a thread and a runtime for each of its halves.
pub(crate) fn run_process(config: Config) -> anyhow::Result<()> {
    raise_open_files_limit();
    let data = Builder::new_current_thread().enable_all().thread_name("data").build()?;
    let control = Builder::new_current_thread().enable_all().thread_name("control").build()?;
    let runtimes = Runtimes { data: data.handle().clone(), control: control.handle().clone() };
    let stopped = CancellationToken::new();
    let data_thread = std::thread::Builder::new().name("data".into()).spawn({
        let stopped = stopped.clone();
        move || {
            data.block_on(stopped.cancelled());
            end(data);
        }
    })?;
    let outcome = control.block_on(run_until_signal(config, &runtimes));
    end(control);
    stopped.cancel();
    if data_thread.join().is_err() {
        anyhow::bail!("the data thread panicked");
    }
    outcome
}

/// Ends a runtime whose tasks have been joined. What a file system holds up, as where credentials are on a server that is gone, goes with the
/// process: nobody waits for it any more.
fn end(runtime: Runtime) {
    runtime.shutdown_background();
}

async fn run_until_signal(config: Config, runtimes: &Runtimes) -> anyhow::Result<()> {
    let mut terminate = signal(SignalKind::terminate()).context("waiting for SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("waiting for SIGINT")?;
    let router = Router::start(config, runtimes)?;
    tokio::select! {
        _ = terminate.recv() => {} // cancel-safe
        _ = interrupt.recv() => {} // cancel-safe
        () = router.ended() => {} // cancel-safe
    }
    tokio::select! {
        _ = router.drain(DRAIN_ON_SIGNAL_MAX, false) => {} // goes on when dropped, until the process ends
        _ = terminate.recv() => tracing::warn!("told twice to stop: resetting what is left"), // cancel-safe
        _ = interrupt.recv() => tracing::warn!("told twice to stop: resetting what is left"), // cancel-safe
    }
    Ok(())
}

/// A flow takes a descriptor at each edge; the soft limit of 1,024 is for programs that use `select`.
fn raise_open_files_limit() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let limit = getrlimit(Resource::Nofile);
    if let Err(error) =
        setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, maximum: limit.maximum })
    {
        tracing::warn!(%error, "the limit of open files cannot be raised");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc;

    #[test]
    fn a_file_system_that_hangs_does_not_hold_up_the_end() {
        let (answer, file_system) = mpsc::channel::<()>();
        let runtime = Builder::new_current_thread().build().unwrap();
        let (reading, is_reading) = mpsc::channel();
        let _read = runtime.spawn_blocking(move || {
            reading.send(()).unwrap();
            file_system.recv()
        });
        is_reading.recv().unwrap();
        // Waits for ever if it waits.
        end(runtime);
        drop(answer);
    }
}
