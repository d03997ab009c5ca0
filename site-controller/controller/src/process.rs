//! The controller as a process: arguments, sockets, tasks, and the order in which it ends.

use std::{
    ffi::OsString,
    io,
    path::{Path, PathBuf},
    process::ExitCode,
    sync::Arc,
    time::Duration,
};

use clap::Parser as _;
use skein_wire::proto::{control::control_server::ControlServer, site::site_server::SiteServer};
use tokio::{
    net::UnixStream,
    signal::unix::{SignalKind, signal},
    time::MissedTickBehavior,
};
use tokio_stream::{Stream, StreamExt as _};
use tracing_subscriber::EnvFilter;

use crate::{
    attach::{ControlService, MESSAGE_LEN_MAX},
    claim,
    controller::Controller,
    hosts,
    lock::{LockError, StateLock},
    net::Acceptor,
    panic,
    paths::{PathError, Paths},
    platform::linux::supervise,
    service::SiteService,
    store::{Store, StoreError},
};

/// How long tasks may take to end once the sockets are closed.
const JOIN_TIMEOUT: Duration = Duration::from_secs(5);
/// Longest request from `skctl`: what `apply` reads at most, as JSON.
const REQUEST_LEN_MAX: usize = 32 << 20;

/// The controller's command line.
#[derive(Clone, clap::Parser, Debug)]
#[command(name = "skein-controller", version, about = "The controller of a Skein site")]
pub(crate) struct Args {
    /// State directory of the site
    #[arg(long, value_name = "DIR")]
    pub(crate) state: PathBuf,
    /// Directory of the sockets
    #[arg(long, value_name = "DIR")]
    pub(crate) runtime: PathBuf,
    /// Leaves the router to somebody else, such as a service manager
    #[arg(long)]
    pub(crate) no_router: bool,
    /// Leaves the terminal's session, as a process that outlives whoever started it
    #[arg(long)]
    pub(crate) detached: bool,
    /// Ends at once if the site is meant to be stopped (used by a router that misses its controller)
    #[arg(long)]
    pub(crate) respawned: bool,
    /// How log lines look
    #[arg(long, value_enum, default_value_t)]
    pub(crate) log_format: LogFormat,
    /// error, warn, info, debug, trace, or a filter such as info,skein_controller=debug
    #[arg(long, default_value = "info")]
    pub(crate) log_level: String,
}

/// How log lines look.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum LogFormat {
    /// For people.
    #[default]
    Human,
    /// One JSON object a line.
    Json,
}

/// Why a controller did not start.
#[derive(Debug, thiserror::Error)]
pub(crate) enum StartError {
    #[error(transparent)]
    Path(#[from] PathError),
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error(transparent)]
    Lock(#[from] LockError),
    #[error("cannot listen on {}: {source}", path.display())]
    Listen { path: PathBuf, source: io::Error },
    #[error("cannot start: {0}")]
    Runtime(#[from] io::Error),
}

/// Runs a controller as a process of its own until SIGTERM or SIGINT; `args` begins with the program's name.
///
/// Exits 0 after an orderly end, 1 after a failure, 2 on wrong arguments.
pub fn run(args: impl Iterator<Item = OsString>) -> ExitCode {
    let args = match Args::try_parse_from(args) {
        Ok(args) => args,
        Err(error) => {
            // Nothing is left to do when even the usage message cannot be printed.
            let _ = error.print();
            return if error.use_stderr() { ExitCode::from(2) } else { ExitCode::SUCCESS };
        }
    };
    if args.detached {
        // Fails where the process leads a group already; then nothing ties it to a terminal either.
        let _ = rustix::process::setsid();
    }
    if args.respawned {
        // Our output is that of the router which started us, which has a log of its own.
        redirect_output(&Paths::new(args.state.clone(), args.runtime.clone()));
    }
    install_logs(&args);
    panic::abort_the_process();
    match start(args) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!(%error, "controller failed");
            ExitCode::FAILURE
        }
    }
}

fn redirect_output(paths: &Paths) {
    let Ok(log) = crate::platform::linux::log_file(paths, "controller.log") else { return };
    // The router's log is not wrong, only harder to find.
    let _ = rustix::stdio::dup2_stdout(&log).and_then(|()| rustix::stdio::dup2_stderr(&log));
}

fn install_logs(args: &Args) {
    let filter = EnvFilter::try_new(&args.log_level).unwrap_or_else(|_| EnvFilter::new("info"));
    let builder = tracing_subscriber::fmt().with_env_filter(filter).with_writer(io::stderr);
    // A second subscriber exists in tests only; the first one goes on.
    let _ = match args.log_format {
        LogFormat::Human => builder.with_ansi(false).try_init(),
        LogFormat::Json => builder.json().try_init(),
    };
}

fn start(args: Args) -> Result<(), StartError> {
    let paths = Paths::new(args.state.clone(), args.runtime.clone());
    if args.respawned && paths.stopped_file().exists() {
        tracing::info!("the site is meant to be stopped");
        return Ok(());
    }
    raise_file_limit();
    if !paths.has_site() {
        return Err(StoreError::NoSite { path: paths.state().to_owned() }.into());
    }
    paths.create()?;
    let lock = StateLock::acquire(&paths)?;
    lock.sign();
    // Whoever starts a controller means the site to run.
    if let Err(error) = std::fs::remove_file(paths.stopped_file())
        && error.kind() != io::ErrorKind::NotFound
    {
        tracing::warn!(%error, "the mark of a stopped site stays");
    }
    let store = Store::new(paths.clone());
    let loaded = store.load()?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let ended = runtime.block_on(async move {
        let controller = Controller::new(store, loaded);
        let sockets = Sockets::open(&paths)?;
        serve(controller, sockets, &args).await
    });
    // A resolver that does not answer is not waited for.
    runtime.shutdown_background();
    ended
}

