//! One place where flows can leave: `host:port`.

use super::{health::Health, name::Name};
use crate::net::{self, TargetSocket, TcpStream};
use parking_lot::Mutex;
use siphasher::sip::SipHasher24;
use skein_core::{Protocol, SiteId};
use skein_wire::proto::{control::TargetStatus, routing, session::refused::Reason};
use std::{
    hash::{Hash as _, Hasher as _},
    io,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    sync::Arc,
    time::{Duration, Instant},
};
use tokio::{sync::Notify, time::timeout};

/// Addresses of a name that are tried for one flow.
const ADDRESSES_MAX: usize = 8;
/// A target of datagrams that has refused one is thought to do so for so long, unless it answers.
const REFUSING_FOR: Duration = Duration::from_secs(10);

/// Why no connection to a target came about.
#[derive(Debug, thiserror::Error)]
pub(super) enum ConnectError {
    #[error("{host} does not resolve: {source}")]
    Unresolved { host: String, source: Arc<io::Error> },
    #[error("no answer within {} ms", .0.as_millis())]
    Timeout(Duration),
    #[error("{0}")]
    Io(#[from] io::Error),
}

impl ConnectError {
    /// As told to the ingress.
    pub(super) fn reason(&self) -> Reason {
        match self {
            error if error.is_ours() => Reason::Overloaded,
            Self::Unresolved { .. } => Reason::TargetUnresolved,
            Self::Io(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
                Reason::TargetRefused
            }
            Self::Timeout(_) | Self::Io(_) => Reason::TargetUnreachable,
        }
    }

    /// Whether this router failed, for lack of something that every target needs, so that it says nothing about the target.
    fn is_ours(&self) -> bool {
        match self {
            Self::Timeout(_) => false,
            Self::Unresolved { source, .. } => net::is_exhaustion(source),
            Self::Io(error) => net::is_exhaustion(error) || net::is_out_of_ports(error),
        }
    }
}

/// What a target is: the port of a host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Place {
    pub(super) host: String,
    pub(super) port: u16,
    pub(super) protocol: Protocol,
}

#[derive(Debug)]
pub(super) struct Target {
    place: Place,
    connect_timeout: Duration,
    observed: Mutex<Observed>,
    /// Asks for a check at once.
    doubted: Notify,
    name: Name,
}

#[derive(Debug, Default)]
struct Observed {
    health: Health,
    error: String,
    checked: Option<Instant>,
    /// A datagram was, and none has been answered since.
    refused: Option<Instant>,
}

impl Target {
    pub(super) fn new(place: Place, connect_timeout: Duration) -> Arc<Self> {
        let (observed, doubted) = (Mutex::default(), Notify::new());
        let name = Name::default();
        Arc::new(Self { place, connect_timeout, observed, doubted, name })
    }

    pub(super) fn is_up(&self) -> bool {
        self.observed.lock().health.is_up()
    }

    pub(super) fn is_unknown(&self) -> bool {
        self.observed.lock().health.is_unknown()
    }

    /// Whether it is this place, reached in this way.
    pub(super) fn is(&self, place: &Place, connect_timeout: Duration) -> bool {
        self.place == *place && self.connect_timeout == connect_timeout
    }

    /// Whether it has refused datagrams lately.
    pub(super) fn is_refusing(&self) -> bool {
        let refused = self.observed.lock().refused;
        refused.is_some_and(|at| crate::clock::now().saturating_duration_since(at) < REFUSING_FOR)
    }

    /// The network said of a datagram that it does not arrive. That is noted and no more: the next one may, as ever with datagrams.
    pub(super) fn refused(&self, error: &io::Error) {
        let mut observed = self.observed.lock();
        if observed.refused.replace(crate::clock::now()).is_none() {
            tracing::info!(to = %self.name(), %error, "target refuses datagrams");
        }
        observed.error = error.to_string();
    }

    /// A datagram came from it.
    pub(super) fn answered(&self) {
        let mut observed = self.observed.lock();
        if observed.refused.take().is_some() {
            observed.error.clear();
        }
    }

    pub(super) fn status(&self) -> TargetStatus {
        let observed = self.observed.lock();
        TargetStatus {
            target: self.name(),
            healthy: observed.health.is_up(),
            error: observed.error.clone(),
            protocol: match self.place.protocol {
                Protocol::Tcp => routing::Protocol::Tcp.into(),
                Protocol::Udp => routing::Protocol::Udp.into(),
            },
        }
    }

