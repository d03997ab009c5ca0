//! A site's processes on this machine: what works before there is a controller, and after it is gone.

use std::{
    io::{self, Write as _},
    path::PathBuf,
    process::Stdio,
    time::Duration,
};

use skein_api::status::SiteStatus;
use skein_controller::Paths;

use crate::{client::Client, clock, command::logs, error::Failure, progress::Progress};

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

/// Installs the site's own copy of the executable and starts the controller, which starts the router.
///
/// # Errors
/// The executable cannot be copied or started.
pub(crate) fn start(paths: &Paths) -> Result<(), Failure> {
    install(paths)?;
    spawn(paths)
}

/// Puts this executable under the names of the site's processes into the site's directory, so that an upgrade of skctl
/// changes nothing until `skctl upgrade`.
///
/// # Errors
/// The file system refuses.
pub(crate) fn install(paths: &Paths) -> Result<(), Failure> {
    let failed = |error: io::Error| {
        Failure::new(format_args!("cannot install executables in {}", paths.bin_dir().display()))
            .because(error)
    };
    paths.create().map_err(Failure::new)?;
    let program = std::env::current_exe().map_err(failed)?;
    for name in PROGRAMS {
        let target = paths.bin_dir().join(name);
        let fresh = paths.bin_dir().join(format!(".{name}.new"));
        remove_if_there(&fresh).map_err(failed)?;
        // A hard link costs nothing, but an executable that is replaced in place would change under the process.
        std::fs::copy(&program, &fresh).map_err(failed)?;
        std::fs::rename(&fresh, &target).map_err(failed)?;
    }
    Ok(())
}

/// Names by which the executable knows what to be.
const PROGRAMS: [&str; 2] = ["skein-controller", "skein-router"];

fn remove_if_there(path: &std::path::Path) -> io::Result<()> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

fn spawn(paths: &Paths) -> Result<(), Failure> {
    use std::os::unix::process::CommandExt as _;
    let failed = |error: io::Error| Failure::new("cannot start the controller").because(error);
    remove_if_there(&paths.stopped_file()).map_err(failed)?;
    let log = std::fs::OpenOptions::new()
        .create(true)
        .append(true)
        .open(paths.logs_dir().join("controller.log"))
        .map_err(failed)?;
    let child = std::process::Command::new(paths.bin_dir().join("skein-controller"))
        .arg("--state")
        .arg(paths.state())
        .arg("--runtime")
        .arg(paths.runtime())
        .arg("--detached")
        .stdin(Stdio::null())
        .stdout(log.try_clone().map_err(failed)?)
        .stderr(log)
        // Ctrl-C in this terminal is not meant for the site.
        .process_group(0)
        .spawn()
        .map_err(failed)?;
    // It outlives this process, and whoever adopts it reaps it.
    drop(child);
    Ok(())
}

/// Ends controller and router; flows are drained first.
///
/// # Errors
/// The controller does not end.
pub(crate) async fn stop(paths: &Paths, progress: &mut Progress) -> Result<(), Failure> {
    let mut client = Client::connect_to(paths).await?;
    progress.step("draining");
    let mut stopped = std::fs::File::create(paths.stopped_file())
        .map_err(|error| Failure::new("cannot mark the site as stopped").because(error))?;
    stopped
        .write_all(b"stopped by skctl\n")
        .map_err(|error| Failure::new("cannot mark the site as stopped").because(error))?;
    client.shutdown(true).await?;
    ended(paths, progress).await
}

/// Waits until the controller no longer answers.
pub(crate) async fn ended(paths: &Paths, progress: &mut Progress) -> Result<(), Failure> {
    progress.step("waiting for the processes to end");
    let deadline = clock::instant() + START_TIMEOUT;
    while clock::instant() < deadline {
        if crate::net::connect_unix(&paths.site_socket()).await.is_err() {
            return Ok(());
        }
        clock::sleep(POLL).await;
    }
    Err(Failure::timeout("the controller does not end").next("see `skctl logs`"))
}

/// Removes everything the site has on this machine.
///
/// # Errors
/// The file system refuses.
pub(crate) fn remove(paths: &Paths) -> Result<(), Failure> {
    for dir in [paths.runtime(), paths.state()] {
        match std::fs::remove_dir_all(dir) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(
                    Failure::new(format_args!("cannot remove {}", dir.display())).because(error)
                );
            }
            _ => {}
        }
    }
    Ok(())
}

/// Where the site's logs are.
pub(crate) fn logs(paths: &Paths) -> LogSource {
    LogSource::Files(logs::files(paths))
}

/// Turns this process into the site's controller; returns only when that fails.
pub(crate) fn run_here(paths: &Paths) -> Failure {
    use std::os::unix::process::CommandExt as _;
    if let Err(failure) = install(paths) {
        return failure;
    }
    let error = std::process::Command::new(paths.bin_dir().join("skein-controller"))
        .arg("--state")
        .arg(paths.state())
        .arg("--runtime")
        .arg(paths.runtime())
        .exec();
    Failure::new("cannot run the controller").because(error)
}

/// Decrypts an exported identity.
///
/// # Errors
/// The passphrase is wrong, or it is something else.
pub(crate) fn open_identity(
    archive: &[u8],
    passphrase: &str,
) -> Result<skein_controller::site::Rebuilt, Failure> {
    let _ = (archive, passphrase);
    Err(Failure::new("cannot open"))
}
