//! TCP on the router's port: claims and the outer TLS connections of links, told apart by the protocol their handshake offers. Claims
//! are not decrypted here.

use super::{
    Claim, Inner, LinkEvent,
    accept::{FIRST_BYTE_TIMEOUT, PREAUTH_TIMEOUT, greet},
    established::Established,
    hello::{self, HelloError, REFUSED},
    tls, transport,
};
use crate::{
    gate::Gate,
    net::{TcpListener, TcpStream},
};
use quinn::{ConnectionError, crypto::rustls::NoInitialCipherSuite};
use rustls::server::Accepted;
use skein_trust::{ALPN_CARRIER, ALPN_CLAIM};
use std::{io, net::SocketAddr, sync::Arc, time::Duration};
use tokio::{io::AsyncReadExt as _, time};
use tokio_util::sync::CancellationToken;

/// Connections at a time that have not shown what they want, or not completed the handshake of a link.
const PREAUTH_MAX: usize = 256;
const PER_SOURCE_MAX: usize = 32;
/// Longest beginning of a TLS handshake; post-quantum ones take 2 KiB.
const HEAD_BYTES_MAX: usize = 64 << 10;
/// Read at a time.
const READ_BYTES: usize = 4 << 10;
/// After `accept` failed, for want of file descriptors or memory.
const PAUSE: Duration = Duration::from_millis(100);

/// What the connections to one listening address need.
pub(super) struct Door {
    inner: Arc<Inner>,
    outer: Arc<rustls::ServerConfig>,
    hop: quinn::ServerConfig,
    gate: Arc<Gate>,
    stop: CancellationToken,
}

/// What a connection is for.
enum Decided {
    /// To be passed on as it is, from its first byte.
    Claim {
        stream: TcpStream,
        head: Vec<u8>,
    },
    Link {
        stream: TcpStream,
        hello: Box<Accepted>,
    },
}

/// Why a connection did not become a link.
#[derive(Debug, thiserror::Error)]
enum TcpError {
    #[error("{0}")]
    Io(#[from] io::Error),
    #[error("{0}")]
    Connection(#[from] ConnectionError),
    #[error("{0}")]
    Hello(#[from] HelloError),
    #[error("it takes too long, or others wait for its room")]
    Timeout,
}

impl Door {
    pub(super) fn new(
        inner: &Arc<Inner>,
        stop: &CancellationToken,
    ) -> Result<Self, NoInitialCipherSuite> {
        Ok(Self {
            inner: Arc::clone(inner),
            outer: inner.tls.carrier_server(),
            hop: transport::server(inner.tls.link_server())?,
            gate: Gate::new(PREAUTH_MAX, PER_SOURCE_MAX),
            stop: stop.clone(),
        })
    }

    /// Accepts for ever.
    pub(super) async fn accept(self: Arc<Self>, listener: TcpListener) {
        loop {
            match listener.accept().await {
                Ok((stream, remote)) => {
                    let door = Arc::clone(&self);
                    // Owned by the tracker; ends by itself or through `stop`.
                    drop(self.inner.spawn(async move { door.serve(stream, remote).await }));
                }
                Err(error) => {
                    tracing::debug!(%error, "accept failed");
                    time::sleep(PAUSE).await;
                }
            }
        }
    }

    /// One connection from its first byte to its end.
    async fn serve(&self, stream: TcpStream, remote: SocketAddr) {
        let slot = self.gate.enter(remote.ip());
        let admitted = async {
            let limit = |_| TcpError::Timeout;
            match time::timeout(PREAUTH_TIMEOUT, decide(stream)).await.map_err(limit)?? {
                Decided::Claim { stream, head } => Ok(Err(Claim::Tcp { stream, head, remote })),
                Decided::Link { stream, hello } => {
                    let link = time::timeout(PREAUTH_TIMEOUT, self.link(stream, *hello));
                    link.await.map_err(limit)?.map(Ok)
                }
            }
        };
        let admitted = tokio::select! {
            admitted = admitted => admitted, // dropped, it closes
            () = slot.evicted() => Err(TcpError::Timeout),
            () = self.stop.cancelled() => return, // cancel-safe
        };
        let admitted = match admitted {
            // Who waits to be handed over still takes its slot.
            Ok(Err(claim)) => tokio::select! {
                () = self.inner.report(LinkEvent::Claim(claim)) => return, // dropped, the claim is closed
                () = slot.evicted() => Err(TcpError::Timeout),
            },
            Ok(Ok(link)) => Ok(link),
            Err(error) => Err(error),
        };
        drop(slot);
        match admitted {
            // The reason has been logged and reported.
            Ok(link) => drop(link.run(&self.inner, &self.stop).await),
            Err(error) => {
                tracing::debug!(%remote, %error, "TCP connection refused");
                self.inner.fabric.counters().connections_refused.add(1);
            }
        }
    }

    /// Completes the handshakes of a link: the outer one, and the inner one that counts.
    async fn link(&self, stream: TcpStream, hello: Accepted) -> Result<Established, TcpError> {
        let inner = &self.inner;
        let port = tls::accept(inner, hello, stream, Arc::clone(&self.outer)).await?;
        let endpoint = transport::accepting(
            port.port(),
            self.hop.clone(),
            &inner.site_secret,
            inner.random_bytes(),
        )?;
        let incoming = tokio::select! {
            incoming = endpoint.accept() => incoming, // cancel-safe
            _reason = port.port().ended() => None, // cancel-safe
        };
        // A connection carries one link.
        endpoint.set_server_config(None);
        let incoming = incoming.ok_or(io::ErrorKind::UnexpectedEof).map_err(io::Error::from)?;
        let connection = incoming.accept()?.await?;
        let admitted = hello::admitted(&connection).map_err(HelloError::Peer)?;
        greet(inner, port, &connection, admitted).await.map_err(|error| {
            tracing::info!(%error, "incoming link refused");
            connection.close(REFUSED, error.to_string().as_bytes());
            error.into()
        })
    }
}

/// Reads until the handshake shows what the client wants.
async fn decide(mut stream: TcpStream) -> io::Result<Decided> {
    let mut acceptor = rustls::server::Acceptor::default();
    let (mut head, mut buffer) = (Vec::new(), [0; READ_BYTES]);
    loop {
        let read = stream.read(&mut buffer);
        let n = match head.len() {
            0 => time::timeout(FIRST_BYTE_TIMEOUT, read)
                .await
                .map_err(|_| io::ErrorKind::TimedOut)??,
            _ => read.await?,
        };
        if n == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let mut unread = &buffer[..n];
        head.extend_from_slice(unread);
        while !unread.is_empty() {
            if acceptor.read_tls(&mut unread)? == 0 {
                break;
            }
        }
        match acceptor.accept() {
            Ok(Some(hello)) => {
                let offers = |wanted: &[u8]| {
                    hello.client_hello().alpn().is_some_and(|mut alpn| alpn.any(|it| it == wanted))
                };
                return if offers(ALPN_CLAIM) {
                    Ok(Decided::Claim { stream, head })
                } else if offers(ALPN_CARRIER) {
                    Ok(Decided::Link { stream, hello: Box::new(hello) })
                } else {
                    Err(not_for_us())
                };
            }
            Ok(None) if head.len() < HEAD_BYTES_MAX => {}
            Ok(None) | Err(_) => return Err(not_for_us()),
        }
    }
}

fn not_for_us() -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, "neither a claim nor a link")
}
