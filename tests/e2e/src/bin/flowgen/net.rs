//! Where sockets are made.

use std::net::SocketAddr;

use anyhow::{Context as _, Result};
use tokio::net::{TcpListener, TcpStream};

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

/// Makes the coming drop of the socket a reset.
pub(crate) fn reset_on_drop(stream: &TcpStream) -> std::io::Result<()> {
    socket2::SockRef::from(stream).set_linger(Some(std::time::Duration::ZERO))
}

/// Completes when this process is told to stop.
pub(crate) async fn stopped() -> Result<()> {
    use tokio::signal::unix::{SignalKind, signal};
    signal(SignalKind::terminate())?.recv().await;
    Ok(())
}
