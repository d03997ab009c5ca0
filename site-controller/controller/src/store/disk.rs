//! Files that are either as before or as wanted, never in between.

use std::{
    fmt::Debug,
    fs::{self, File, OpenOptions},
    io::{self, Read as _, Write as _},
    os::unix::fs::OpenOptionsExt as _,
    path::{Path, PathBuf},
};

/// Largest state file read back: the learned records of a network of 1,000 sites take a few MiB.
const FILE_LEN_MAX: u64 = 64 << 20;

/// What the store needs of a file system; tests put one in its place that fails where they want.
pub trait Disk: Debug + Send + Sync {
    /// The content, or `None` if there is no such file.
    ///
    /// # Errors
    /// The file system's, and `InvalidData` for a file no state has.
    fn read(&self, path: &Path) -> io::Result<Option<Vec<u8>>>;

    /// Replaces the file's content at once and for good; mode 0600.
    ///
    /// # Errors
    /// The file system's; the file is as before then.
    fn replace(&self, path: &Path, content: &[u8]) -> io::Result<()>;

    /// Removes the file; a missing one is fine.
    ///
    /// # Errors
    /// The file system's; the file is as before then.
    fn remove(&self, path: &Path) -> io::Result<()>;

    /// Replaces the file's content at once, or removes the file. It lasts from the next [`sync`](Self::sync) on: many files together
    /// take one wait for the disk instead of two for each.
    ///
    /// # Errors
    /// The file system's; the file is as before then.
    fn put_unsynced(&self, path: &Path, content: Option<&[u8]>) -> io::Result<()>;

    /// Makes everything last that was written below `dir`.
    ///
    /// # Errors
    /// The file system's; nobody knows then what lasts.
    fn sync(&self, dir: &Path) -> io::Result<()>;

    /// Moves a file within its directory.
    ///
    /// # Errors
    /// The file system's.
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()>;

    /// Names of the files in a directory, sorted; none if it does not exist.
    ///
    /// # Errors
    /// The file system's.
    fn list(&self, dir: &Path) -> io::Result<Vec<String>>;
}

/// The file system of this host.
#[derive(Clone, Copy, Debug, Default)]
pub struct HostDisk;

impl Disk for HostDisk {
    fn read(&self, path: &Path) -> io::Result<Option<Vec<u8>>> {
        let file = match File::open(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            opened => opened?,
        };
        let mut content = Vec::new();
        file.take(FILE_LEN_MAX + 1).read_to_end(&mut content)?;
        if content.len() as u64 > FILE_LEN_MAX {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "far larger than any state"));
        }
        Ok(Some(content))
    }

    fn replace(&self, path: &Path, content: &[u8]) -> io::Result<()> {
        change(path, Some(content), sync_dir)
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        change(path, None, sync_dir)
    }

    fn put_unsynced(&self, path: &Path, content: Option<&[u8]>) -> io::Result<()> {
        match content {
            Some(content) => put_in_place(path, |file| file.write_all(content)),
            None => unlink(path),
        }
    }

    fn sync(&self, dir: &Path) -> io::Result<()> {
        Ok(rustix::fs::syncfs(File::open(dir)?)?)
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        fs::rename(from, to)?;
        sync_dir(parent(to)?)
    }

    fn list(&self, dir: &Path) -> io::Result<Vec<String>> {
        let entries = match fs::read_dir(dir) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            entries => entries?,
        };
        let mut names = Vec::new();
        for entry in entries {
            if let Ok(name) = entry?.file_name().into_string() {
                names.push(name);
            }
        }
        names.sort();
        Ok(names)
    }
}

/// Replaces or removes a file for good. `sync` makes the directory last; where it fails, what was there before is put back, because
/// whoever is told that nothing has changed must find it so at the next start.
fn change(
    path: &Path,
    content: Option<&[u8]>,
    sync: impl Fn(&Path) -> io::Result<()>,
) -> io::Result<()> {
    let before = match File::open(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => None,
        opened => Some(opened?),
    };
    match content {
        Some(content) => put_in_place(path, |file| {
            file.write_all(content)?;
            file.sync_all()
        })?,
        None if before.is_none() => return Ok(()),
        None => unlink(path)?,
    }
    let Err(error) = sync(parent(path)?) else { return Ok(()) };
    let put_back = match before {
        Some(mut before) => {
            put_in_place(path, |file| io::copy(&mut before, file).and_then(|_| file.sync_all()))
        }
        None => unlink(path),
    };
    if let Err(error) = put_back {
        tracing::error!(%error, file = %path.display(), "the disk fails; the file may be new or old");
    }
    Err(error)
}

/// Writes a new file and moves it in place; on failure the old one stands.
fn put_in_place(path: &Path, write: impl FnOnce(&mut File) -> io::Result<()>) -> io::Result<()> {
    let temporary = temporary(path)?;
    // A left-over of a crash may have any mode: begin anew.
    unlink(&temporary)?;
    let create = || OpenOptions::new().write(true).create_new(true).mode(0o600).open(&temporary);
    let written =
        create().and_then(|mut file| write(&mut file)).and_then(|()| fs::rename(&temporary, path));
    if written.is_err() {
        // What remains of the new one is only in the way.
        let _ = fs::remove_file(&temporary);
    }
    written
}

fn unlink(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

fn sync_dir(dir: &Path) -> io::Result<()> {
    File::open(dir)?.sync_all()
}

fn parent(path: &Path) -> io::Result<&Path> {
    path.parent().ok_or_else(|| io::Error::new(io::ErrorKind::InvalidInput, "not a file"))
}

/// Begins with a dot, so that no listing takes it for state.
fn temporary(path: &Path) -> io::Result<PathBuf> {
    let name = path.file_name().and_then(|name| name.to_str());
    let name = name.ok_or_else(|| io::Error::new(io::ErrorKind::InvalidInput, "not a file"))?;
    Ok(parent(path)?.join(format!(".{name}.new")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt as _;

    #[test]
    fn files_are_private_and_replaced_as_a_whole() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.json");
        assert_eq!(HostDisk.read(&path).unwrap(), None);
        fs::write(dir.path().join(".a.json.new"), "left by a crash").unwrap();
        HostDisk.replace(&path, b"one").unwrap();
        HostDisk.replace(&path, b"two").unwrap();
        assert_eq!(HostDisk.read(&path).unwrap().unwrap(), b"two");
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(HostDisk.list(dir.path()).unwrap(), ["a.json"]);
        HostDisk.remove(&path).unwrap();
        HostDisk.remove(&path).unwrap();
        assert_eq!(HostDisk.list(dir.path()).unwrap(), Vec::<String>::new());
    }

    #[test]
    fn a_change_that_cannot_be_made_to_last_is_taken_back() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.json");
        let broken = |_: &Path| Err(io::Error::other("the disk is dying"));
        change(&path, Some(b"one"), broken).unwrap_err();
        assert_eq!(HostDisk.read(&path).unwrap(), None, "it was not there before");
        HostDisk.replace(&path, b"one").unwrap();
        change(&path, Some(b"two"), broken).unwrap_err();
        assert_eq!(HostDisk.read(&path).unwrap().unwrap(), b"one");
        change(&path, None, broken).unwrap_err();
        assert_eq!(HostDisk.read(&path).unwrap().unwrap(), b"one");
        assert_eq!(HostDisk.list(dir.path()).unwrap(), ["a.json"]);
    }
}
