//! The opt-in block of local endpoints in `/etc/hosts`.
//!
//! Every member of the network says what its services are called, and what is written here goes before every other name service. So only
//! names are written that mean nothing anywhere else as far as is known, nor, when this host's resolver is asked, here; those this site's
//! owner chose are all written.

pub(crate) mod elsewhere;

use std::{
    collections::{BTreeMap, BTreeSet},
    fs, io,
    io::Write as _,
    net::IpAddr,
    os::unix::fs::{OpenOptionsExt as _, PermissionsExt as _},
    path::Path,
};

use rustix::{fs::FlockOperation, io::Errno};
use skein_core::Address;
use skein_site_core::AutoEndpoints;

/// Where resolvers look first.
pub(crate) const FILE: &str = "/etc/hosts";

/// Top-level domains of the public DNS with three or more letters, sorted; those with two are countries. Without `prod`, which is one: nobody
/// has a host there, and half the services of the world are called so.
const PUBLIC: &str = include_str!("hosts/public.txt");
/// Last labels of names that machines around this one may have: mDNS, private networks (RFC 6762 appendix G), clouds, clusters.
const PRIVATE: [&str; 11] = [
    "corp",
    "home",
    "internal",
    "intranet",
    "lan",
    "local",
    "localdomain",
    "localhost",
    "onion",
    "private",
    "svc",
];
/// First labels of names that programs look up by themselves and believe: proxy discovery, tunnels, what a cloud or cluster tells its
/// machines, credentials among it.
const MAGIC: [&str; 8] = [
    "broadcasthost",
    "instance-data",
    "isatap",
    "kubernetes",
    "localhost",
    "loopback",
    "metadata",
    "wpad",
];

/// Makes the block of the site called `label` say exactly `endpoints`; everything else in the file stays, and what it names is not named
/// again. Writes only if something differs.
///
/// # Errors
/// The file system's; the file is as before then.
pub(crate) fn update(file: &Path, label: &str, endpoints: &AutoEndpoints) -> io::Result<()> {
    rewrite(file, label, |before| {
        let named = named_elsewhere(before);
        let is_named = |address: &Address| named.contains(&address.as_str().to_ascii_lowercase());
        let fresh = endpoints.iter().filter(|(address, _)| !is_named(address));
        fresh.map(|(address, endpoint)| format!("{} {address}\n", endpoint.ip)).collect()
    })
}

/// Whether another site may name something on this host: a name without dots, or one under no domain that exists elsewhere. A public domain
/// younger than the list is let through.
pub(crate) fn may_be_named(address: &Address) -> bool {
    let name = address.as_str();
    if name.split('.').next().is_some_and(|first| MAGIC.contains(&first)) {
        return false;
    }
    let Some((_, last)) = name.rsplit_once('.') else { return true };
    let is_number = last.bytes().all(|byte| byte.is_ascii_digit());
    let is_public =
        last.len() <= 2 || last.starts_with("xn--") || PUBLIC.lines().any(|tld| tld == last);
    !is_number && !is_public && !PRIVATE.contains(&last)
}

/// What lines of others name, in lower case: other sites' blocks are not theirs, since two sites may well serve the same name.
fn named_elsewhere(hosts: &str) -> BTreeSet<String> {
    let others = lines(hosts).filter(|(is_ours, _)| !is_ours);
    let names = others.flat_map(|(_, entry)| entry.split_ascii_whitespace().skip(1));
    names.map(str::to_ascii_lowercase).collect()
}

/// What the blocks of sites on this host name.
fn blocks(hosts: &str) -> BTreeMap<String, IpAddr> {
    let ours = lines(hosts).filter(|(is_ours, _)| *is_ours);
    let names = ours.filter_map(|(_, entry)| {
        let mut words = entry.split_ascii_whitespace();
        let ip = words.next()?.parse().ok()?;
        Some((words.next()?.to_ascii_lowercase(), ip))
    });
    names.collect()
}

/// Lines without comments, and whether they are in the block of a site.
fn lines(hosts: &str) -> impl Iterator<Item = (bool, &str)> {
    let mut is_ours = false;
    hosts.lines().map(move |line| {
        if line.starts_with("# begin skein ") {
            is_ours = true;
        } else if line.starts_with("# end skein ") {
            is_ours = false;
        }
        (is_ours, line.split('#').next().unwrap_or_default())
    })
}

/// Takes the block of the site called `label` out.
///
/// # Errors
/// The file system's; the file is as before then.
pub(crate) fn remove(file: &Path, label: &str) -> io::Result<()> {
    rewrite(file, label, |_| String::new())
}

fn rewrite(file: &Path, label: &str, block: impl Fn(&str) -> String) -> io::Result<()> {
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
    if with_block(&before, label, &block(&before)) == before {
        return Ok(());
    }
    let _lock = lock(&file)?;
    // Another site may have written in between.
    let before = read()?;
    let after = with_block(&before, label, &block(&before));
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

    #[test]
    fn no_name_of_others_is_taken() {
        let may = |name: &str| may_be_named(&name.parse().unwrap());
        for name in ["db", "web.prod", "payments.metadata"] {
            assert!(may(name), "{name}");
        }
        for name in [
            "github.com",
            "web.dev",
            "a.b.co.uk",
            "metadata.google.internal",
            "printer.local",
            "wpad",
            "metadata",
            "instance-data",
            "kubernetes.default",
            "payments.svc",
            "x.xn--p1ai",
            "1.2.3.4",
        ] {
            assert!(!may(name), "{name}");
        }
        assert!(PUBLIC.lines().is_sorted() && PUBLIC.lines().count() > 1_000);

        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("hosts");
        let others =
            "192.0.2.1 printer.x Printer # old\n# begin skein b\n127.64.0.1 db\n# end skein b\n";
        fs::write(&file, others).unwrap();
        let endpoint = skein_site_core::AutoEndpoint {
            ip: "127.64.1.2".parse().unwrap(),
            ports: Vec::new(),
            unused_since_unix_s: None,
        };
        let named = ["db", "old", "printer"].map(|name| (name.parse().unwrap(), endpoint.clone()));
        for _ in 0..2 {
            update(&file, "a", &named.clone().into()).unwrap();
            let block = "# begin skein a\n127.64.1.2 db\n127.64.1.2 old\n# end skein a\n";
            assert_eq!(fs::read_to_string(&file).unwrap(), format!("{others}{block}"));
        }
    }
}
