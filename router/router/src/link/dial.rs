//! Dialling: all endpoints at once, the first to answer wins; again and again until the link is up.

use super::{
    Inner,
    established::{Established, Terms, connection_reason},
    hello::{self, HelloError, REFUSED},
    port::ReadPort,
    transport,
};
use crate::{clock, net};
use parking_lot::Mutex;
use quinn::{ConnectError, Connection, ConnectionError, crypto::rustls::NoInitialCipherSuite};
use skein_core::SiteId;
use skein_trust::{Dial, SERVER_NAME};
use skein_wire::proto::control::EndpointAttempt;
use std::{
    collections::BTreeMap,
    io,
    net::SocketAddr,
    sync::Arc,
    time::{Duration, Instant},
};
use tokio::{sync::watch, task::JoinSet, time};
use tokio_util::sync::CancellationToken;

/// Between attempts to different addresses, so that the first often wins before the others have cost anything.
const STAGGER: Duration = Duration::from_millis(30);
/// Addresses of one endpoint that are tried; a name may resolve to arbitrarily many.
const ADDRESSES_MAX: usize = 8;
/// An attempt without an answer for this long is given up; longer than the handshake takes via satellite.
const ATTEMPT_TIMEOUT: Duration = Duration::from_secs(3);
/// When nobody has answered for this long everything is tried anew beside the attempts under way: whenever the network
/// comes back, the next attempt is near.
const SILENCE: Duration = Duration::from_secs(1);
/// Rounds of attempts under way at the same time.
const ROUNDS_MAX: usize = 3;
/// Back-off after refusals.
const BACKOFF_MIN: Duration = Duration::from_millis(100);
const BACKOFF_MAX: Duration = Duration::from_secs(5);
/// Back-off after losses, however often: a network that comes and goes is used while it is there.
const LOST_BACKOFF_MAX: Duration = Duration::from_millis(500);
/// A link that lasted this long was a good one: its loss is redialled without back-off.
const GOOD_AFTER: Duration = Duration::from_secs(10);

/// What a dialled link tells about itself.
#[derive(Debug, Default)]
pub(super) struct Progress {
    pub(super) attempts: BTreeMap<String, String>,
    pub(super) error: String,
    /// The link while it is up.
    pub(super) up: Option<skein_core::LinkId>,
    pub(super) since_unix_ms: i64,
}

impl Progress {
    pub(super) fn attempts(&self) -> Vec<EndpointAttempt> {
        let attempt = |(endpoint, outcome): (&String, &String)| EndpointAttempt {
            endpoint: endpoint.clone(),
            outcome: outcome.clone(),
        };
        self.attempts.iter().map(attempt).collect()
    }
}

/// One link to be dialled for as long as it is configured.
pub(super) struct Dialler {
    pub(super) inner: Arc<Inner>,
    pub(super) name: String,
    pub(super) site: SiteId,
    pub(super) cost: u32,
    pub(super) endpoints: watch::Receiver<Vec<String>>,
    pub(super) progress: Arc<Mutex<Progress>>,
    pub(super) stop: CancellationToken,
}

