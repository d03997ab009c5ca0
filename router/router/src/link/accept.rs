//! Accepting: links and claims on the router's port, UDP and TCP under one number.

use super::{
    Claim, Inner, LinkEvent,
    established::{Established, Terms},
    hello::{self, CLOSED, HelloError, REFUSED},
    port::ServedPort,
    tcp, transport,
};
use crate::{
    clock,
    gate::{Gate, Slot},
    net::{self, TcpListener},
};
use parking_lot::Mutex;
use quinn::{Connection, ConnectionError, Incoming};
use skein_trust::Admitted;
use std::{io, net::SocketAddr, sync::Arc, time::Duration};
use tokio::time;
use tokio_util::sync::CancellationToken;

/// Between attempts to bind an address that is taken or not there yet.
const REBIND_INTERVAL: Duration = Duration::from_secs(1);
/// For connections to end when their port is given up.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(1);
/// What a stranger may take to show who it is: three flights on a bad path.
pub(super) const PREAUTH_TIMEOUT: Duration = Duration::from_secs(5);
/// Whoever has something to say begins at once: a round trip and a retransmission.
pub(super) const FIRST_BYTE_TIMEOUT: Duration = Duration::from_secs(2);
/// Handshakes at a time, in all and from one place.
const HANDSHAKES_MAX: usize = 256;
const HANDSHAKES_PER_SOURCE_MAX: usize = 32;
/// Handshakes at a time, in all and from one place, from which on a newcomer must first prove its address: nobody shall take up
/// another's room with forged ones.
const HANDSHAKES_EASY: usize = 32;
const HANDSHAKES_PER_SOURCE_EASY: usize = 8;
/// Neighbours at a time that have a certificate and have not said hello.
const GREETINGS_MAX: usize = 256;
const GREETINGS_PER_SOURCE_MAX: usize = 64;
/// QUIC connections at a time that want to claim and have not begun to.
const CLAIMS_MAX: usize = 64;
const CLAIMS_PER_SOURCE_MAX: usize = 16;
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
            () = self.accept_tcp(tcp) => {} // never ends by itself
            () = self.stop.cancelled() => {} // cancel-safe
        }
        endpoint.close(CLOSED, b"no longer listening");
        // Neighbours that do not acknowledge the end hold the port no longer than this.
        if time::timeout(CLOSE_TIMEOUT, endpoint.wait_idle()).await.is_err() {
            tracing::debug!(addr = %self.addr, "some neighbours have not acknowledged the end");
        }
    }

    fn bind(&self) -> io::Result<(Arc<ServedPort>, quinn::Endpoint, TcpListener)> {
        let (udp, tcp) = net::port_pair(self.addr)?;
        let local = udp.local_addr()?;
        let port = ServedPort::udp(&self.inner, udp)?;
        let config = transport::server(self.inner.tls.port_server()).map_err(io::Error::other)?;
        let endpoint = transport::accepting(
            port.port(),
            config,
            &self.inner.site_secret,
            self.inner.random_bytes(),
        )?;
        *self.bound.lock() = Bound { local: Some(local), error: String::new() };
        tracing::info!(%local, "listening for links");
        Ok((port, endpoint, tcp))
    }

    async fn accept_tcp(&self, listener: TcpListener) {
        let door = match tcp::Door::new(&self.inner, &self.stop) {
            Ok(door) => door,
            Err(error) => {
                tracing::error!(%error, "links and claims over TCP are not accepted");
                return self.stop.cancelled().await;
            }
        };
        Arc::new(door).accept(listener).await;
    }

    async fn accept_quic(&self, port: &Arc<ServedPort>, endpoint: &quinn::Endpoint) {
        let gates = Gates::default();
        while let Some(incoming) = endpoint.accept().await {
            let from = incoming.remote_address().ip();
            let (all, of_source) = gates.handshakes.taken(from);
            let crowded = all >= HANDSHAKES_EASY || of_source >= HANDSHAKES_PER_SOURCE_EASY;
            if crowded && !incoming.remote_address_validated() && incoming.may_retry() {
                if let Err(error) = incoming.retry() {
                    tracing::debug!(%error, "handshake not retried");
                }
            } else {
                let slot = gates.handshakes.enter(from);
                let (inner, port) = (Arc::clone(&self.inner), Arc::clone(port));
                let (gates, stop) = (gates.clone(), self.stop.clone());
                self.inner
                    .spawn(async move { serve(&inner, port, incoming, slot, &gates, stop).await });
            }
        }
        // The endpoint has been closed, for which `stop` is the only reason.
        self.stop.cancelled().await;
    }
}