    fn name(&self) -> String {
        // IPv6 addresses need brackets before a port.
        let Place { host, port, .. } = &self.place;
        match host.parse::<IpAddr>() {
            Ok(ip) => SocketAddr::new(ip, *port).to_string(),
            Err(_name) => format!("{host}:{port}"),
        }
    }

    /// Connects, and takes the result as a check of the target's health.
    ///
    /// # Cancel safety
    /// Dropping the future closes the socket.
    pub(super) async fn connect(&self, source: Option<SiteId>) -> Result<TcpStream, ConnectError> {
        let outcome = self.try_connect(source).await;
        self.observe(outcome.as_ref().err());
        outcome
    }

    /// Takes note of how a connect ended.
    fn observe(&self, error: Option<&ConnectError>) {
        let mut observed = self.observed.lock();
        observed.checked = Some(crate::clock::now());
        if let Some(error) = error.filter(|error| error.is_ours()) {
            tracing::warn!(%error, "this router cannot connect to its targets");
            observed.error = error.to_string();
            return;
        }
        observed.health.observe(error.is_none());
        if error.is_some() || observed.refused.is_none() {
            observed.error = error.map(ToString::to_string).unwrap_or_default();
        }
        if error.is_some() {
            self.name.doubt();
            self.doubted.notify_one();
        }
    }

    async fn try_connect(&self, source: Option<SiteId>) -> Result<TcpStream, ConnectError> {
        let mut last = None::<ConnectError>;
        for &address in self.resolve().await?.iter().take(ADDRESSES_MAX) {
            let from = source.filter(|_| is_loopback_v4(address)).map(source_address);
            let connecting = timeout(self.connect_timeout, net::tcp_connect(address, from));
            let error = match connecting.await {
                Ok(Ok(stream)) => return Ok(stream),
                Ok(Err(error)) => error.into(),
                Err(_elapsed) => ConnectError::Timeout(self.connect_timeout),
            };
            // What one address says of the target counts more than that we could not ask another.
            if last.is_none() || !error.is_ours() {
                last = Some(error);
            }
        }
        Err(last.unwrap_or_else(|| io::Error::from(io::ErrorKind::NotFound).into()))
    }

    async fn resolve(&self) -> Result<Arc<[SocketAddr]>, ConnectError> {
        let Place { host, port, .. } = &self.place;
        if let Ok(ip) = host.parse::<IpAddr>() {
            return Ok(Arc::new([SocketAddr::new(ip, *port)]));
        }
        let name = self.name();
        let lookup = || net::look_up(name.clone());
        let resolved = self.name.resolve(lookup).await;
        resolved.map_err(|source| ConnectError::Unresolved { host: host.clone(), source })
    }

    /// Opens a socket towards it for datagrams. That it can be opened says that its name resolves, and nothing more.
    ///
    /// # Cancel safety
    /// Dropping the future closes the socket.
    pub(super) async fn open_datagrams(
        &self,
        source: Option<SiteId>,
    ) -> Result<TargetSocket, ConnectError> {
        let outcome = self.try_open_datagrams(source).await;
        self.observe(outcome.as_ref().err());
        outcome
    }

    async fn try_open_datagrams(
        &self,
        source: Option<SiteId>,
    ) -> Result<TargetSocket, ConnectError> {
        let mut last = io::Error::from(io::ErrorKind::NotFound);
        for &address in self.resolve().await?.iter().take(ADDRESSES_MAX) {
            let from = source.filter(|_| is_loopback_v4(address)).map(source_address);
            match TargetSocket::connect(address, from) {
                Ok(socket) => return Ok(socket),
                Err(error) => last = error,
            }
        }
        Err(last.into())
    }

    /// Checks the target for as long as it is polled, and tells `changed` when it comes up or goes down.
    pub(super) async fn check(&self, changed: impl Fn()) {
        let mut told = None;
        loop {
            // The result is recorded; the connection itself is of no use.
            match self.place.protocol {
                Protocol::Tcp => drop(self.connect(None).await),
                Protocol::Udp => drop(self.open_datagrams(None).await),
            }
            // Compared with what was told, because a flow may have made the difference since the last check.
            let up = self.is_up();
            if told.replace(up) != Some(up) {
                tracing::info!(to = %self.name(), up, "target changed");
                changed();
            }
            self.due().await;
        }
    }

