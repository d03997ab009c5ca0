//! One writer for a site's state: whoever changes it holds `controller.lock`.

use std::{
    fs::File,
    io::{self, Read as _, Write as _},
    os::unix::fs::OpenOptionsExt as _,
    path::PathBuf,
};

use rustix::{fs::FlockOperation, io::Errno, process::Pid};

use crate::paths::Paths;

/// Longest content of the file: a process id in decimal.
const PID_LEN_MAX: u64 = 16;

/// The right to change the state; it goes with the value, or with the process.
#[derive(Debug)]
pub struct StateLock(File);

/// Why the state cannot be changed now.
#[derive(Debug, thiserror::Error)]
pub enum LockError {
    /// A controller, or another `skctl`, has it.
    #[error("another controller runs for {} already; see `skctl status`", .0.display())]
    Held(PathBuf),
    /// The file system refused.
    #[error("cannot lock {}: {source}", path.display())]
    Io {
        /// The lock file.
        path: PathBuf,
        /// What the file system said.
        source: io::Error,
    },
}

impl StateLock {
    /// Takes the lock, or fails at once. The state directory must exist.
    ///
    /// # Errors
    /// See [`LockError`].
    pub fn acquire(paths: &Paths) -> Result<Self, LockError> {
        let path = paths.lock_file();
        let failed = |source: io::Error| LockError::Io { path: path.clone(), source };
        let opened =
            File::options().create(true).truncate(false).write(true).mode(0o600).open(&path);
        let file = opened.map_err(failed)?;
        match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => Ok(Self(file)),
            Err(Errno::WOULDBLOCK) => Err(LockError::Held(paths.state().to_owned())),
            Err(errno) => Err(failed(errno.into())),
        }
    }

    /// Says which process is the controller, for whoever has to end one that does not answer.
    pub(crate) fn sign(&self) {
        let pid = std::process::id().to_string();
        let mut file = &self.0;
        if let Err(error) = file.set_len(0).and_then(|()| file.write_all(pid.as_bytes())) {
            // On a full disk: the controller still answers on its socket.
            tracing::warn!(%error, "the lock does not name its holder");
        }
    }
}

/// The process that signed the lock last; it may be gone.
pub(crate) fn signed_by(paths: &Paths) -> Option<Pid> {
    let mut text = String::new();
    File::open(paths.lock_file()).ok()?.take(PID_LEN_MAX).read_to_string(&mut text).ok()?;
    parse_pid(&text)
}

/// A process id as files have it; whatever else was written there is none.
pub(crate) fn parse_pid(text: &str) -> Option<Pid> {
    Pid::from_raw(text.trim().parse().ok().filter(|&pid: &i32| pid > 0)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_writer_for_one_state() {
        let (_dir, paths) = crate::store::tests::site();
        let first = StateLock::acquire(&paths).unwrap();
        first.sign();
        assert!(matches!(StateLock::acquire(&paths), Err(LockError::Held(_))));
        assert_eq!(signed_by(&paths), Some(rustix::process::getpid()));
        drop(first);
        StateLock::acquire(&paths).unwrap();
    }
}
