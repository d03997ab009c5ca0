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
    /// The file system's.
    fn remove(&self, path: &Path) -> io::Result<()>;

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
        let dir = parent(path)?;
        let temporary = temporary(path)?;
        let written = write_synced(&temporary, content).and_then(|()| fs::rename(&temporary, path));
        if let Err(error) = written {
            // The old file stands; what remains of the new one is only in the way.
            let _ = fs::remove_file(&temporary);
            return Err(error);
        }
        sync_dir(dir)
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        match fs::remove_file(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            Err(error) => Err(error),
            Ok(()) => sync_dir(parent(path)?),
        }
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

fn write_synced(path: &Path, content: &[u8]) -> io::Result<()> {
    // A left-over of a crash may have any mode: begin anew.
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)?;
    file.write_all(content)?;
    file.sync_all()
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
}
