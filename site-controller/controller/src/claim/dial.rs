//! Reaches the issuer of a token: all its endpoints at once, over TCP and over QUIC; who completes the pinned TLS handshake first wins.

use std::{collections::BTreeMap, fmt, io, net::SocketAddr, sync::Arc, time::Duration};

use quinn::crypto::rustls::QuicClientConfig;
use rustls_pki_types::ServerName;
use skein_core::SiteId;
use skein_proxy::Proxy;
use skein_trust::{CaPin, SERVER_NAME, claim_carrier_client, claim_client, explain_alert};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    task::JoinSet,
};
use tokio_rustls::{TlsConnector, client::TlsStream};

use crate::{claim::time, net};

/// For one endpoint over one carrier, handshakes included.
const DIAL_TIMEOUT: Duration = Duration::from_secs(8);
/// Addresses of one host name that are tried.
const ADDRESSES_MAX: usize = 8;

/// Bytes both ways.
pub(super) trait Duplex: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Duplex for T {}

/// A connection to the issuer that its CA vouches for.
pub(super) struct Connected {
    pub(super) stream: TlsStream<Box<dyn Duplex>>,
    /// For people.
    pub(super) endpoint: String,
    /// A QUIC connection lives as long as its endpoint.
    _carrier: Option<quinn::Endpoint>,
}

impl fmt::Debug for Connected {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Connected").field("endpoint", &self.endpoint).finish_non_exhaustive()
    }
}

/// What became of each endpoint, in words.
#[derive(Debug, Default)]
pub(super) struct Failures(BTreeMap<String, Vec<String>>);

impl Failures {
    pub(super) fn add(&mut self, endpoint: &str, why: String) {
        let list = self.0.entry(endpoint.to_owned()).or_default();
        if !list.contains(&why) {
            list.push(why);
        }
    }
}

impl fmt::Display for Failures {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let lines: Vec<String> = self
            .0
            .iter()
            .map(|(endpoint, why)| format!("{endpoint}: {}", why.join(", ")))
            .collect();
        f.write_str(&lines.join("; "))
    }
}

/// One way to one endpoint, as a task: its result names the endpoint.
type Attempts = JoinSet<(String, Result<Connected, Unconnected>)>;

enum Unconnected {
    /// For this reason.
    Failed(String),
    /// The caller's patience ended first; in words.
    Cut(String),
}

/// A race that goes on: more connections can be taken from it when the first one breaks.
pub(super) struct Race {
    attempts: Attempts,
    pub(super) failures: Failures,
    /// Whether an endpoint would have been waited for longer, had the caller had the patience.
    pub(super) is_cut: bool,
}

impl Race {
    /// Starts towards all `endpoints` of the token that `issuer` made; each may take at most `timeout`.
    pub(super) fn start(
        endpoints: &[String],
        issuer: SiteId,
        pin: CaPin,
        proxy: Option<Arc<Proxy>>,
        timeout: Option<Duration>,
    ) -> Self {
        let timeout = timeout.map_or(DIAL_TIMEOUT, |timeout| timeout.min(DIAL_TIMEOUT));
        let unconnected =
            if timeout < DIAL_TIMEOUT { Unconnected::Cut } else { Unconnected::Failed };
        let mut attempts = JoinSet::new();
        for endpoint in endpoints {
            let proxy = proxy.clone().filter(|proxy| proxy.is_for(endpoint));
            for carrier in [proxy.map_or(Carrier::Tcp, Carrier::Proxy), Carrier::Quic] {
                let endpoint = endpoint.clone();
                attempts.spawn(async move {
                    let unanswered = carrier.unanswered();
                    let connected = connect(&endpoint, carrier, issuer, pin);
                    let result = tokio::time::timeout(timeout, connected).await;
                    let result = match result {
                        Ok(ended) => ended.map_err(Unconnected::Failed),
                        Err(_) => Err(unconnected(unanswered)),
                    };
                    (endpoint, result)
                });
            }
        }
        Self { attempts, failures: Failures::default(), is_cut: false }
    }

