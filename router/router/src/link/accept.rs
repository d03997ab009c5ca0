//! Accepting: links and claims on the router's port, UDP and TCP under one number.

use super::{
    Claim, Inner, LinkEvent,
    established::{Established, Terms},
    hello::{self, CLOSED, HelloError, REFUSED},
    port::ReadPort,
    tcp, transport,
};
use crate::net;
use parking_lot::Mutex;
use quinn::{Connection, Incoming};
use skein_trust::{ALPN_CLAIM, Admitted};
use std::{
    io,
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};
use tokio::{net::TcpListener, time};
use tokio_util::sync::CancellationToken;

/// Between attempts to bind an address that is taken or not there yet.
const REBIND_INTERVAL: Duration = Duration::from_secs(1);
/// For connections to end when their port is given up.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(1);
/// What a stranger may take to show who it is.
pub(super) const PREAUTH_TIMEOUT: Duration = Duration::from_secs(10);
/// Handshakes at a time; beyond, newcomers are not answered.
const HANDSHAKES_MAX: usize = 256;
/// Handshakes at a time from which on a newcomer must first prove its address.
const HANDSHAKES_EASY: usize = 32;
/// TCP connections at a time that have not shown what they want.
const TCP_PREAUTH_MAX: usize = 64;
/// Longest name taken over from a neighbour, in characters.
const NAME_MAX: usize = 63;

/// A listening address and what became of it.
#[derive(Debug, Default)]
pub(super) struct Bound {
    /// Differs from the address asked for when that has port 0 or IPv6 is off.
    pub(super) local: Option<SocketAddr>,
    pub(super) error: String,
}

/// One address to accept on for as long as it is configured.
pub(super) struct Acceptor {
    pub(super) inner: Arc<Inner>,
    pub(super) addr: SocketAddr,
    pub(super) bound: Arc<Mutex<Bound>>,
    pub(super) stop: CancellationToken,
}

impl Acceptor {
    /// Binds, again and again if need be, and accepts until stopped.
    ///
    /// # Cancel safety
    /// End it through `stop`.
    pub(super) async fn run(self) {
        let (port, endpoint, tcp) = loop {
            match self.bind() {
                Ok(bound) => break bound,
                Err(error) => self.bound.lock().error = error.to_string(),
            }
            tokio::select! {
                () = time::sleep(REBIND_INTERVAL) => {} // cancel-safe
                () = self.stop.cancelled() => return, // cancel-safe
            }
        };
        tokio::select! {
            () = self.accept_quic(&port, &endpoint) => {} // never ends by itself
            () = tcp::accept(&self.inner, tcp, TCP_PREAUTH_MAX) => {} // never ends by itself
            () = self.stop.cancelled() => {} // cancel-safe
        }
        endpoint.close(CLOSED, b"no longer listening");
        // Neighbours that do not acknowledge the end hold the port no longer than this.
        if time::timeout(CLOSE_TIMEOUT, endpoint.wait_idle()).await.is_err() {
            tracing::debug!(addr = %self.addr, "some neighbours have not acknowledged the end");
        }
    }

    fn bind(&self) -> io::Result<(Arc<ReadPort>, quinn::Endpoint, TcpListener)> {
        let (udp, tcp) = net::port_pair(self.addr)?;
        let local = udp.local_addr()?;
        let port = ReadPort::new(&self.inner, udp)?;
        let config = transport::server(self.inner.tls.port_server()).map_err(io::Error::other)?;
        let endpoint = transport::accepting(
            port.udp(),
            config,
            &self.inner.site_secret,
            self.inner.random_bytes(),
        )?;
        *self.bound.lock() = Bound { local: Some(local), error: String::new() };
        tracing::info!(%local, "listening for links");
        Ok((port, endpoint, tcp))
    }

