//! Where sockets are made.

use std::net::SocketAddr;

use anyhow::{Context as _, Result};
use tokio::net::{TcpListener, TcpStream, UdpSocket};

#[allow(clippy::disallowed_methods, reason = "the one place that makes sockets")]
pub(crate) async fn connect(address: SocketAddr) -> std::io::Result<TcpStream> {
    let stream = TcpStream::connect(address).await?;
    stream.set_nodelay(true)?;
    Ok(stream)
}

/// Listens, and says so on stdout for whoever waits for it.
#[allow(clippy::disallowed_methods, reason = "the one place that makes sockets")]
pub(crate) async fn listen(address: SocketAddr) -> Result<TcpListener> {
    let listener = TcpListener::bind(address).await.with_context(|| format!("bind {address}"))?;
    let actual = listener.local_addr()?;
    crate::print(&serde_json::json!({ "listening": actual.to_string() }));
    Ok(listener)
}

/// Asked for in each direction, so that bursts of the largest datagrams are not lost here.
const DATAGRAM_BUFFER_BYTES: usize = 8 << 20;

#[allow(clippy::disallowed_methods, reason = "the one place that makes sockets")]
pub(crate) async fn datagrams(address: SocketAddr) -> Result<UdpSocket> {
    let socket = UdpSocket::bind(address).await.with_context(|| format!("bind {address}"))?;
    let options = socket2::SockRef::from(&socket);
    // The kernel grants what it likes.
    let _ = options.set_recv_buffer_size(DATAGRAM_BUFFER_BYTES);
    let _ = options.set_send_buffer_size(DATAGRAM_BUFFER_BYTES);
    Ok(socket)
}

/// A socket that hears `address` alone.
pub(crate) async fn datagrams_to(address: SocketAddr) -> Result<UdpSocket> {
    let any = if address.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
    let socket = datagrams(any.parse()?).await?;
    socket.connect(address).await?;
    Ok(socket)
}

/// Makes the coming drop of the socket a reset.
pub(crate) fn reset_on_drop(stream: &TcpStream) -> std::io::Result<()> {
    socket2::SockRef::from(stream).set_linger(Some(std::time::Duration::ZERO))
}

/// The time all programs of a machine share.
pub(crate) fn unix_ms() -> u128 {
    std::time::SystemTime::UNIX_EPOCH.elapsed().unwrap_or_default().as_millis()
}

/// Completes when this process is told to stop.
pub(crate) async fn stopped() -> Result<()> {
    use tokio::signal::unix::{SignalKind, signal};
    signal(SignalKind::terminate())?.recv().await;
    Ok(())
}