    /// The next connection that comes about; `None` when all have failed.
    ///
    /// # Cancel safety
    /// Loses nothing.
    pub(super) async fn next(&mut self) -> Option<Connected> {
        while let Some(ended) = self.attempts.join_next().await {
            match ended {
                Ok((_, Ok(connected))) => return Some(connected),
                Ok((endpoint, Err(Unconnected::Failed(why)))) => self.failures.add(&endpoint, why),
                Ok((endpoint, Err(Unconnected::Cut(why)))) => {
                    self.is_cut = true;
                    self.failures.add(&endpoint, why);
                }
                Err(error) => tracing::error!(%error, "a dialling task broke"),
            }
        }
        None
    }
}

/// What carries the TLS bytes.
#[derive(Clone, Debug)]
enum Carrier {
    Tcp,
    /// TCP again, by name.
    Proxy(Arc<Proxy>),
    Quic,
}

impl Carrier {
    fn unanswered(&self) -> String {
        match self {
            Self::Proxy(proxy) => format!("unanswered through {}", proxy.url),
            Self::Tcp => "TCP unanswered (a firewall, or a wrong address)".to_owned(),
            Self::Quic => "UDP unanswered".to_owned(),
        }
    }
}

async fn connect(
    endpoint: &str,
    carrier: Carrier,
    issuer: SiteId,
    pin: CaPin,
) -> Result<Connected, String> {
    if let Carrier::Proxy(proxy) = &carrier {
        let stream = through(proxy, endpoint).await;
        let stream = stream.map_err(|why| format!("through {}: {why}", proxy.url))?;
        return secure(endpoint.to_owned(), Box::new(stream), None, issuer, pin).await;
    }
    let addresses: Vec<SocketAddr> = tokio::net::lookup_host(endpoint)
        .await
        .map_err(|error| format!("the name does not resolve ({error})"))?
        .take(ADDRESSES_MAX)
        .collect();
    let mut attempts = JoinSet::new();
    for addr in addresses {
        attempts.spawn(connect_to(endpoint.to_owned(), addr, carrier.clone(), issuer, pin));
    }
    let mut failures = Vec::new();
    while let Some(ended) = attempts.join_next().await {
        match ended {
            Ok(Ok(connected)) => return Ok(connected),
            Ok(Err(why)) if !failures.contains(&why) => failures.push(why),
            Ok(Err(_)) => {}
            Err(error) => tracing::error!(%error, "a dialling task broke"),
        }
    }
    Err(if failures.is_empty() {
        "the name has no address".to_owned()
    } else {
        failures.join(", ")
    })
}

async fn connect_to(
    endpoint: String,
    addr: SocketAddr,
    carrier: Carrier,
    issuer: SiteId,
    pin: CaPin,
) -> Result<Connected, String> {
    let (stream, quic): (Box<dyn Duplex>, _) = match carrier {
        Carrier::Tcp | Carrier::Proxy(_) => (Box::new(tcp(addr).await?), None),
        Carrier::Quic => {
            let (stream, quic) = quic(addr).await?;
            (Box::new(stream), Some(quic))
        }
    };
    secure(endpoint, stream, quic, issuer, pin).await
}

/// A tunnel through a proxy, which resolves the endpoint.
async fn through(proxy: &Proxy, endpoint: &str) -> Result<impl Duplex + use<>, String> {
    let resolved = tokio::net::lookup_host(proxy.url.endpoint()).await;
    let resolved = resolved.map_err(|error| format!("its name does not resolve ({error})"))?;
    let mut last = "its name has no address".to_owned();
    for addr in resolved.take(ADDRESSES_MAX) {
        match tcp(addr).await {
            Ok(stream) => {
                return proxy.tunnel(stream, endpoint).await.map_err(|error| error.to_string());
            }
            Err(why) => last = why,
        }
    }
    Err(last)
}