    async fn accept_quic(&self, port: &Arc<ReadPort>, endpoint: &quinn::Endpoint) {
        let handshakes = Arc::new(AtomicUsize::new(0));
        while let Some(incoming) = endpoint.accept().await {
            let under_way = handshakes.load(Ordering::Relaxed);
            if under_way >= HANDSHAKES_MAX {
                self.inner.fabric.counters().connections_refused.add(1);
                incoming.ignore();
            } else if under_way >= HANDSHAKES_EASY
                && !incoming.remote_address_validated()
                && incoming.may_retry()
            {
                if let Err(error) = incoming.retry() {
                    tracing::debug!(%error, "handshake not retried");
                }
            } else {
                let guard = Counted::new(&handshakes);
                let (inner, port) = (Arc::clone(&self.inner), Arc::clone(port));
                let stop = self.stop.clone();
                self.inner.spawn(async move { serve(&inner, port, incoming, guard, stop).await });
            }
        }
        // The endpoint has been closed, for which `stop` is the only reason.
        self.stop.cancelled().await;
    }
}

/// Counts what is under way for as long as it lives.
struct Counted(Arc<AtomicUsize>);

impl Counted {
    fn new(count: &Arc<AtomicUsize>) -> Self {
        count.fetch_add(1, Ordering::Relaxed);
        Self(Arc::clone(count))
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// One connection from its first packet to its end.
async fn serve(
    inner: &Arc<Inner>,
    port: Arc<ReadPort>,
    incoming: Incoming,
    under_way: Counted,
    stop: CancellationToken,
) {
    let remote = incoming.remote_address();
    let handshake = async { incoming.accept()?.await };
    let connection = match time::timeout(PREAUTH_TIMEOUT, handshake).await {
        Ok(Ok(connection)) => connection,
        Ok(Err(error)) => {
            tracing::debug!(%remote, %error, "handshake failed");
            inner.fabric.counters().connections_refused.add(1);
            return;
        }
        Err(_) => {
            inner.fabric.counters().connections_refused.add(1);
            return;
        }
    };
    let outcome = match hello::admitted(&connection) {
        Ok(Admitted::Claim) => {
            claim(inner, connection).await;
            drop(under_way);
            return;
        }
        Ok(link) => greet(inner, port, &connection, link).await,
        Err(error) => Err(error.into()),
    };
    drop(under_way);
    match outcome {
        // The reason has been logged and reported.
        Ok(link) => drop(link.run(inner, &stop).await),
        Err(error) => {
            tracing::info!(%error, "incoming link refused");
            tracing::debug!(%remote, "refused");
            inner.fabric.counters().connections_refused.add(1);
            connection.close(REFUSED, error.to_string().as_bytes());
        }
    }
}

async fn greet(
    inner: &Arc<Inner>,
    port: Arc<ReadPort>,
    connection: &Connection,
    admitted: Admitted,
) -> Result<Established, HelloError> {
    let peer = hello::neighbour(admitted, inner.router)?;
    let mut mine = (inner.hello)(peer.site);
    mine.protocol_min = hello::PROTOCOL_MIN;
    mine.protocol_max = hello::PROTOCOL_MAX;
    mine.link_nonce = inner.link_nonce();
    let greeted = hello::accept(connection, peer, mine).await?;
    let site = greeted.hello.site_name.chars().filter(|c| !c.is_control());
    let terms =
        Terms { name: site.take(NAME_MAX).collect(), cost: greeted.hello.cost, incoming: true };
    Established::new(inner, connection.clone(), port, greeted, terms)
}

/// Hands a claim's stream over.
async fn claim(inner: &Inner, connection: Connection) {
    match time::timeout(PREAUTH_TIMEOUT, connection.accept_bi()).await {
        Ok(Ok((send, recv))) => {
            inner.report(LinkEvent::Claim(Claim::Quic { connection, send, recv })).await;
        }
        Ok(Err(_)) | Err(_) => {
            inner.fabric.counters().connections_refused.add(1);
            connection.close(REFUSED, b"no claim");
        }
    }
}

/// Whether a TLS client offers to make a claim.
pub(super) fn offers_claim<'a>(mut alpn: impl Iterator<Item = &'a [u8]>) -> bool {
    alpn.any(|protocol| protocol == ALPN_CLAIM)
}
