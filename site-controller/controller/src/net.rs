//! The only place in this crate that makes sockets.

use std::{
    future::poll_fn,
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket},
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};

use socket2::{Domain, Protocol, Socket, Type};
use tokio::{
    net::{TcpStream, UnixListener, UnixStream},
    time::{Interval, MissedTickBehavior},
};
use tokio_stream::Stream;

use crate::paths::Paths;

/// Ports tried from the wanted one upwards before giving up.
const PORTS_TRIED: u16 = 100;

/// How often a Unix socket is looked for.
const SOCKET_CHECK: Duration = Duration::from_secs(1);

/// Listens on a Unix socket that only this user can reach. A socket left by a process that is gone is replaced; the caller holds the lock
/// that says there is no other.
fn listen_unix(path: &Path) -> io::Result<UnixListener> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let listener = UnixListener::bind(path)?;
    // The directory is private already; this is for whoever moves it.
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))?;
    Ok(listener)
}

/// Connections to a Unix socket that is made anew when somebody removed it: `/tmp` is swept, a directory is moved and restored.
#[derive(Debug)]
pub(crate) struct Acceptor {
    paths: Paths,
    path: PathBuf,
    listener: UnixListener,
    check: Interval,
    is_gone: bool,
}

impl Acceptor {
    /// Listens at `path`, which is in the runtime directory of `paths`; must be called inside the runtime.
    pub(crate) fn open(paths: &Paths, path: PathBuf) -> io::Result<Self> {
        let listener = listen_unix(&path)?;
        let mut check = tokio::time::interval(SOCKET_CHECK);
        check.set_missed_tick_behavior(MissedTickBehavior::Delay);
        Ok(Self { paths: paths.clone(), path, listener, check, is_gone: false })
    }

    /// The next connection.
    ///
    /// # Cancel safety
    /// No connection is lost when the future is dropped.
    pub(crate) async fn accept(&mut self) -> io::Result<UnixStream> {
        poll_fn(|cx| self.poll_accept(cx)).await
    }

    fn poll_accept(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<UnixStream>> {
        while self.check.poll_tick(cx).is_ready() {
            self.restore();
        }
        self.listener.poll_accept(cx).map_ok(|(stream, _)| stream)
    }

    fn restore(&mut self) {
        match std::fs::symlink_metadata(&self.path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            _ => return,
        }
        let directory = self.paths.create_runtime().map_err(io::Error::other);
        match directory.and_then(|()| listen_unix(&self.path)) {
            Ok(listener) => {
                self.listener = listener;
                self.is_gone = false;
                tracing::warn!(socket = %self.path.display(), "somebody removed the socket; it is back");
            }
            Err(error) if !self.is_gone => {
                self.is_gone = true;
                tracing::error!(%error, socket = %self.path.display(), "the socket is gone and cannot be made");
            }
            Err(_) => {}
        }
    }
}

impl Stream for Acceptor {
    type Item = io::Result<UnixStream>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.poll_accept(cx).map(Some)
    }
}

/// Connects to one address within `timeout`.
///
/// # Cancel safety
/// Dropping it closes the socket.
#[expect(clippy::disallowed_methods, reason = "this is the maker of sockets")]
pub(crate) async fn connect_tcp(addr: SocketAddr, timeout: Duration) -> io::Result<TcpStream> {
    let stream = tokio::time::timeout(timeout, TcpStream::connect(addr))
        .await
        .map_err(|_| io::Error::from(io::ErrorKind::TimedOut))??;
    stream.set_nodelay(true)?;
    Ok(stream)
}

/// A UDP socket of the family of `peer`, on any port, for one QUIC connection to it.
pub(crate) fn udp_towards(peer: SocketAddr) -> io::Result<UdpSocket> {
    let any = match peer {
        SocketAddr::V4(_) => IpAddr::V4(Ipv4Addr::UNSPECIFIED),
        SocketAddr::V6(_) => IpAddr::V6(Ipv6Addr::UNSPECIFIED),
    };
    UdpSocket::bind((any, 0))
}