/// Room for strangers on one port; links and claims do not take each other's.
#[derive(Clone)]
struct Gates {
    handshakes: Arc<Gate>,
    greetings: Arc<Gate>,
    claims: Arc<Gate>,
}

impl Default for Gates {
    fn default() -> Self {
        Self {
            handshakes: Gate::new(HANDSHAKES_MAX, HANDSHAKES_PER_SOURCE_MAX),
            greetings: Gate::new(GREETINGS_MAX, GREETINGS_PER_SOURCE_MAX),
            claims: Gate::new(CLAIMS_MAX, CLAIMS_PER_SOURCE_MAX),
        }
    }
}

/// One connection from its first packet to its end.
async fn serve(
    inner: &Arc<Inner>,
    port: Arc<ServedPort>,
    incoming: Incoming,
    slot: Slot,
    gates: &Gates,
    stop: CancellationToken,
) {
    let remote = incoming.remote_address();
    let refused = || inner.fabric.counters().connections_refused.add(1);
    let handshake = async { incoming.accept()?.await };
    let handshake = tokio::select! {
        handshake = time::timeout(PREAUTH_TIMEOUT, handshake) => handshake, // dropped, it closes
        () = slot.evicted() => return refused(),
    };
    drop(slot);
    let connection = match handshake {
        Ok(Ok(connection)) => connection,
        Ok(Err(error)) => {
            tracing::debug!(%remote, %error, "handshake failed");
            return refused();
        }
        Err(_) => return refused(),
    };
    let outcome = match hello::admitted(&connection) {
        Ok(Admitted::Claim) => {
            return claim(inner, connection, gates.claims.enter(remote.ip())).await;
        }
        Ok(link) => {
            let slot = gates.greetings.enter(remote.ip());
            tokio::select! {
                greeted = greet(inner, port, &connection, link) => greeted, // dropped, it is closed below
                () = slot.evicted() => Err(HelloError::Timeout),
            }
        }
        Err(error) => Err(error.into()),
    };
    match outcome {
        // The reason has been logged and reported.
        Ok(link) => drop(link.run(inner, &stop).await),
        Err(error) => {
            tracing::info!(%error, "incoming link refused");
            tracing::debug!(%remote, "refused");
            refused();
            connection.close(REFUSED, error.to_string().as_bytes());
        }
    }
}

pub(super) async fn greet(
    inner: &Arc<Inner>,
    port: Arc<ServedPort>,
    connection: &Connection,
    admitted: Admitted,
) -> Result<Established, HelloError> {
    let peer = hello::neighbour(admitted, inner.router)?;
    let mut mine = (inner.hello)(peer.site);
    mine.protocol_min = hello::PROTOCOL_MIN;
    mine.protocol_max = hello::PROTOCOL_MAX;
    mine.sent_unix_ms = clock::unix_ms();
    mine.link_nonce = inner.link_nonce();
    let greeted = hello::accept(connection, peer, mine, &inner.tls).await?;
    let site = greeted.hello.site_name.chars().filter(|c| !c.is_control());
    let terms =
        Terms { name: site.take(NAME_MAX).collect(), cost: greeted.hello.cost, incoming: true };
    Established::new(inner, connection.clone(), port, greeted, terms)
}

/// Hands a claim's stream over.
async fn claim(inner: &Inner, connection: Connection, slot: Slot) {
    let opened = tokio::select! {
        opened = time::timeout(FIRST_BYTE_TIMEOUT, connection.accept_bi()) => opened, // cancel-safe
        () = slot.evicted() => Ok(Err(ConnectionError::LocallyClosed)),
    };
    match opened {
        Ok(Ok((send, recv))) => {
            // Who waits to be handed over still takes its slot.
            tokio::select! {
                () = inner.report(LinkEvent::Claim(Claim::Quic { connection, send, recv })) => {} // dropped, the claim is closed
                () = slot.evicted() => inner.fabric.counters().connections_refused.add(1),
            }
        }
        Ok(Err(_)) | Err(_) => {
            inner.fabric.counters().connections_refused.add(1);
            connection.close(REFUSED, b"no claim");
        }
    }
}
