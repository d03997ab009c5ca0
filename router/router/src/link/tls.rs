//! The outer TLS connection of a link over TCP, at both ends.

use super::{Inner, port::ServedPort, prompt::Prompt};
use crate::{
    carrier::Through,
    net::{self, TcpStream},
};
use rustls::{AlertDescription, ServerConfig, server::Accepted};
use rustls_pki_types::ServerName;
use skein_core::SiteId;
use skein_proxy::{Proxy, Tunnel, TunnelError, Url};
use skein_trust::{ALPN_CARRIER, Dial, PeerError, SERVER_NAME};
use std::{io, net::SocketAddr, sync::Arc, time::Duration};
use tokio::{
    io::{AsyncRead, AsyncWrite, BufReader},
    time,
};
use tokio_rustls::{TlsConnector, TlsStream, server::StartHandshake};

/// For a TCP connection, and again for the TLS handshake on it.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(3);
/// Addresses of a proxy that are tried, one after the other.
const PROXY_ADDRESSES_MAX: usize = 3;
/// TLS records wait for the kernel up to this size, which is one record: what is behind them can still be overtaken.
const UNSENT_BYTES_MAX: usize = 16 << 10;
/// Read from the kernel at a time; the TLS library by itself asks for a few KiB.
const READ_BYTES: usize = 32 << 10;

/// A connection that carries datagrams.
type Stream<S> = TlsStream<BufReader<S>>;

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
    #[error("the proxy {0} does not resolve: {1}")]
    Resolve(Url, io::Error),
    #[error("through {0}: {1}")]
    Proxy(Url, TunnelError),
}

/// How an endpoint is reached.
pub(super) enum Way {
    /// At one of its addresses.
    Direct(SocketAddr),
    /// By name, which the proxy resolves.
    Through(Arc<Proxy>),
}

/// Connects to a router of `site` at `endpoint`; says as well which address the connection is to.
///
/// # Cancel safety
/// Cancelled, the connection is closed.
pub(super) async fn connect(
    inner: &Inner,
    endpoint: &str,
    way: Way,
    site: SiteId,
) -> Result<(Arc<ServedPort>, SocketAddr), TlsError> {
    let name = server_name(endpoint);
    let dial = inner.tls.carrier_client(site);
    match way {
        Way::Direct(addr) => {
            let tcp = tcp(addr).await?;
            let addresses = (tcp.local_addr().map_err(|e| TlsError::Connect(addr, e))?, addr);
            let stream = handshake(tcp, addr, name, dial).await?;
            Ok((ServedPort::tls(inner, stream, addresses, None), addr))
        }
        Way::Through(proxy) => {
            let (stream, addresses) = through(&proxy, endpoint).await?;
            let stream = handshake(stream, addresses.1, name, dial).await?;
            let through = Through { endpoint: endpoint.to_owned(), proxy: proxy.url.to_string() };
            Ok((ServedPort::tls(inner, stream, addresses, Some(through)), addresses.1))
        }
    }
}

/// For `doctor`: whether a Skein router answers there.
///
/// # Cancel safety
/// Cancelled, the connection is closed.
pub(super) async fn probe(inner: &Inner, endpoint: &str, way: Way) -> Result<(), TlsError> {
    let dial = skein_trust::carrier_probe_client(Arc::clone(&inner.time));
    let name = server_name(endpoint);
    match way {
        Way::Direct(addr) => handshake(tcp(addr).await?, addr, name, dial).await.map(drop),
        Way::Through(proxy) => {
            let (stream, (_, addr)) = through(&proxy, endpoint).await?;
            handshake(stream, addr, name, dial).await.map(drop)
        }
    }
}

/// A tunnel to `endpoint`, with its addresses as far as this host sees them.
async fn through(
    proxy: &Proxy,
    endpoint: &str,
) -> Result<(Tunnel<Prompt>, (SocketAddr, SocketAddr)), TlsError> {
    let unresolved = |error| TlsError::Resolve(proxy.url.clone(), error);
    let host = proxy.url.endpoint();
    let resolving = time::timeout(CONNECT_TIMEOUT, net::resolve(&host));
    let resolved = resolving.await.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()));
    let mut last = unresolved(io::Error::new(io::ErrorKind::NotFound, "no address"));
    for addr in resolved.map_err(unresolved)?.into_iter().take(PROXY_ADDRESSES_MAX) {
        match tcp(addr).await {
            Ok(stream) => {
                let local = stream.local_addr().map_err(|error| TlsError::Connect(addr, error))?;
                let tunnel = proxy.tunnel(stream, endpoint).await;
                let tunnel = tunnel.map_err(|error| TlsError::Proxy(proxy.url.clone(), error))?;
                return Ok((tunnel, (local, addr)));
            }
            Err(error) => last = error,
        }
    }
    Err(last)
}

async fn tcp(addr: SocketAddr) -> Result<Prompt, TlsError> {
    let failed = |error| TlsError::Connect(addr, error);
    let connected = time::timeout(CONNECT_TIMEOUT, net::tcp_connect(addr, None)).await;
    let stream = connected.map_err(|_| TlsError::Unanswered(addr))?.map_err(failed)?;
    net::tcp_carrier_options(&stream).map_err(failed)?;
    Ok(Prompt::new(stream))
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
    let stream = BufReader::with_capacity(READ_BYTES, Prompt::new(stream));
    let mut stream = StartHandshake::from_parts(hello, stream).into_stream(config).await?;
    stream.get_mut().1.set_buffer_limit(Some(UNSENT_BYTES_MAX));
    Ok(ServedPort::tls(inner, Stream::from(stream), addresses, None))
}

async fn handshake<S: AsyncRead + AsyncWrite + Unpin>(
    stream: S,
    addr: SocketAddr,
    name: Option<ServerName<'static>>,
    dial: Dial,
) -> Result<Stream<S>, TlsError> {
    let dial = if name.is_some() { dial.naming_server() } else { dial };
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
    Ok(stream.into())
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
