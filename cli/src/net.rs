//! The only place that makes sockets.

use std::{io, net::SocketAddr, path::Path};

use tokio::net::{TcpListener, TcpStream, UnixStream};

/// Connects to a Unix socket.
pub(crate) async fn connect_unix(path: &Path) -> io::Result<UnixStream> {
    UnixStream::connect(path).await
}

/// Connects to a TCP endpoint.
#[expect(clippy::disallowed_methods, reason = "this is the one place")]
pub(crate) async fn connect_tcp(addr: SocketAddr) -> io::Result<TcpStream> {
    TcpStream::connect(addr).await
}

/// Listens on a free loopback port.
#[expect(clippy::disallowed_methods, reason = "this is the one place")]
pub(crate) async fn listen_loopback() -> io::Result<TcpListener> {
    TcpListener::bind((std::net::Ipv4Addr::LOCALHOST, 0)).await
}
