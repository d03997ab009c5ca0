//! The opt-in block of local endpoints in `/etc/hosts`.

use std::{
    fs, io,
    io::Write as _,
    os::unix::fs::{OpenOptionsExt as _, PermissionsExt as _},
    path::Path,
};

use skein_site_core::AutoEndpoints;

/// Where resolvers look first.
pub(crate) const FILE: &str = "/etc/hosts";

/// Makes the block of `namespace` say exactly `endpoints`; everything else in the file stays. Writes only if something differs.
///
/// # Errors
/// The file system's; the file is as before then.
pub(crate) fn update(file: &Path, namespace: &str, endpoints: &AutoEndpoints) -> io::Result<()> {
    let mut block = String::new();
    for (address, endpoint) in endpoints {
        block += &format!("{} {address}\n", endpoint.ip);
    }
    rewrite(file, namespace, &block)
}

/// Takes the block of `namespace` out.
///
/// # Errors
/// The file system's; the file is as before then.
pub(crate) fn remove(file: &Path, namespace: &str) -> io::Result<()> {
    rewrite(file, namespace, "")
}

fn rewrite(file: &Path, namespace: &str, block: &str) -> io::Result<()> {
    let before = match fs::read_to_string(file) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => String::new(),
        read => read?,
    };
    let after = with_block(&before, namespace, block);
    if after == before {
        return Ok(());
    }
    let mode = fs::metadata(file).map_or(0o644, |meta| meta.permissions().mode() & 0o777);
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
        .and_then(|()| fs::rename(&fresh, file));
    match written {
        // In a container the file is a mount of its own: it can be written but not replaced.
        Err(error) if error.raw_os_error() == Some(rustix::io::Errno::BUSY.raw_os_error()) => {
            fs::remove_file(&fresh)?;
            fs::write(file, after)
        }
        other => other,
    }
}

fn with_block(before: &str, namespace: &str, block: &str) -> String {
    let (begin, end) = (format!("# begin skein {namespace}"), format!("# end skein {namespace}"));
    let mut out = String::new();
    let mut inside = false;
    for line in before.lines() {
        match line.trim_end() {
            text if text == begin => inside = true,
            text if text == end => inside = false,
            _ if inside => {}
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
    fn the_file_is_rewritten_and_restored() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("hosts");
        fs::write(&file, "127.0.0.1 localhost\n").unwrap();
        let endpoint =
            skein_site_core::AutoEndpoint { ip: "127.64.1.2".parse().unwrap(), ports: Vec::new() };
        let endpoints = AutoEndpoints::from([("db".parse().unwrap(), endpoint)]);
        update(&file, "default", &endpoints).unwrap();
        assert!(fs::read_to_string(&file).unwrap().contains("127.64.1.2 db\n"));
        remove(&file, "default").unwrap();
        assert_eq!(fs::read_to_string(&file).unwrap(), "127.0.0.1 localhost\n");
    }
}