/// Each `skctl` and each claim takes a descriptor; the soft limit is often 1,024.
fn raise_file_limit() {
    use rustix::process::{Resource, getrlimit, setrlimit};
    let mut limit = getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    if let Err(error) = setrlimit(Resource::Nofile, limit) {
        tracing::debug!(%error, "the limit of open files stays as it is");
    }
}

/// The three sockets of a controller.
#[derive(Debug)]
pub(crate) struct Sockets {
    site: Acceptor,
    control: Acceptor,
    claim: Acceptor,
}

impl Sockets {
    /// Binds them; must run inside the runtime.
    pub(crate) fn open(paths: &Paths) -> Result<Self, StartError> {
        let listen = |path: PathBuf| {
            Acceptor::open(paths, path.clone())
                .map_err(|source| StartError::Listen { path, source })
        };
        Ok(Self {
            site: listen(paths.site_socket())?,
            control: listen(paths.control_socket())?,
            claim: listen(paths.claim_socket())?,
        })
    }
}

/// Serves until told to end, then ends in order: no new requests, tasks to a deadline, everything dirty saved.
pub(crate) async fn serve(
    controller: Arc<Controller>,
    sockets: Sockets,
    args: &Args,
) -> Result<(), StartError> {
    controller.tick(0);
    controller.refresh(&mut controller.state());
    for problem in &controller.state().problems {
        tracing::warn!(%problem, fix = problem.fix(), "state");
    }
    let shutdown = controller.shutdown.clone();
    let tasks = &controller.tasks;
    let site = SiteServer::new(SiteService(Arc::clone(&controller)))
        .max_decoding_message_size(REQUEST_LEN_MAX)
        .max_encoding_message_size(usize::MAX);
    let control = ControlServer::new(ControlService(Arc::clone(&controller)))
        .max_decoding_message_size(MESSAGE_LEN_MAX);
    let stop = shutdown.clone();
    let site = tonic::transport::Server::builder()
        .add_service(site)
        .serve_with_incoming_shutdown(own_connections(sockets.site), stop.cancelled_owned());
    let stop = shutdown.clone();
    let control = tonic::transport::Server::builder()
        .add_service(control)
        .serve_with_incoming_shutdown(own_connections(sockets.control), stop.cancelled_owned());
    tasks.spawn(report("site socket", site));
    tasks.spawn(report("control socket", control));
    tasks.spawn(claim::server::serve(Arc::clone(&controller), sockets.claim));
    tasks.spawn(claim::applied::run(Arc::clone(&controller)));
    tasks.spawn(keep_time(Arc::clone(&controller)));
    tasks.spawn(hosts::elsewhere::run(Arc::clone(&controller)));
    if !args.no_router {
        tasks.spawn(supervise(Arc::clone(&controller)));
    }
    tracing::info!(site = %controller.site, state = %args.state.display(), "controller started");
    wait_for_end(&controller).await?;
    shutdown.cancel();
    tasks.close();
    if tokio::time::timeout(JOIN_TIMEOUT, tasks.wait()).await.is_err() {
        tracing::warn!("some tasks did not end in time");
    }
    controller.save_learned();
    tracing::info!("controller ended");
    Ok(())
}

async fn wait_for_end(controller: &Controller) -> io::Result<()> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    tokio::select! {
        _ = terminate.recv() => {} // cancel-safe
        _ = interrupt.recv() => {} // cancel-safe
        () = controller.shutdown.cancelled() => {} // cancel-safe
    }
    Ok(())
}

async fn report(
    what: &'static str,
    server: impl Future<Output = Result<(), tonic::transport::Error>>,
) {
    if let Err(error) = server.await {
        tracing::error!(%error, what, "server ended");
    }
}

/// Connections of this user and of root; file modes already keep others out, this says who it was.
fn own_connections(acceptor: Acceptor) -> impl Stream<Item = io::Result<UnixStream>> {
    let uid = rustix::process::geteuid().as_raw();
    acceptor.filter(move |connection| {
        let Ok(connection) = connection else { return true };
        match connection.peer_cred() {
            Ok(peer) if peer.uid() == uid || peer.uid() == 0 => true,
            Ok(peer) => {
                tracing::warn!(uid = peer.uid(), "connection of another user refused");
                false
            }
            Err(error) => {
                tracing::warn!(%error, "connection of an unknown user refused");
                false
            }
        }
    })
}

async fn keep_time(controller: Arc<Controller>) {
    let mut interval = tokio::time::interval(Duration::from_secs(1));
    interval.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut seconds = 1;
    loop {
        tokio::select! {
            () = controller.shutdown.cancelled() => return, // cancel-safe
            _ = interval.tick() => {} // cancel-safe
        }
        controller.tick(seconds);
        seconds += 1;
    }
}

/// Where the program to start is, as far as this process knows.
pub(crate) fn sibling(paths: &Paths, name: &str) -> PathBuf {
    let own = paths.bin_dir().join(name);
    if own.exists() {
        return own;
    }
    let beside = std::env::current_exe()
        .ok()
        .and_then(|exe| exe.parent().map(Path::to_owned))
        .map(|dir| dir.join(name));
    beside.filter(|path| path.exists()).unwrap_or(own)
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory as _;

    #[test]
    fn the_command_line_is_consistent() {
        Args::command().debug_assert();
    }
}
