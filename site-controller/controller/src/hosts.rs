//! The opt-in block of local endpoints in `/etc/hosts`.

use std::{
    fs, io,
    io::Write as _,
    os::unix::fs::{OpenOptionsExt as _, PermissionsExt as _},
    path::Path,
};

use rustix::{fs::FlockOperation, io::Errno};
use skein_site_core::AutoEndpoints;

/// Where resolvers look first.
pub(crate) const FILE: &str = "/etc/hosts";

/// Makes the block of the site called `label` say exactly `endpoints`; everything else in the file stays. Writes only if something differs.
///
/// # Errors
/// The file system's; the file is as before then.
pub(crate) fn update(file: &Path, label: &str, endpoints: &AutoEndpoints) -> io::Result<()> {
    let mut block = String::new();
    for (address, endpoint) in endpoints {
        block += &format!("{} {address}\n", endpoint.ip);
    }
    rewrite(file, label, &block)
}

/// Takes the block of the site called `label` out.
///
/// # Errors
/// The file system's; the file is as before then.
pub(crate) fn remove(file: &Path, label: &str) -> io::Result<()> {
    rewrite(file, label, "")
}

fn rewrite(file: &Path, label: &str, block: &str) -> io::Result<()> {
    // What it leads to is replaced, not the link.
    let file = match fs::canonicalize(file) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => file.to_owned(),
        found => found?,
    };
    let read = || match fs::read_to_string(&file) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(String::new()),
        read => read,
    };
    let before = read()?;
    if with_block(&before, label, block) == before {
        return Ok(());
    }
    let _lock = lock(&file)?;
    // Another site may have written in between.
    let after = with_block(&read()?, label, block);
    let mode = fs::metadata(&file).map_or(0o644, |meta| meta.permissions().mode() & 0o777);
    let fresh = file.with_extension("skein-new");
    let written = fs::OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(mode)
        .open(&fresh)
        .and_then(|mut out| {
            out.write_all(after.as_bytes())?;
            out.sync_all()
        })
        .and_then(|()| fs::rename(&fresh, &file));
    match written {
        // In a container the file is a mount of its own: it can be written but not replaced.
        Err(error) if error.raw_os_error() == Some(Errno::BUSY.raw_os_error()) => {
            fs::remove_file(&fresh)?;
            fs::write(file, after)
        }
        other => other,
    }
}

/// Sites of one host write one after the other. The directory is what stays when the file is replaced. Not waited for: the controller has
/// other things to do and comes back.
fn lock(file: &Path) -> io::Result<fs::File> {
    let dir = file.parent().unwrap_or_else(|| Path::new("/"));
    let dir = fs::File::open(dir)?;
    rustix::fs::flock(&dir, FlockOperation::NonBlockingLockExclusive)?;
    Ok(dir)
}

fn with_block(before: &str, label: &str, block: &str) -> String {
    let (begin, end) = (format!("# begin skein {label}"), format!("# end skein {label}"));
    let mut out = String::new();
    let mut lines = before.lines();
    while let Some(line) = lines.next() {
        match line.trim_end() {
            text if text == begin => {
                let mut rest = lines.clone();
                let is_closed = rest
                    .by_ref()
                    .map(str::trim_end)
                    .take_while(|text| !text.starts_with("# begin skein "))
                    .any(|text| text == end);
                if is_closed {
                    lines = rest;
                }
                // Without an end nobody knows what is ours: the rest is somebody's.
            }
            text if text == end => {}
            _ => {
                out.push_str(line);
                out.push('\n');
            }
        }
    }
    if !block.is_empty() {
        out += &format!("{begin}\n{block}{end}\n");
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_block_changes() {
        let file = "127.0.0.1 localhost\n# begin skein other\n127.64.0.1 x\n# end skein other\n";
        let with = with_block(file, "default", "127.64.1.2 db\n");
        assert_eq!(
            with,
            format!("{file}# begin skein default\n127.64.1.2 db\n# end skein default\n")
        );
        assert_eq!(with_block(&with, "default", "127.64.1.2 db\n"), with);
        assert_eq!(with_block(&with, "default", ""), file);
    }

    #[test]
    fn a_block_without_an_end_takes_nothing_with_it() {
        let file = "# begin skein default\n127.64.1.2 db\n192.0.2.1 printer\n";
        let rest = "127.64.1.2 db\n192.0.2.1 printer\n";
        assert_eq!(with_block(file, "default", ""), rest);
        // The block of another site does not end it.
        let other = format!("{file}# begin skein b\n127.64.0.1 x\n# end skein b\n");
        assert_eq!(with_block(&other, "default", ""), other.replace("# begin skein default\n", ""));
        let other = format!("# begin skein default\n{file}# end skein default\n");
        assert_eq!(with_block(&other, "default", ""), "");
    }

    #[test]
    fn what_a_link_leads_to_is_written() {
        let dir = tempfile::tempdir().unwrap();
        let (file, link) = (dir.path().join("real"), dir.path().join("hosts"));
        fs::write(&file, "# begin skein a\n# end skein a\n").unwrap();
        std::os::unix::fs::symlink(&file, &link).unwrap();
        remove(&link, "a").unwrap();
        assert!(fs::symlink_metadata(&link).unwrap().is_symlink());
        assert_eq!(fs::read_to_string(&file).unwrap(), "");
        let held = lock(&file).unwrap();
        fs::write(&file, "# begin skein a\n# end skein a\n").unwrap();
        assert_eq!(remove(&link, "a").unwrap_err().kind(), io::ErrorKind::WouldBlock);
        drop(held);
        remove(&link, "a").unwrap();
    }

    #[test]
    fn the_file_is_rewritten_and_restored() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("hosts");
        fs::write(&file, "127.0.0.1 localhost\n").unwrap();
        let endpoint = skein_site_core::AutoEndpoint {
            ip: "127.64.1.2".parse().unwrap(),
            ports: Vec::new(),
            unused_since_unix_s: None,
        };
        let endpoints = AutoEndpoints::from([("db".parse().unwrap(), endpoint)]);
        update(&file, "default", &endpoints).unwrap();
        assert!(fs::read_to_string(&file).unwrap().contains("127.64.1.2 db\n"));
        remove(&file, "default").unwrap();
        assert_eq!(fs::read_to_string(&file).unwrap(), "127.0.0.1 localhost\n");
    }
}