    /// Waits until the next check is due: a flow that connected put it off, one that failed brought it forward.
    async fn due(&self) {
        loop {
            let (interval, checked) = {
                let observed = self.observed.lock();
                (observed.health.interval(), observed.checked)
            };
            let since = checked.map(|at| crate::clock::now().saturating_duration_since(at));
            let left = interval.saturating_sub(since.unwrap_or(interval));
            if left.is_zero() {
                return;
            }
            tokio::select! {
                () = tokio::time::sleep(left) => {} // cancel-safe
                () = self.doubted.notified() => {} // cancel-safe
            }
        }
    }
}

fn is_loopback_v4(address: SocketAddr) -> bool {
    matches!(address.ip(), IpAddr::V4(ip) if ip.is_loopback())
}

/// The address in 127.128.0.0/9 from which flows of `site` come, the same at every router and after every restart.
fn source_address(site: SiteId) -> IpAddr {
    let mut hasher = SipHasher24::new();
    site.0.hash(&mut hasher);
    let [a, b, c, ..] = hasher.finish().to_be_bytes();
    // Neither the network's nor its broadcast address.
    let c = c.clamp(1, 254);
    IpAddr::V4(Ipv4Addr::new(127, 128 | a, b, c))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tcp(host: &str, port: u16) -> Place {
        Place { host: host.into(), port, protocol: Protocol::Tcp }
    }

    #[tokio::test]
    async fn a_refused_target_goes_down_and_comes_back() {
        let listener = net::tcp_listen("127.0.0.1:0".parse().unwrap()).unwrap();
        let port = listener.local_addr().unwrap().port();
        let target = Target::new(tcp("127.0.0.1", port), Duration::from_secs(1));
        target.connect(None).await.unwrap();
        assert!(target.is_up());
        drop(listener);
        for _ in 0..2 {
            let error = target.connect(None).await.unwrap_err();
            assert_eq!(error.reason(), Reason::TargetRefused);
        }
        assert!(!target.is_up());
        assert_ne!(target.status().error, "");
        let _listener = net::tcp_listen(([127, 0, 0, 1], port).into()).unwrap();
        for _ in 0..2 {
            target.connect(None).await.unwrap();
        }
        assert!(target.is_up());
    }

    #[tokio::test]
    async fn what_this_router_lacks_is_not_held_against_the_target() {
        use rustix::io::Errno;
        let target = Target::new(tcp("127.0.0.1", 1), Duration::from_secs(1));
        target.observe(None);
        for errno in [Errno::MFILE, Errno::NFILE, Errno::NOBUFS, Errno::NOMEM, Errno::ADDRNOTAVAIL]
        {
            for _ in 0..3 {
                let error = ConnectError::from(io::Error::from(errno));
                target.observe(Some(&error));
                assert_eq!(error.reason(), Reason::Overloaded);
            }
            assert!(target.is_up(), "{errno}");
        }
        for _ in 0..2 {
            target.observe(Some(&io::Error::from(Errno::CONNREFUSED).into()));
        }
        assert!(!target.is_up());
    }

    #[tokio::test]
    async fn a_name_that_does_not_resolve_is_an_error_not_a_crash() {
        let target = Target::new(tcp("no such host", 1), Duration::from_secs(1));
        let error = target.connect(None).await.unwrap_err();
        assert_eq!(error.reason(), Reason::TargetUnresolved);
    }

    #[tokio::test]
    async fn sites_have_source_addresses_of_their_own() {
        let listener = net::tcp_listen("127.0.0.1:0".parse().unwrap()).unwrap();
        let port = listener.local_addr().unwrap().port();
        let target = Target::new(tcp("127.0.0.1", port), Duration::from_secs(1));
        let site = SiteId([7; 32]);
        let _stream = target.connect(Some(site)).await.unwrap();
        let (_, from) = listener.accept().await.unwrap();
        assert_eq!(from.ip(), source_address(site));
        let IpAddr::V4(ip) = from.ip() else { panic!("not IPv4") };
        assert!(ip.octets()[0] == 127 && ip.octets()[1] >= 128);
        assert_ne!(source_address(site), source_address(SiteId([8; 32])));
    }
}
