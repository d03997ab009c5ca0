//! Who answers first: every address of every endpoint, over UDP and, a moment later, over TLS.

use super::{
    Inner, Peer,
    established::connection_reason,
    hello::{self, HelloError, REFUSED},
    port::ServedPort,
    preference::Plan,
    tls::{self, TlsError, Way},
    transport,
};
use crate::{clock, net};
use quinn::{ConnectError, Connection, ConnectionError, crypto::rustls::NoInitialCipherSuite};
use skein_core::SiteId;
use skein_trust::{Dial, SERVER_NAME};
use std::{
    future::Future,
    io,
    net::SocketAddr,
    sync::Arc,
    time::{Duration, Instant},
};
use tokio::{task::JoinSet, time};

/// Between attempts to different addresses, so that the first often wins before the others have cost anything.
const STAGGER: Duration = Duration::from_millis(30);
/// Addresses of one endpoint that are tried; a name may resolve to arbitrarily many.
const ADDRESSES_MAX: usize = 8;
/// An attempt without an answer for this long is given up; longer than the handshake takes via satellite.
const ATTEMPT_TIMEOUT: Duration = Duration::from_secs(3);
/// Besides two round trips, for UDP to be tried anew when TLS has worked: for handshakes on a busy machine.
const ANEW_MIN: Duration = Duration::from_millis(100);
/// When nobody has answered for this long everything is tried anew beside the attempts under way: whenever the network
/// comes back, the next attempt is near.
const SILENCE: Duration = Duration::from_secs(1);
/// Rounds of attempts under way at the same time.
const ROUNDS_MAX: usize = 3;

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
    NoCipherSuite(#[from] NoInitialCipherSuite),
    #[error("certificate: {0}")]
    Certificate(skein_trust::PeerError),
    #[error("{}", connection_reason(.0))]
    Connection(ConnectionError),
    #[error("{}", hello_reason(.0))]
    Hello(#[from] HelloError),
    #[error("{0}")]
    Tls(#[from] TlsError),
    #[error("{0} does not go on after the TLS handshake")]
    Stuck(SocketAddr),
    #[error("TLS to {0}: {1}")]
    Ended(SocketAddr, String),
    #[error("{}", both(udp, tls))]
    Neither { udp: Box<Self>, tls: Box<Self> },
}

impl DialError {
    /// Whether the router that was meant has said no, so that it need not be asked in another way. Before it says hello it may
    /// be anybody: another program may listen on the same port over UDP, and whatever ends a handshake can be forged.
    fn is_an_answer(&self) -> bool {
        matches!(self, Self::Hello(_))
    }

    /// Why a link to `endpoint` does not use UDP.
    pub(super) fn not_udp(&self, endpoint: &str) -> String {
        match self {
            Self::Unanswered(_) => unanswered(endpoint),
            other => format!("UDP to {endpoint}: {other}"),
        }
    }
}

fn both(udp: &DialError, tls: &DialError) -> String {
    let (udp, tls) = (udp.to_string(), tls.to_string());
    if udp == tls { udp } else { format!("{udp}; {tls}") }
}

fn unanswered(endpoint: &str) -> String {
    format!("UDP to {endpoint} unanswered")
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

/// A router that has answered.
pub(super) struct Won {
    pub(super) connection: Connection,
    pub(super) port: Arc<ServedPort>,
    pub(super) peer: Peer,
    /// When the first handshake began that it would have answered had it been there; names were resolved before.
    pub(super) began: Instant,
    /// Why it was not reached over UDP; empty if it was.
    pub(super) not_udp: String,
}

type Outcome = Result<Won, DialError>;

/// Who races to where.
pub(super) struct Race<'a> {
    pub(super) inner: &'a Arc<Inner>,
    pub(super) endpoints: &'a [String],
    pub(super) site: SiteId,
    pub(super) plan: Plan,
}

impl Race<'_> {
    /// Tries all endpoints, again and again while nobody answers; the first handshake wins, the others are dropped. `failed` is
    /// told of every endpoint that did not answer.
    ///
    /// # Cancel safety
    /// Cancelled, its sockets close.
    pub(super) async fn run(&self, mut failed: impl FnMut(String, &DialError)) -> Outcome {
        let began = clock::now();
        let mut attempts = JoinSet::new();
        let mut last = DialError::Unanswered(SocketAddr::from(([0; 4], 0)));
        let mut rounds = 0;
        // To look for something better needs no haste.
        let rounds_max = if self.plan == Plan::BETTER { 1 } else { ROUNDS_MAX };
        loop {
            if rounds < rounds_max {
                rounds += 1;
                let is_first = rounds == 1;
                self.launch(&mut attempts, (!is_first).then_some(began));
            }
            let silence = time::sleep(self.inner.jittered(SILENCE));
            tokio::pin!(silence);
            loop {
                let finished = tokio::select! {
                    finished = attempts.join_next() => finished, // cancel-safe
                    () = &mut silence => { // cancel-safe
                        rounds = attempts.len().div_ceil(self.endpoints.len().max(1)).min(rounds);
                        break;
                    }
                };
                match finished {
                    Some(Ok((_, Ok(won)))) => return Ok(won),
                    Some(Ok((endpoint, Err(error)))) => {
                        failed(endpoint, &error);
                        last = error;
                    }
                    // An attempt that panicked has failed.
                    Some(Err(_)) => {}
                    None => return Err(last),
                }
            }
        }
    }

    /// Starts a round; one that is not the first tells when that `began`.
    fn launch(&self, attempts: &mut JoinSet<(String, Outcome)>, began: Option<Instant>) {
        for (i, endpoint) in (0_u32..).zip(self.endpoints) {
            let (inner, endpoint) = (Arc::clone(self.inner), endpoint.clone());
            let (site, plan) = (self.site, self.plan);
            attempts.spawn(async move {
                time::sleep(STAGGER * i.min(10)).await;
                let outcome = try_endpoint(&inner, &endpoint, site, plan).await;
                let since_first = |won: Won| Won { began: began.unwrap_or(won.began), ..won };
                (endpoint, outcome.map(since_first))
            });
        }
    }
}

/// Tries one endpoint: where a proxy leads to it, over TLS by name, beside UDP to its addresses.
async fn try_endpoint(inner: &Arc<Inner>, endpoint: &str, site: SiteId, plan: Plan) -> Outcome {
    match (inner.proxy_for(endpoint), plan.tls_after) {
        (Some(proxy), Some(tls_after)) => {
            let udp_alone = Plan { tls_after: None, ..plan };
            let udp = || try_addresses(inner, endpoint, site, udp_alone);
            let tls = async {
                time::sleep(tls_after).await;
                Box::pin(over_tls(inner, endpoint, Way::Through(proxy), site)).await
            };
            first_of(endpoint, udp(), tls, plan.udp_anew().then(udp)).await
        }
        _ => try_addresses(inner, endpoint, site, plan).await,
    }
}

/// Tries the addresses of one endpoint, staggered; the first handshake wins.
async fn try_addresses(inner: &Arc<Inner>, endpoint: &str, site: SiteId, plan: Plan) -> Outcome {
    let resolved = time::timeout(ATTEMPT_TIMEOUT, net::resolve(endpoint)).await;
    let resolved = resolved.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()));
    let addrs = resolved.map_err(|error| DialError::Resolve(endpoint.to_owned(), error))?;
    let mut attempts = JoinSet::new();
    for (i, addr) in (0_u32..).zip(addrs.into_iter().take(ADDRESSES_MAX)) {
        let (inner, endpoint) = (Arc::clone(inner), endpoint.to_owned());
        attempts.spawn(async move {
            time::sleep(STAGGER * i).await;
            try_address(&inner, &endpoint, addr, site, plan).await
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

/// Tries the carriers as planned.
async fn try_address(
    inner: &Inner,
    endpoint: &str,
    addr: SocketAddr,
    site: SiteId,
    plan: Plan,
) -> Outcome {
    let udp = async {
        time::sleep(plan.udp_after).await;
        over_udp(inner, addr, site).await
    };
    let Some(tls_after) = plan.tls_after else { return udp.await };
    let tls = async {
        time::sleep(tls_after).await;
        Box::pin(over_tls(inner, endpoint, Way::Direct(addr), site)).await
    };
    first_of(endpoint, udp, tls, plan.udp_anew().then(|| over_udp(inner, addr, site))).await
}

/// The first handshake that is completed; a refusal over UDP counts for both. TLS wins when UDP does not work `anew` either: what was sent to
/// a neighbour that was away is repeated ever less often, so that which of both finds it back first is chance.
async fn first_of(
    endpoint: &str,
    udp: impl Future<Output = Outcome>,
    tls: impl Future<Output = Outcome>,
    anew: Option<impl Future<Output = Outcome>>,
) -> Outcome {
    let neither = |udp, tls| DialError::Neither { udp: Box::new(udp), tls: Box::new(tls) };
    let began = clock::now();
    tokio::pin!(udp, tls);
    let (over_tls, not_udp) = tokio::select! {
        outcome = &mut udp => match outcome { // not polled again
            Err(error) if !error.is_an_answer() => match tls.await {
                Ok(won) => (won, error.not_udp(endpoint)),
                Err(tls) => return Err(neither(error, tls)),
            },
            outcome => return outcome,
        },
        outcome = &mut tls => match outcome { // the same
            Ok(won) => (won, unanswered(endpoint)),
            Err(tls) => return udp.await.map_err(|udp| match udp.is_an_answer() {
                true => udp,
                false => neither(udp, tls),
            }),
        },
    };
    if let Some(anew) = anew {
        let patience = ANEW_MIN + 2 * over_tls.connection.rtt();
        if let Ok(Ok(over_udp)) = time::timeout(patience, anew).await {
            return Ok(Won { began, ..over_udp });
        }
    }
    Ok(Won { not_udp, ..over_tls })
}

async fn over_udp(inner: &Inner, addr: SocketAddr, site: SiteId) -> Outcome {
    let dial = inner.tls.link_client(site);
    let began = clock::now();
    let (connection, port) = udp_handshake(inner, addr, &dial).await?;
    identified(inner, connection, port, began)
}

async fn over_tls(inner: &Inner, endpoint: &str, way: Way, site: SiteId) -> Outcome {
    let began = clock::now();
    let (port, addr) = tls::connect(inner, endpoint, way, site).await?;
    let dial = inner.tls.link_client(site);
    let connection = tokio::select! {
        connected = handshake(&port, addr, &dial) => connected.map_err(|error| match error {
            DialError::Unanswered(addr) => DialError::Stuck(addr),
            other => other,
        })?,
        reason = port.port().ended() => return Err(DialError::Ended(addr, reason)), // cancel-safe
    };
    identified(inner, connection, port, began)
}

fn identified(
    inner: &Inner,
    connection: Connection,
    port: Arc<ServedPort>,
    began: Instant,
) -> Outcome {
    let admitted = hello::admitted(&connection).map_err(HelloError::Peer)?;
    let peer = hello::neighbour(admitted, inner.router).inspect_err(|error| {
        connection.close(REFUSED, error.to_string().as_bytes());
    })?;
    Ok(Won { connection, port, peer, began, not_udp: String::new() })
}

/// One QUIC handshake from a socket of its own.
async fn udp_handshake(
    inner: &Inner,
    addr: SocketAddr,
    dial: &Dial,
) -> Result<(Connection, Arc<ServedPort>), DialError> {
    let port = ServedPort::udp(inner, net::udp_towards(addr)?)?;
    let connection = handshake(&port, addr, dial).await?;
    Ok((connection, port))
}

async fn handshake(
    port: &ServedPort,
    addr: SocketAddr,
    dial: &Dial,
) -> Result<Connection, DialError> {
    let endpoint = transport::dialling(port.port())?;
    let config = transport::client(Arc::clone(&dial.config))?;
    let connecting = endpoint.connect_with(config, addr, SERVER_NAME)?;
    time::timeout(ATTEMPT_TIMEOUT, connecting)
        .await
        .map_err(|_| DialError::Unanswered(addr))?
        .map_err(|error| match dial.refusal() {
            Some(refusal) => DialError::Certificate(refusal.clone()),
            None if error == ConnectionError::TimedOut => DialError::Unanswered(addr),
            None => DialError::Connection(error),
        })
}

/// For `doctor`: how long a handshake takes that proves nothing but that a Skein router answers.
pub(super) async fn probe_udp(inner: &Inner, addr: SocketAddr) -> Result<Duration, DialError> {
    let began: Instant = clock::now();
    let dial = skein_trust::claim_carrier_client(Arc::clone(&inner.time));
    let (connection, _port) = udp_handshake(inner, addr, &dial).await?;
    let took = clock::now().saturating_duration_since(began);
    connection.close(hello::CLOSED, b"probe");
    Ok(took)
}
