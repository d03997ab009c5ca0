//! The outer TLS connection of a link over TCP, at both ends.

use super::{Inner, port::ServedPort};
use crate::net;
use rustls::{AlertDescription, ServerConfig, server::Accepted};
use rustls_pki_types::ServerName;
use skein_core::SiteId;
use skein_trust::{ALPN_CARRIER, Dial, PeerError, SERVER_NAME};
use std::{io, net::SocketAddr, sync::Arc, time::Duration};
use tokio::{io::BufReader, net::TcpStream, time};
use tokio_rustls::{TlsConnector, TlsStream, server::StartHandshake};

/// For a TCP connection, and again for the TLS handshake on it.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(3);
/// TLS records wait for the kernel up to this size, which is one record: what is behind them can still be overtaken.
const UNSENT_BYTES_MAX: usize = 16 << 10;
/// Read from the kernel at a time; the TLS library by itself asks for a few KiB.
const READ_BYTES: usize = 64 << 10;

/// A connection that carries datagrams.
type Stream = TlsStream<BufReader<TcpStream>>;

/// Why there is no TLS connection, in words for people.
#[derive(Debug, thiserror::Error)]
pub(super) enum TlsError {
    #[error("TCP to {0} unanswered")]
    Unanswered(SocketAddr),
    #[error("TCP to {0}: {1}")]
    Connect(SocketAddr, io::Error),
    #[error("{0} accepts TCP connections, but does not answer TLS")]
    Silent(SocketAddr),
    #[error(
        "what listens at {0} over TCP does not speak TLS: a web server or a proxy, or something in between answers instead"
    )]
    NotTls(SocketAddr),
    #[error("TLS to {0}: {1}")]
    Certificate(SocketAddr, PeerError),
    #[error(
        "{0} does not take links over TLS: another program, or a version of Skein without that"
    )]
    Protocol(SocketAddr),
    #[error("{0} closes TLS connections")]
    Closed(SocketAddr),
    #[error("TLS to {0}: {1}")]
    Handshake(SocketAddr, io::Error),
}

/// Connects to a router of `site` at `addr`, which is one of `endpoint`'s addresses.
///
/// # Cancel safety
/// Cancelled, the connection is closed.
pub(super) async fn connect(
    inner: &Inner,
    endpoint: &str,
    addr: SocketAddr,
    site: SiteId,
) -> Result<Arc<ServedPort>, TlsError> {
    let name = server_name(endpoint);
    let dial = inner.tls.carrier_client(site, name.is_some());
    let (stream, addresses) = handshake(addr, name, dial).await?;
    Ok(ServedPort::tls(inner, stream, addresses))
}

/// For `doctor`: whether a Skein router answers there.
///
/// # Cancel safety
/// Cancelled, the connection is closed.
pub(super) async fn probe(inner: &Inner, endpoint: &str, addr: SocketAddr) -> Result<(), TlsError> {
    let dial = skein_trust::carrier_probe_client(Arc::clone(&inner.time));
    handshake(addr, server_name(endpoint), dial).await.map(drop)
}

/// Completes the handshake of a client that wants to link.
///
/// # Errors
/// Whatever the connection says.
///
/// # Cancel safety
/// Cancelled, the connection is closed.
pub(super) async fn accept(
    inner: &Inner,
    hello: Accepted,
    stream: TcpStream,
    config: Arc<ServerConfig>,
) -> io::Result<Arc<ServedPort>> {
    net::tcp_carrier_options(&stream)?;
    let addresses = (stream.local_addr()?, stream.peer_addr()?);
    let stream = BufReader::with_capacity(READ_BYTES, stream);
    let mut stream = StartHandshake::from_parts(hello, stream).into_stream(config).await?;
    stream.get_mut().1.set_buffer_limit(Some(UNSENT_BYTES_MAX));
    Ok(ServedPort::tls(inner, Stream::from(stream), addresses))
}

async fn handshake(
    addr: SocketAddr,
    name: Option<ServerName<'static>>,
    dial: Dial,
) -> Result<(Stream, (SocketAddr, SocketAddr)), TlsError> {
    let connected = time::timeout(CONNECT_TIMEOUT, net::tcp_connect(addr, None)).await;
    let failed = |error| TlsError::Connect(addr, error);
    let stream = connected.map_err(|_| TlsError::Unanswered(addr))?.map_err(failed)?;
    net::tcp_carrier_options(&stream).map_err(failed)?;
    let addresses = (stream.local_addr().map_err(failed)?, addr);
    let unnamed = || ServerName::try_from(SERVER_NAME).expect("invariant: it is a name");
    let connecting = TlsConnector::from(Arc::clone(&dial.config))
        .connect(name.unwrap_or_else(unnamed), BufReader::with_capacity(READ_BYTES, stream));
    let mut stream = time::timeout(CONNECT_TIMEOUT, connecting)
        .await
        .map_err(|_| TlsError::Silent(addr))?
        .map_err(|error| explained(addr, &dial, error))?;
    let session = stream.get_mut().1;
    if session.alpn_protocol() != Some(ALPN_CARRIER) {
        return Err(TlsError::Protocol(addr));
    }
    session.set_buffer_limit(Some(UNSENT_BYTES_MAX));
    Ok((Stream::from(stream), addresses))
}

/// Why a handshake failed, as far as it shows who is there.
fn explained(addr: SocketAddr, dial: &Dial, error: io::Error) -> TlsError {
    if let Some(refusal) = dial.refusal() {
        return TlsError::Certificate(addr, refusal.clone());
    }
    let tls = error.get_ref().and_then(|inner| inner.downcast_ref::<rustls::Error>());
    match tls {
        Some(rustls::Error::InvalidMessage(_)) => TlsError::NotTls(addr),
        Some(
            rustls::Error::AlertReceived(
                AlertDescription::NoApplicationProtocol
                | AlertDescription::ProtocolVersion
                | AlertDescription::HandshakeFailure,
            )
            | rustls::Error::PeerIncompatible(_),
        ) => TlsError::Protocol(addr),
        Some(_) => TlsError::Handshake(addr, error),
        None if matches!(
            error.kind(),
            io::ErrorKind::UnexpectedEof | io::ErrorKind::ConnectionReset
        ) =>
        {
            TlsError::Closed(addr)
        }
        None => TlsError::Handshake(addr, error),
    }
}

/// The host of an endpoint, if it is a name: balancers that pass TLS through route by it.
fn server_name(endpoint: &str) -> Option<ServerName<'static>> {
    let (host, _) = endpoint.rsplit_once(':')?;
    let name = ServerName::try_from(host.to_owned()).ok()?;
    matches!(name, ServerName::DnsName(_)).then_some(name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_sent_and_addresses_are_not() {
        assert!(server_name("hub.example:7443").is_some());
        for endpoint in ["192.0.2.1:7443", "[2001:db8::1]:7443", "2001:db8::1", ""] {
            assert_eq!(server_name(endpoint), None, "{endpoint}");
        }
    }
}
