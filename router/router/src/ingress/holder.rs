//! Who holds a port: the hint beside "address already in use".

use skein_core::Protocol;
use std::{fs, path::Path};

/// Listening, in the `st` column of `/proc/net/tcp`.
const STATE_LISTEN: &str = "0A";

/// Of a UDP socket without a peer, which is as good.
const STATE_UNCONNECTED: &str = "07";

/// The process that listens on `port`, as `name (pid)`; `None` when it cannot be found, e.g. because it is another user's.
///
/// Reads `/proc` and so may take milliseconds: not for the data path.
pub(super) fn holder(protocol: Protocol, port: u16) -> Option<String> {
    let (tables, state) = match protocol {
        Protocol::Tcp => (["/proc/net/tcp", "/proc/net/tcp6"], STATE_LISTEN),
        Protocol::Udp => (["/proc/net/udp", "/proc/net/udp6"], STATE_UNCONNECTED),
    };
    let inodes: Vec<String> = tables
        .iter()
        .filter_map(|table| fs::read_to_string(table).ok())
        .flat_map(|table| listening_inodes(&table, port, state))
        .collect();
    let sockets: Vec<String> = inodes.iter().map(|inode| format!("socket:[{inode}]")).collect();
    let processes = fs::read_dir("/proc").ok()?.filter_map(Result::ok);
    processes.map(|process| process.path()).find_map(|process| {
        let pid: u32 = process.file_name()?.to_str()?.parse().ok()?;
        holds(&process, &sockets).then(|| {
            let name = fs::read_to_string(process.join("comm")).unwrap_or_default();
            format!("{} (pid {pid})", name.trim())
        })
    })
}

/// Inodes of the sockets that listen on `port`, from a table in the format of `/proc/net/tcp`.
fn listening_inodes(table: &str, port: u16, state: &str) -> Vec<String> {
    let suffix = format!(":{port:04X}");
    let lines = table.lines().skip(1).map(|line| line.split_whitespace().collect::<Vec<_>>());
    lines
        .filter(|columns| {
            columns.get(1).is_some_and(|local| local.ends_with(&suffix))
                && columns.get(3) == Some(&state)
        })
        .filter_map(|columns| columns.get(9).map(ToString::to_string))
        .collect()
}

fn holds(process: &Path, sockets: &[String]) -> bool {
    let Ok(descriptors) = fs::read_dir(process.join("fd")) else { return false };
    descriptors.filter_map(Result::ok).any(|descriptor| {
        fs::read_link(descriptor.path())
            .is_ok_and(|target| sockets.iter().any(|socket| target.as_os_str() == socket.as_str()))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn finds_this_process() {
        let listener = crate::net::tcp_listen("127.0.0.1:0".parse().unwrap()).unwrap();
        let port = listener.local_addr().unwrap().port();
        let ours = |holder: String| holder.ends_with(&format!("(pid {})", std::process::id()));
        assert!(holder(Protocol::Tcp, port).is_some_and(ours));
        let socket = crate::net::udp_bind("127.0.0.1:0".parse().unwrap()).unwrap();
        let port = socket.local_addr().unwrap().port();
        assert!(holder(Protocol::Udp, port).is_some_and(ours));
    }

    #[test]
    fn only_listening_sockets_of_the_port_count() {
        let table = "  sl  local_address rem_address   st tx rx tr tm retr uid timeout inode\n\
            0: 0100007F:1F90 00000000:0000 0A 0:0 0:0 0 1000 0 111 1\n\
            1: 0100007F:1F90 0100007F:0050 01 0:0 0:0 0 1000 0 222 1\n\
            2: 0100007F:1F91 00000000:0000 0A 0:0 0:0 0 1000 0 333 1\n\
            3: short";
        assert_eq!(listening_inodes(table, 8080, STATE_LISTEN), ["111"]);
        assert_eq!(listening_inodes(table, 8081, STATE_LISTEN), ["333"]);
        assert!(listening_inodes(table, 8082, STATE_LISTEN).is_empty());
        assert!(listening_inodes("", 8080, STATE_LISTEN).is_empty());
    }
}