/// Whether this host has IPv6 at all.
pub(crate) fn has_ipv6() -> bool {
    UdpSocket::bind((Ipv6Addr::LOCALHOST, 0)).is_ok()
}

/// What stands for `wanted` on a host that may have no IPv6: every address is every one that there is.
pub(crate) fn without_ipv6(wanted: SocketAddr, has_ipv6: bool) -> SocketAddr {
    match wanted.ip() {
        IpAddr::V6(Ipv6Addr::UNSPECIFIED) if !has_ipv6 => {
            (Ipv4Addr::UNSPECIFIED, wanted.port()).into()
        }
        _ => wanted,
    }
}

/// `wanted`, or the next port above it that is free for both UDP and TCP. Port 0 means any.
pub(crate) fn free_port(wanted: SocketAddr) -> io::Result<SocketAddr> {
    let mut last = io::Error::from(io::ErrorKind::AddrInUse);
    for step in 0..PORTS_TRIED {
        let port = match wanted.port() {
            0 => 0,
            port => match port.checked_add(step) {
                Some(port) => port,
                None => break,
            },
        };
        match probe(SocketAddr::new(wanted.ip(), port)) {
            Ok(bound) => return Ok(bound),
            Err(error) if error.kind() == io::ErrorKind::AddrInUse => last = error,
            Err(error) => return Err(error),
        }
    }
    Err(last)
}

/// Binds TCP, then UDP on the same port, and lets go of both.
fn probe(addr: SocketAddr) -> io::Result<SocketAddr> {
    let tcp = bound(addr, Type::STREAM, Protocol::TCP)?;
    tcp.listen(1)?;
    let chosen = tcp.local_addr()?.as_socket().unwrap_or(addr);
    bound(chosen, Type::DGRAM, Protocol::UDP)?;
    Ok(chosen)
}

fn bound(addr: SocketAddr, kind: Type, protocol: Protocol) -> io::Result<Socket> {
    let socket = Socket::new(Domain::for_address(addr), kind, Some(protocol))?;
    if addr.is_ipv6() {
        socket.set_only_v6(false)?;
    }
    if kind == Type::STREAM {
        // As the router does: connections of an earlier process in TIME_WAIT are no obstacle.
        socket.set_reuse_address(true)?;
    }
    socket.bind(&addr.into())?;
    Ok(socket)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_socket_that_was_removed_is_made_anew() {
        let (_dir, paths) = crate::store::tests::site();
        let mut acceptor = Acceptor::open(&paths, paths.site_socket()).unwrap();
        std::fs::remove_dir_all(paths.runtime()).unwrap();
        let connected = async {
            loop {
                tokio::time::sleep(SOCKET_CHECK).await;
                if let Ok(stream) = UnixStream::connect(paths.site_socket()).await {
                    return stream;
                }
            }
        };
        let (accepted, _client) = tokio::join!(acceptor.accept(), connected);
        accepted.unwrap();
    }

    #[test]
    fn without_ipv6_every_address_is_every_ipv4_address() {
        for (wanted, has_ipv6, taken) in [
            ("[::]:7500", true, "[::]:7500"),
            ("[::]:7500", false, "0.0.0.0:7500"),
            ("[2001:db8::1]:7500", false, "[2001:db8::1]:7500"),
            ("192.0.2.1:0", false, "192.0.2.1:0"),
        ] {
            assert_eq!(without_ipv6(wanted.parse().unwrap(), has_ipv6).to_string(), taken);
        }
    }

    #[test]
    fn a_taken_port_is_passed_over() {
        let loopback = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
        let any = free_port(loopback).unwrap();
        let holder = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let taken = holder.local_addr().unwrap();
        assert_ne!(any.port(), 0);
        assert!(free_port(taken).unwrap().port() > taken.port());
    }
}
