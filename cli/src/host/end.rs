//! The end of a site's processes, and of the site: also when nobody answers, and again after an attempt that failed.

use std::{fs, io, path::Path, time::Duration};

use rustix::process::{Pid, Signal};
use skein_api::Service;
use skein_controller::{
    Paths,
    platform::linux::{self, Processes, Units},
    store::Store,
};

use super::{POLL, START_TIMEOUT, service};
use crate::{client::Client, clock, error::Failure, input, progress::Progress};

/// How long processes that were asked to end may take: running flows are drained first.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(15);
/// How long killed processes may take.
const KILL_TIMEOUT: Duration = Duration::from_secs(5);
/// How often another site's change of `/etc/hosts` is waited for.
const HOSTS_TRIES: u32 = 100;

/// Ends controller and router; flows are drained first. Processes that do not answer are ended by signals.
///
/// # Errors
/// systemd refuses, or a process does not even end when it is killed.
pub(crate) async fn stop(paths: &Paths, progress: &mut Progress) -> Result<(), Failure> {
    progress.step("draining");
    let of_site = paths.clone();
    let is_systemd = input::blocking(move || service(&of_site)).await? == Service::Systemd;
    if is_systemd {
        units(paths, |units| if units.are_installed() { units.stop() } else { Ok(()) }).await?;
    } else if let Ok(mut client) = Client::connect_to(paths).await
        && let Err(failure) = client.shutdown(true).await
    {
        progress.step(format!("ending the processes by signals ({failure})"));
    }
    end(paths, progress).await
}

/// Waits until no process of the site is left; those that stay are told by SIGTERM, then by SIGKILL.
pub(super) async fn end(paths: &Paths, progress: &mut Progress) -> Result<(), Failure> {
    if paths.state().is_dir()
        && let Err(error) = Store::new(paths.clone()).mark_stopped()
    {
        // They may restart each other until both are gone, which is waited for.
        progress.step(format!("going on although {error}"));
    }
    progress.step("waiting for the processes to end");
    // A controller that was asked says goodbye by itself.
    let is_asked = crate::net::connect_unix(&paths.site_socket()).await.is_err();
    let orderly = if is_asked { KILL_TIMEOUT } else { Duration::ZERO };
    if until_gone(paths, orderly, None).await
        || until_gone(paths, DRAIN_TIMEOUT, Some(Signal::TERM)).await
        || until_gone(paths, KILL_TIMEOUT, Some(Signal::KILL)).await
    {
        return Ok(());
    }
    let left = Processes::of(paths);
    let pids: Vec<String> = [left.controller, left.router]
        .into_iter()
        .flatten()
        .map(|pid| pid.as_raw_nonzero().to_string())
        .collect();
    Err(Failure::timeout(format_args!("process {} of the site does not end", pids.join(", ")))
        .because("the kernel has been told to kill it")
        .next("see `skctl logs`"))
}

/// Whether all processes are gone before `timeout`. Each gets `signal` once, those that are started meanwhile too.
async fn until_gone(paths: &Paths, timeout: Duration, signal: Option<Signal>) -> bool {
    let deadline = clock::instant() + timeout;
    let mut told = Processes::default();
    loop {
        let now = Processes::of(paths);
        if now.is_empty() {
            return true;
        }
        if let Some(signal) = signal
            && now != told
        {
            now.signal(signal);
            told = now;
        }
        if clock::instant() >= deadline {
            return false;
        }
        clock::sleep(POLL).await;
    }
}

/// Waits until the controller `before` is gone; another one may run by then.
///
/// # Errors
/// It is still there after [`START_TIMEOUT`].
pub(crate) async fn controller_replaced(paths: &Paths, before: Option<Pid>) -> Result<(), Failure> {
    let deadline = clock::instant() + START_TIMEOUT;
    while before.is_some() && Processes::of(paths).controller == before {
        if clock::instant() >= deadline {
            return Err(Failure::timeout("the controller does not end").next("see `skctl logs`"));
        }
        clock::sleep(POLL).await;
    }
    Ok(())
}

/// Keeps systemd from starting the site again, whatever becomes of its state.
///
/// # Errors
/// systemd refuses.
pub(crate) async fn disable_units(paths: &Paths) -> Result<(), Failure> {
    units(paths, |units| if units.are_installed() { units.disable() } else { Ok(()) }).await
}

async fn units(
    paths: &Paths,
    act: impl FnOnce(&Units) -> Result<(), linux::UnitError> + Send + 'static,
) -> Result<(), Failure> {
    let paths = paths.clone();
    input::blocking(move || {
        // A user without a home has no units.
        Units::of(&paths).map_or(Ok(()), |units| act(&units)).map_err(Failure::new)
    })
    .await
}

/// Removes everything the site has on this machine; its processes must have ended. The identity goes last: until then it
/// can be repeated.
///
/// # Errors
/// The file system or systemd refuses.
pub(crate) async fn remove(paths: &Paths) -> Result<(), Failure> {
    units(paths, Units::remove).await?;
    forget_in_hosts(paths).await?;
    let paths = paths.clone();
    input::blocking(move || {
        remove_all(paths.runtime())?;
        let identity = paths.identity_file();
        let entries = match fs::read_dir(paths.state()) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            entries => entries.map_err(|error| cannot_remove(paths.state(), &error))?,
        };
        for entry in entries {
            let path = entry.map_err(|error| cannot_remove(paths.state(), &error))?.path();
            if path != identity {
                remove_all(&path)?;
            }
        }
        remove_all(paths.state())
    })
    .await
}

/// Takes the site's block, if it has one, out of `/etc/hosts`.
///
/// # Errors
/// The file system refuses.
pub(crate) async fn forget_in_hosts(paths: &Paths) -> Result<(), Failure> {
    for _ in 0..HOSTS_TRIES {
        match linux::forget_in_hosts(paths) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => clock::sleep(POLL).await,
            done => {
                return done.map_err(|error| {
                    Failure::new("cannot take the site's block out of /etc/hosts").because(error)
                });
            }
        }
    }
    Err(Failure::timeout("another process keeps /etc/hosts locked").next("try again"))
}

fn remove_all(path: &Path) -> Result<(), Failure> {
    let is_dir = fs::symlink_metadata(path).is_ok_and(|meta| meta.is_dir());
    let removed = if is_dir { fs::remove_dir_all(path) } else { fs::remove_file(path) };
    match removed {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(cannot_remove(path, &error)),
        _ => Ok(()),
    }
}

fn cannot_remove(path: &Path, error: &io::Error) -> Failure {
    Failure::new(format_args!("cannot remove {}", path.display()))
        .because(error)
        .next("mend that and run `skctl delete --yes` again")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_identity_goes_last_and_again_is_fine() {
        let dir = tempfile::tempdir().unwrap();
        let paths = Paths::new(dir.path().join("state"), dir.path().join("run"));
        paths.create().unwrap();
        for path in [paths.identity_file(), paths.lock_file(), paths.host_file()] {
            fs::write(path, "").unwrap();
        }
        remove(&paths).await.unwrap();
        assert!(!paths.state().exists() && !paths.runtime().exists());
        remove(&paths).await.unwrap();
    }
}
