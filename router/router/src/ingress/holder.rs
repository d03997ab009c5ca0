//! Who holds a port: the hint beside "address already in use".

use std::{fs, path::Path};

/// Listening, in the `st` column of `/proc/net/tcp`.
const STATE_LISTEN: &str = "0A";

/// The process that listens on TCP `port`, as `name (pid)`; `None` when it cannot be found, e.g. because it is another user's.
///
/// Reads `/proc` and so may take milliseconds: not for the data path.
pub(super) fn holder(port: u16) -> Option<String> {
    let inodes: Vec<String> = ["/proc/net/tcp", "/proc/net/tcp6"]
        .iter()
        .filter_map(|table| fs::read_to_string(table).ok())
        .flat_map(|table| listening_inodes(&table, port))
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
fn listening_inodes(table: &str, port: u16) -> Vec<String> {
    let suffix = format!(":{port:04X}");
    let lines = table.lines().skip(1).map(|line| line.split_whitespace().collect::<Vec<_>>());
    lines
        .filter(|columns| {
            columns.get(1).is_some_and(|local| local.ends_with(&suffix))
                && columns.get(3) == Some(&STATE_LISTEN)
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
        let holder = holder(port).unwrap();
        assert!(holder.ends_with(&format!("(pid {})", std::process::id())), "{holder}");
    }

    #[test]
    fn only_listening_sockets_of_the_port_count() {
        let table = "  sl  local_address rem_address   st tx rx tr tm retr uid timeout inode\n\
            0: 0100007F:1F90 00000000:0000 0A 0:0 0:0 0 1000 0 111 1\n\
            1: 0100007F:1F90 0100007F:0050 01 0:0 0:0 0 1000 0 222 1\n\
            2: 0100007F:1F91 00000000:0000 0A 0:0 0:0 0 1000 0 333 1\n\
            3: short";
        assert_eq!(listening_inodes(table, 8080), ["111"]);
        assert_eq!(listening_inodes(table, 8081), ["333"]);
        assert!(listening_inodes(table, 8082).is_empty());
        assert!(listening_inodes("", 8080).is_empty());
    }
}
