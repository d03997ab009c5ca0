//! Which processes of a site run on this host, and how they are made to end when nobody answers.

use std::{fs, os::unix::ffi::OsStrExt as _, path::Path};

use rustix::process::{Pid, Signal, kill_process};

use crate::{lock, paths::Paths};

/// Processes of one site.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Processes {
    /// The controller, whether or not it answers.
    pub controller: Option<Pid>,
    /// The router, whether or not it is attached.
    pub router: Option<Pid>,
}

impl Processes {
    /// Those that run now. Process ids are used again, so each is checked by what it was started with.
    #[must_use]
    pub fn of(paths: &Paths) -> Self {
        let controller = lock::signed_by(paths).filter(|&pid| is_controller(paths, pid));
        let stored = fs::read_to_string(paths.router_pid_file()).ok();
        let router = stored.and_then(|text| lock::parse_pid(&text));
        Self { controller, router: router.filter(|&pid| is_router(paths, pid)) }
    }

    /// Whether none runs.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.controller.is_none() && self.router.is_none()
    }

    /// Sends `signal` to both; the router first, because it would start a controller that is missing.
    pub fn signal(&self, signal: Signal) {
        for pid in [self.router, self.controller].into_iter().flatten() {
            // It ended meanwhile, or is somebody else's: whoever waits for the end sees that it is still there.
            let _ = kill_process(pid, signal);
        }
    }
}

/// Whether `pid` is a router of this site.
pub(crate) fn is_router(paths: &Paths, pid: Pid) -> bool {
    runs(pid, b"skein-router", &paths.router_dir())
}

fn is_controller(paths: &Paths, pid: Pid) -> bool {
    runs(pid, b"skein-controller", paths.state())
}

/// Whether `pid` is `program` for the directory `state`. One that only waits to be reaped has no command line.
fn runs(pid: Pid, program: &[u8], state: &Path) -> bool {
    let path = format!("/proc/{}/cmdline", pid.as_raw_nonzero());
    let Ok(command_line) = fs::read(path) else { return false };
    let mut arguments = command_line.split(|byte| *byte == 0);
    let is_program = arguments.next().is_some_and(|own| own.ends_with(program));
    is_program && arguments.any(|argument| argument == state.as_os_str().as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_id_that_was_used_again_is_nobody() {
        let (_dir, paths) = crate::store::tests::site();
        fs::write(paths.router_pid_file(), std::process::id().to_string()).unwrap();
        fs::write(paths.lock_file(), std::process::id().to_string()).unwrap();
        assert!(Processes::of(&paths).is_empty());
        fs::write(paths.router_pid_file(), "-1").unwrap();
        assert!(Processes::of(&paths).is_empty());
    }
}
