//! Why state could not be read or written.

use std::{
    io,
    path::{Path, PathBuf},
};

use super::form::STATE_VERSION;

/// Why state could not be read or written. Every variant names the file.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The file system refused.
    #[error("cannot {action} {}: {}", path.display(), explain(source))]
    Io {
        /// `read`, `write`, …
        action: &'static str,
        /// Which file.
        path: PathBuf,
        /// What the file system said.
        source: io::Error,
    },
    /// A file without which there is no site cannot be understood.
    #[error(
        "{} is damaged ({why}); restore it from a back-up of this directory, or rebuild the site with `skctl init --identity FILE`, which keeps this directory under another name",
        path.display()
    )]
    Damaged {
        /// Which file.
        path: PathBuf,
        /// What is wrong with it.
        why: String,
    },
    /// The document of the site is as it was written, and breaks a rule of this version.
    #[error("{} cannot be used as it is ({why}); correct it there, or run the version that wrote it", path.display())]
    Invalid {
        /// Which file.
        path: PathBuf,
        /// Which rule.
        why: String,
    },
    /// A later version wrote it.
    #[error(
        "{} was written by a later version of Skein (state form {version}, this one knows {STATE_VERSION}); run that version again",
        path.display()
    )]
    Newer {
        /// Which file.
        path: PathBuf,
        /// Its form.
        version: u32,
    },
    /// There is no site here.
    #[error("there is no site in {}; make one with `skctl init`", path.display())]
    NoSite {
        /// The state directory.
        path: PathBuf,
    },
}

/// Says the two errors people meet most in their own words.
fn explain(error: &io::Error) -> String {
    match error.kind() {
        io::ErrorKind::StorageFull => "the disk is full; free some space and try again".to_owned(),
        io::ErrorKind::ReadOnlyFilesystem => "the file system is read-only".to_owned(),
        io::ErrorKind::PermissionDenied => {
            "permission denied; the state belongs to another user".to_owned()
        }
        _ => error.to_string(),
    }
}

pub(super) fn io_error(action: &'static str, path: &Path, source: io::Error) -> StoreError {
    StoreError::Io { action, path: path.to_owned(), source }
}