/// Why one attempt failed, in words for people.
#[derive(Debug, thiserror::Error)]
pub(super) enum DialError {
    #[error("the endpoints have changed")]
    EndpointsChanged,
    #[error("{0} does not resolve: {1}")]
    Resolve(String, io::Error),
    #[error("UDP to {0} unanswered")]
    Unanswered(SocketAddr),
    #[error("no UDP socket: {0}")]
    Socket(#[from] io::Error),
    #[error("{0}")]
    Connect(#[from] ConnectError),
    #[error("{0}")]
    Tls(#[from] NoInitialCipherSuite),
    #[error("certificate: {0}")]
    Certificate(skein_trust::PeerError),
    #[error("{}", connection_reason(.0))]
    Connection(ConnectionError),
    #[error("{}", hello_reason(.0))]
    Hello(#[from] HelloError),
}

fn hello_reason(error: &HelloError) -> String {
    match error {
        HelloError::Connection(error @ ConnectionError::ApplicationClosed(_)) => {
            format!("refused: {}", connection_reason(error))
        }
        HelloError::Connection(error) => connection_reason(error),
        other => other.to_string(),
    }
}

impl Dialler {
    /// Dials, serves the link, and dials again until stopped.
    ///
    /// # Cancel safety
    /// End it through `stop`.
    pub(super) async fn run(mut self) {
        let mut backoff = BACKOFF_MIN;
        while !self.stop.is_cancelled() {
            let stop = self.stop.clone();
            let established = tokio::select! {
                established = self.dial() => established, // dropped, its sockets close
                () = stop.cancelled() => return,
            };
            match established {
                Ok(link) => {
                    let began = clock::now();
                    self.progress.lock().link_up(link.id());
                    let reason = link.run(&self.inner, &self.stop).await;
                    self.progress.lock().link_down(reason);
                    if clock::now().saturating_duration_since(began) >= GOOD_AFTER {
                        backoff = BACKOFF_MIN;
                        continue;
                    }
                    backoff = backoff.min(LOST_BACKOFF_MAX);
                }
                Err(DialError::EndpointsChanged) => {
                    backoff = BACKOFF_MIN;
                    continue;
                }
                Err(error) => self.progress.lock().failed(&error),
            }
            tokio::select! {
                () = time::sleep(self.jittered(backoff)) => {} // cancel-safe
                changed = self.endpoints.changed() => { // cancel-safe
                    backoff = BACKOFF_MIN;
                    if changed.is_err() {
                        return;
                    }
                    continue;
                }
                () = stop.cancelled() => return, // cancel-safe
            }
            backoff = (backoff * 2).min(BACKOFF_MAX);
        }
    }

    async fn dial(&mut self) -> Result<Established, DialError> {
        let endpoints = self.endpoints.borrow_and_update().clone();
        self.progress.lock().attempts.retain(|endpoint, _| endpoints.contains(endpoint));
        let (connection, port, peer) = self.race(&endpoints).await?;
        let mut mine = (self.inner.hello)(self.site);
        mine.protocol_min = hello::PROTOCOL_MIN;
        mine.protocol_max = hello::PROTOCOL_MAX;
        mine.sent_unix_ms = clock::unix_ms();
        mine.cost = self.cost;
        mine.link_name.clone_from(&self.name);
        mine.link_nonce = self.inner.link_nonce();
        let greeted = hello::dial(&connection, peer, mine, &self.inner.tls).await;
        let terms = Terms { name: self.name.clone(), cost: self.cost, incoming: false };
        let link = greeted.and_then(|greeted| {
            Established::new(&self.inner, connection.clone(), port, greeted, terms)
        });
        link.map_err(|error| {
            connection.close(REFUSED, error.to_string().as_bytes());
            error.into()
        })
    }

    /// Tries all endpoints; the first handshake wins, the others are dropped.
    async fn race(
        &mut self,
        endpoints: &[String],
    ) -> Result<(Connection, Arc<ReadPort>, super::Peer), DialError> {
        let mut attempts = JoinSet::new();
        let mut last = DialError::Unanswered(SocketAddr::from(([0; 4], 0)));
        let mut rounds = 0;
        loop {
            if rounds < ROUNDS_MAX {
                rounds += 1;
                self.launch(&mut attempts, endpoints);
            }
            let silence = time::sleep(self.jittered(SILENCE));
            tokio::pin!(silence);
            loop {
                let finished = tokio::select! {
                    finished = attempts.join_next() => finished, // cancel-safe
                    _ = self.endpoints.changed() => return Err(DialError::EndpointsChanged), // cancel-safe
                    () = &mut silence => { // cancel-safe
                        rounds = attempts.len().div_ceil(endpoints.len().max(1)).min(rounds);
                        break;
                    }
                };
                match finished {
                    Some(Ok((_, Ok(won)))) => return Ok(won),
                    Some(Ok((endpoint, Err(error)))) => {
                        self.progress.lock().attempts.insert(endpoint, error.to_string());
                        last = error;
                    }
                    // An attempt that panicked has failed.
                    Some(Err(_)) => {}
                    None => return Err(last),
                }
            }
        }
    }

    fn launch(&self, attempts: &mut JoinSet<(String, Outcome)>, endpoints: &[String]) {
        for (i, endpoint) in (0_u32..).zip(endpoints) {
            let (inner, endpoint, site) = (Arc::clone(&self.inner), endpoint.clone(), self.site);
            attempts.spawn(async move {
                time::sleep(STAGGER * i.min(10)).await;
                let outcome = try_endpoint(&inner, &endpoint, site).await;
                (endpoint, outcome)
            });
        }
    }

    /// Up to a quarter more or less, so that the routers of a site that lost its uplink do not return in step.
    fn jittered(&self, delay: Duration) -> Duration {
        let [byte] = self.inner.random_bytes();
        delay * (192 + u32::from(byte) / 2) / 256
    }
}

type Outcome = Result<(Connection, Arc<ReadPort>, super::Peer), DialError>;

/// Tries the addresses of one endpoint, staggered; the first handshake wins.
async fn try_endpoint(inner: &Arc<Inner>, endpoint: &str, site: SiteId) -> Outcome {
    let resolved = time::timeout(ATTEMPT_TIMEOUT, net::resolve(endpoint)).await;
    let resolved = resolved.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()));
    let addrs = resolved.map_err(|error| DialError::Resolve(endpoint.to_owned(), error))?;
    let mut attempts = JoinSet::new();
    for (i, addr) in (0_u32..).zip(addrs.into_iter().take(ADDRESSES_MAX)) {
        let inner = Arc::clone(inner);
        attempts.spawn(async move {
            time::sleep(STAGGER * i).await;
            let dial = inner.tls.link_client(site);
            let (connection, port) = handshake(&inner, addr, &dial).await?;
            let admitted = hello::admitted(&connection).map_err(HelloError::Peer)?;
            let peer = hello::neighbour(admitted, inner.router).inspect_err(|error| {
                connection.close(REFUSED, error.to_string().as_bytes());
            })?;
            Ok((connection, port, peer))
        });
    }
    let none = io::Error::new(io::ErrorKind::NotFound, "no address");
    let mut last = DialError::Resolve(endpoint.to_owned(), none);
    while let Some(outcome) = attempts.join_next().await {
        match outcome {
            Ok(Ok(won)) => return Ok(won),
            Ok(Err(error)) => last = error,
            // An attempt that panicked has failed.
            Err(_) => {}
        }
    }
    Err(last)
}

/// One QUIC handshake from a socket of its own.
pub(super) async fn handshake(
    inner: &Inner,
    addr: SocketAddr,
    dial: &Dial,
) -> Result<(Connection, Arc<ReadPort>), DialError> {
    let port = ReadPort::new(inner, net::udp_towards(addr)?)?;
    let endpoint = transport::dialling(port.udp())?;
    let config = transport::client(Arc::clone(&dial.config))?;
    let connecting = endpoint.connect_with(config, addr, SERVER_NAME)?;
    let connection = time::timeout(ATTEMPT_TIMEOUT, connecting)
        .await
        .map_err(|_| DialError::Unanswered(addr))?
        .map_err(|error| match dial.refusal() {
            Some(refusal) => DialError::Certificate(refusal.clone()),
            None if error == ConnectionError::TimedOut => DialError::Unanswered(addr),
            None => DialError::Connection(error),
        })?;
    Ok((connection, port))
}

impl Progress {
    fn link_up(&mut self, id: skein_core::LinkId) {
        self.up = Some(id);
        self.error.clear();
        self.attempts.clear();
        self.since_unix_ms = clock::unix_ms();
    }

    fn link_down(&mut self, reason: String) {
        self.up = None;
        self.error = reason;
        self.since_unix_ms = clock::unix_ms();
    }

    fn failed(&mut self, error: &DialError) {
        self.error = error.to_string();
    }
}

/// For `doctor`: how long a handshake takes that proves nothing but that a Skein router answers.
pub(super) async fn probe_udp(inner: &Inner, addr: SocketAddr) -> Result<Duration, DialError> {
    let began: Instant = clock::now();
    let dial = skein_trust::claim_carrier_client(Arc::clone(&inner.time));
    let (connection, _port) = handshake(inner, addr, &dial).await?;
    let took = clock::now().saturating_duration_since(began);
    connection.close(hello::CLOSED, b"probe");
    Ok(took)
}