/// The handshake that tells whether the issuer answers.
async fn secure(
    endpoint: String,
    stream: Box<dyn Duplex>,
    quic: Option<quinn::Endpoint>,
    issuer: SiteId,
    pin: CaPin,
) -> Result<Connected, String> {
    let dial = claim_client(issuer, pin, time());
    // Balancers that pass TLS through route by it, as they do for links.
    let named = endpoint.rsplit_once(':').and_then(|(host, _)| {
        let name = ServerName::try_from(host.to_owned()).ok()?;
        matches!(name, ServerName::DnsName(_)).then_some(name)
    });
    let (dial, name) = match named {
        Some(name) => (dial.naming_server(), name),
        None => (dial, ServerName::try_from(SERVER_NAME).expect("invariant: a valid name")),
    };
    let tls = TlsConnector::from(Arc::clone(&dial.config)).connect(name, stream).await;
    match tls {
        Ok(stream) => Ok(Connected { stream, endpoint, _carrier: quic }),
        Err(error) => Err(match dial.refusal() {
            Some(refusal) => refusal.to_string(),
            None => explain(&error),
        }),
    }
}

async fn tcp(addr: SocketAddr) -> Result<tokio::net::TcpStream, String> {
    net::connect_tcp(addr, DIAL_TIMEOUT).await.map_err(|error| match error.kind() {
        io::ErrorKind::ConnectionRefused => "TCP refused (nothing listens there)".to_owned(),
        io::ErrorKind::TimedOut => Carrier::Tcp.unanswered(),
        _ => format!("TCP: {error}"),
    })
}

async fn quic(addr: SocketAddr) -> Result<(impl Duplex, quinn::Endpoint), String> {
    let local = |error: &dyn fmt::Display| format!("UDP: {error}");
    let socket = net::udp_towards(addr).map_err(|error| local(&error))?;
    let mut config = quinn::EndpointConfig::default();
    // The first byte tells QUIC and frames apart on the router's port.
    config.grease_quic_bit(false);
    let runtime = Arc::new(quinn::TokioRuntime);
    let endpoint =
        quinn::Endpoint::new(config, None, socket, runtime).map_err(|error| local(&error))?;
    let tls = claim_carrier_client(time());
    let tls = QuicClientConfig::try_from(Arc::clone(&tls.config)).map_err(|error| local(&error))?;
    let client = quinn::ClientConfig::new(Arc::new(tls));
    let connecting =
        endpoint.connect_with(client, addr, SERVER_NAME).map_err(|error| local(&error))?;
    let connection = connecting.await.map_err(|error| match error {
        quinn::ConnectionError::TimedOut => Carrier::Quic.unanswered(),
        other => local(&other),
    })?;
    let (send, recv) = connection.open_bi().await.map_err(|error| local(&error))?;
    Ok((tokio::io::join(recv, send), endpoint))
}

/// A TLS failure that is not about the issuer's certificate.
fn explain(error: &io::Error) -> String {
    let tls = error.get_ref().and_then(|inner| inner.downcast_ref::<rustls::Error>());
    match tls {
        Some(rustls::Error::AlertReceived(alert)) => match explain_alert(u8::from(*alert)) {
            Some(why) => why.to_owned(),
            None => format!("TLS refused by the peer ({alert:?}): not a Skein endpoint"),
        },
        Some(rustls::Error::InvalidMessage(_)) => {
            "something that does not speak TLS answers: not a Skein endpoint".to_owned()
        }
        Some(rustls::Error::NoApplicationProtocol) => {
            "a TLS server that is not Skein answers (a web server?)".to_owned()
        }
        Some(other) => format!("TLS: {other}"),
        None if error.kind() == io::ErrorKind::UnexpectedEof => {
            "the connection was closed during the TLS handshake: not a Skein endpoint, or its controller is down"
                .to_owned()
        }
        None => format!("the connection broke: {error}"),
    }
}
