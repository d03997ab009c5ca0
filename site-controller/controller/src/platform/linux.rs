//! Processes of a site on a Linux host: executables, supervision, systemd units.

mod processes;
mod supervise;
mod units;

use std::{
    fs, io,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
};

use skein_api::Service;

use crate::{hosts, paths::Paths};

pub use processes::Processes;
pub(crate) use supervise::supervise;
pub use units::{UnitError, Units};

/// The names under which the site's processes run.
pub const PROGRAMS: [&str; 2] = ["skein-controller", "skein-router"];
/// Largest log file of a process that no service manager looks after; one older file of that size is kept.
const LOG_LEN_MAX: u64 = 16 << 20;

/// What keeps the processes running: systemd only where it is PID 1 of this machine and of this network namespace, because units it
/// starts elsewhere would run in another network.
#[must_use]
pub fn chosen_service(wanted: Service) -> Service {
    match wanted {
        Service::Systemd => Service::Systemd,
        Service::None => Service::None,
        Service::Auto if systemd_runs_here() => Service::Systemd,
        Service::Auto => Service::None,
    }
}

/// Whether systemd runs this machine or container at all (sd_booted(3)).
#[must_use]
pub fn has_systemd() -> bool {
    Path::new("/run/systemd/system").is_dir()
}

fn systemd_runs_here() -> bool {
    if !has_systemd() {
        return false;
    }
    let namespace = |pid: &str| fs::read_link(format!("/proc/{pid}/ns/net"));
    match (namespace("1"), namespace("self")) {
        (Ok(first), Ok(own)) => first == own,
        // An ordinary user cannot read that of PID 1: a user manager of its own says as much.
        _ => std::env::var_os("XDG_RUNTIME_DIR")
            .is_some_and(|dir| Path::new(&dir).join("systemd/private").exists()),
    }
}

/// Puts copies of `executable` into the site's `bin` directory under the names of its processes, each replaced at once: what runs goes on
/// with the old file.
///
/// # Errors
/// The file system's; what was there stays.
pub fn install(paths: &Paths, executable: &Path) -> io::Result<()> {
    let bin = paths.bin_dir();
    let fresh = bin.join(".new");
    remove_if_there(&fresh)?;
    fs::copy(executable, &fresh)?;
    fs::set_permissions(&fresh, fs::Permissions::from_mode(0o700))?;
    fs::File::open(&fresh)?.sync_all()?;
    for name in PROGRAMS {
        let link = bin.join(format!(".{name}.new"));
        remove_if_there(&link)?;
        fs::hard_link(&fresh, &link)?;
        fs::rename(&link, bin.join(name))?;
    }
    fs::remove_file(&fresh)?;
    fs::File::open(&bin)?.sync_all()
}

/// Whether the site has executables of its own.
#[must_use]
pub fn is_installed(paths: &Paths) -> bool {
    PROGRAMS.iter().all(|name| paths.bin_dir().join(name).exists())
}

/// Takes the site's block out of `/etc/hosts`, if there is one.
///
/// # Errors
/// The file system's; the file is as before then.
pub fn forget_in_hosts(paths: &Paths) -> io::Result<()> {
    hosts::remove(hosts::FILE.as_ref(), &paths.label())
}

fn remove_if_there(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// Arguments with which the controller of this site is started.
#[must_use]
pub fn controller_arguments(paths: &Paths) -> Vec<std::ffi::OsString> {
    vec!["--state".into(), paths.state().into(), "--runtime".into(), paths.runtime().into()]
}

/// Keeps the logs of detached processes from filling the disk: what is over its length becomes the one older file. Processes append, so
/// they go on at the new end.
pub(crate) fn rotate_logs(dir: &Path) -> io::Result<()> {
    for name in ["controller.log", "router.log"] {
        let path = dir.join(name);
        match fs::metadata(&path) {
            Ok(meta) if meta.len() > LOG_LEN_MAX => {
                fs::copy(&path, dir.join(format!("{name}.1")))?;
                fs::File::options().write(true).open(&path)?.set_len(0)?;
            }
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// Opens a log for appending.
pub(crate) fn log_file(paths: &Paths, name: &str) -> io::Result<fs::File> {
    use std::os::unix::fs::OpenOptionsExt as _;
    let path: PathBuf = paths.logs_dir().join(name);
    fs::File::options().create(true).append(true).mode(0o600).open(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn executables_are_replaced_at_once() {
        let (_dir, paths) = crate::store::tests::site();
        let source = paths.state().join("program");
        for content in ["one", "two"] {
            fs::write(&source, content).unwrap();
            install(&paths, &source).unwrap();
            for name in PROGRAMS {
                assert_eq!(fs::read_to_string(paths.bin_dir().join(name)).unwrap(), content);
            }
        }
        assert_eq!(fs::read_dir(paths.bin_dir()).unwrap().count(), PROGRAMS.len());
    }

    #[test]
    fn long_logs_are_rotated() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("router.log");
        fs::File::create(&path).unwrap().set_len(LOG_LEN_MAX + 1).unwrap();
        rotate_logs(dir.path()).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().len(), 0);
        assert_eq!(fs::metadata(dir.path().join("router.log.1")).unwrap().len(), LOG_LEN_MAX + 1);
    }

    #[test]
    fn nothing_is_chosen_against_the_users_word() {
        assert_eq!(chosen_service(Service::None), Service::None);
        assert_eq!(chosen_service(Service::Systemd), Service::Systemd);
        assert_ne!(chosen_service(Service::Auto), Service::Auto);
    }
}
