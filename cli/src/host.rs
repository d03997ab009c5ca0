//! A site's processes on this machine: what works before there is a controller, and after it is gone.

mod end;
mod foreground;

use std::{
    io,
    os::unix::fs::OpenOptionsExt as _,
    path::{Path, PathBuf},
    process::Stdio,
    time::Duration,
};

use rustix::process::Signal;
use skein_api::{Service, status::SiteStatus};
use skein_controller::{
    LockError, Paths, StateLock,
    platform::linux::{self, Processes, Units},
    store::{HostRecord, Store},
};

pub(crate) use end::{controller_replaced, disable_units, forget_in_hosts, remove, stop};
pub(crate) use foreground::run_here;

use crate::{client::Client, clock, command::logs, error::Failure, input, progress::Progress};

/// How long processes may take to start on a busy machine.
pub(crate) const START_TIMEOUT: Duration = Duration::from_secs(30);
/// How often a starting or ending process is looked at.
pub(crate) const POLL: Duration = Duration::from_millis(50);

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

fn journalctl(lines: u32) -> tokio::process::Command {
    let mut command = tokio::process::Command::new("journalctl");
    command.arg("--lines").arg(lines.to_string());
    if !rustix::process::geteuid().is_root() {
        command.arg("--user");
    }
    command
}

/// The last lines of a unit's journal.
pub(crate) async fn journal_tail(unit: &str, lines: u32) -> Result<String, Failure> {
    let mut command = journalctl(lines);
    command.args(["--no-pager", "--quiet", "--unit", unit]).stdin(Stdio::null()).kill_on_drop(true);
    let failed = || Failure::new("cannot run journalctl");
    let output = command.output().await.map_err(|error| failed().because(error))?;
    if !output.status.success() {
        return Err(failed().because(String::from_utf8_lossy(&output.stderr).trim()));
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Runs journalctl for `units` in place of this process's output.
pub(crate) async fn journal(units: Vec<String>, lines: u32, follow: bool) -> Result<(), Failure> {
    let mut command = journalctl(lines);
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

/// Starts the processes under what the site wants to keep them running; the notes say what the user should know. A site
/// whose controller runs already is left to it.
///
/// # Errors
/// The executable cannot be copied or started.
pub(crate) async fn start(paths: &Paths) -> Result<Vec<String>, Failure> {
    let of_site = paths.clone();
    let prepared = input::blocking(move || Ok(prepare(&of_site, wanted_service))).await?;
    let (service, mut notes) = match prepared {
        // The router was faster in restarting its controller.
        Err(Prepare::Running(_)) => return Ok(Vec::new()),
        Err(Prepare::Failed(failure)) => return Err(failure),
        Ok(prepared) => prepared,
    };
    let paths = paths.clone();
    let started = input::blocking(move || match service {
        Service::Systemd => {
            // One of before the service was changed; systemd starts another.
            Processes::of(&paths).signal(Signal::TERM);
            Units::of(&paths).and_then(|units| units.start()).map_err(Failure::new)
        }
        Service::Auto | Service::None => spawn(&paths).map(|()| Vec::new()),
    })
    .await?;
    notes.extend(started);
    Ok(notes)
}

/// Why processes cannot be started.
enum Prepare {
    Running(Failure),
    Failed(Failure),
}

/// Makes ready for a start: state that can be read, executables, no mark of a stopped site, and the record of what will
/// run the processes, as `choose` says of what is wanted and what is recorded. The notes name what was damaged.
fn prepare(
    paths: &Paths,
    choose: impl FnOnce(Service, Option<Service>) -> Service,
) -> Result<(Service, Vec<String>), Prepare> {
    let failed = |failure: Failure| Prepare::Failed(failure);
    paths.create().map_err(Failure::new).map_err(failed)?;
    let _lock = StateLock::acquire(paths).map_err(|error| match error {
        LockError::Held(_) => Prepare::Running(Failure::new(error)),
        other => failed(Failure::new(other)),
    })?;
    let store = Store::new(paths.clone());
    let loaded = store.load().map_err(Failure::new).map_err(failed)?;
    if !linux::is_installed(paths) {
        install(paths).map_err(failed)?;
    }
    let record = store.host_record().map_err(Failure::new).map_err(failed)?;
    let wanted = loaded.resources.site.map(|site| site.spec.service).unwrap_or_default();
    let service = choose(wanted, record.service);
    if service != Service::Systemd {
        // They would go on restarting processes that somebody else looks after from now on.
        // A user without a home has none.
        let removed = Units::of(paths).map_or(Ok(()), |units| units.remove());
        removed.map_err(Failure::new).map_err(failed)?;
    }
    if record.service != Some(service) {
        let record = HostRecord { service: Some(service) };
        store.save_host_record(&record).map_err(Failure::new).map_err(failed)?;
    }
    remove_if_there(&paths.stopped_file())
        .map_err(|error| failed(Failure::new("cannot start the site").because(error)))?;
    Ok((service, loaded.problems.iter().map(ToString::to_string).collect()))
}

/// What shall run the processes. `auto` is decided once: the environment of whoever asks may be another one every time.
fn wanted_service(wanted: Service, recorded: Option<Service>) -> Service {
    match (wanted, recorded) {
        (Service::Auto, Some(recorded)) => recorded,
        (wanted, _) => linux::chosen_service(wanted),
    }
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

/// What keeps the site's processes running since they were last started. Reads only.
///
/// # Errors
/// The state of the site cannot be read.
pub(crate) fn service(paths: &Paths) -> Result<Service, Failure> {
    let record = Store::new(paths.clone()).host_record().map_err(Failure::new)?;
    Ok(record.service.unwrap_or_else(|| {
        let has_units = Units::of(paths).is_ok_and(|units| units.are_installed());
        if has_units { Service::Systemd } else { Service::None }
    }))
}

/// Whether the processes run under something else than the site wants by now.
///
/// # Errors
/// The state of the site cannot be read.
pub(crate) fn is_under_other_service(paths: &Paths) -> Result<bool, Failure> {
    let runs = service(paths)?;
    let site = Store::new(paths.clone()).site_manifest().map_err(Failure::new)?;
    let wanted = site.map(|site| site.spec.service).unwrap_or_default();
    Ok(wanted_service(wanted, Some(runs)) != runs)
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
    skein_proxy::hide_proxies(&mut command);
    command.args(linux::controller_arguments(paths));
    command
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
