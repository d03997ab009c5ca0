//! One port of a listener: open while somebody serves it, closed otherwise.

use super::{
    Ingress,
    attempt::Opening,
    datagrams::{Newcomers, Open},
    holder,
};
use crate::net::{self, ServiceSocket, TcpListener};
use parking_lot::Mutex;
use skein_core::{Address, Fib, Port, Protocol, RouterId};
use skein_wire::proto::{
    control::{ListenerPort, ListenerPortStatus},
    routing,
};
use std::{
    io,
    net::{IpAddr, SocketAddr},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};
use tokio::{sync::watch, time::sleep};

/// Between attempts to bind a port that somebody else holds.
const BIND_RETRY: Duration = Duration::from_secs(5);
/// The first attempts come faster, because the holder may be a listener of our own that is about to close.
const BIND_RETRY_SOON: Duration = Duration::from_millis(100);
const BIND_RETRIES_SOON: u32 = 3;
/// A provider whose path is lost has so long to come back until clients are turned away.
const PATH_LOST_MAX: Duration = Duration::from_secs(2);
/// Accepting pauses when descriptors or memory run out, doubling up to the second.
const ACCEPT_PAUSE_MIN: Duration = Duration::from_millis(50);
const ACCEPT_PAUSE_MAX: Duration = Duration::from_secs(1);

/// What makes one socket different from another.
#[derive(Clone, PartialEq, Debug)]
pub(super) struct Endpoint {
    pub(super) address: String,
    pub(super) host: String,
    pub(super) port: ListenerPort,
}

/// A socket as it is now.
#[derive(Clone, Debug, Default)]
struct State {
    bound: Option<SocketAddr>,
    fallback: bool,
    error: String,
}

#[derive(Debug)]
pub(super) struct Listener {
    pub(super) endpoint: Endpoint,
    state: Mutex<State>,
    /// Flows accepted so far.
    turn: AtomicU64,
}

/// Why an endpoint cannot be listened on, whatever happens.
#[derive(Debug, thiserror::Error)]
enum EndpointError {
    #[error("{0:?} is not an address")]
    Address(String),
    #[error("{0:?} is not an IP address of this host")]
    Host(String),
    #[error("{0} is not a port")]
    Port(u32),
}

#[derive(Debug)]
struct Parsed {
    address: Address,
    service: Port,
    local: SocketAddr,
    fallback: Option<SocketAddr>,
}

impl Endpoint {
    fn parse(&self) -> Result<Parsed, EndpointError> {
        let port = |port: u32| u16::try_from(port).map_err(|_| EndpointError::Port(port));
        let protocol = match self.port.protocol() {
            routing::Protocol::Udp => Protocol::Udp,
            routing::Protocol::Tcp | routing::Protocol::Unspecified => Protocol::Tcp,
        };
        let address =
            self.address.parse().map_err(|_| EndpointError::Address(self.address.clone()))?;
        let host: IpAddr = self.host.parse().map_err(|_| EndpointError::Host(self.host.clone()))?;
        let fallback = port(self.port.fallback_port)?;
        Ok(Parsed {
            address,
            service: Port { port: port(self.port.port)?, protocol },
            local: SocketAddr::new(host, port(self.port.local_port)?),
            fallback: (fallback > 0).then_some(SocketAddr::new(host, fallback)),
        })
    }
}

/// A socket that is open.
enum Bound {
    Tcp(TcpListener),
    Udp(ServiceSocket),
}

impl Bound {
    fn new(protocol: Protocol, at: SocketAddr) -> io::Result<Self> {
        Ok(match protocol {
            Protocol::Tcp => Self::Tcp(net::tcp_listen(at)?),
            Protocol::Udp => Self::Udp(ServiceSocket::bind(at)?),
        })
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        match self {
            Self::Tcp(socket) => socket.local_addr(),
            Self::Udp(socket) => socket.local_addr(),
        }
    }
}

impl Listener {
    pub(super) fn new(endpoint: Endpoint) -> Arc<Self> {
        Arc::new(Self { endpoint, state: Mutex::default(), turn: AtomicU64::new(0) })
    }

    pub(super) fn status(&self) -> ListenerPortStatus {
        let state = self.state.lock().clone();
        ListenerPortStatus {
            port: self.endpoint.port.port,
            bound: state.bound.map(|bound| bound.to_string()).unwrap_or_default(),
            error: state.error,
            protocol: self.endpoint.port.protocol,
            fallback: state.fallback,
        }
    }

    /// Opens and closes the socket as providers come and go, for as long as it is polled.
    pub(super) async fn run(&self, ingress: &Ingress) {
        let parsed = match self.endpoint.parse() {
            Ok(parsed) => parsed,
            Err(error) => {
                self.state.lock().error = error.to_string();
                return;
            }
        };
        let mut fib = ingress.0.config.surroundings.services.clone();
        let mut failures = 0;
        loop {
            if fib.wait_for(|fib| !providers(fib, &parsed).is_empty()).await.is_err() {
                return;
            }
            match self.bind(&parsed) {
                Ok(socket) => {
                    failures = 0;
                    match socket {
                        Bound::Tcp(socket) => {
                            self.accept(ingress, &parsed, socket, &mut fib).await;
                        }
                        Bound::Udp(socket) => {
                            self.receive(ingress, &parsed, socket, &mut fib).await;
                        }
                    }
                    *self.state.lock() = State::default();
                    tracing::info!(address = %parsed.address, port = parsed.service.port, "listener closed");
                }
                Err(error) => {
                    self.report(&parsed, error).await;
                    failures += 1;
                    let soon = failures <= BIND_RETRIES_SOON;
                    sleep(if soon { BIND_RETRY_SOON } else { BIND_RETRY }).await;
                }
            }
        }
    }

    fn bind(&self, parsed: &Parsed) -> io::Result<Bound> {
        let mut fallback = false;
        let protocol = parsed.service.protocol;
        let socket = match (Bound::new(protocol, parsed.local), parsed.fallback) {
            (Err(_taken), Some(second)) => {
                fallback = true;
                Bound::new(protocol, second)?
            }
            (outcome, _) => outcome?,
        };
        let bound = socket.local_addr()?;
        tracing::info!(address = %parsed.address, port = parsed.service.port, %bound, fallback, "listener open");
        *self.state.lock() = State { bound: Some(bound), fallback, error: String::new() };
        Ok(socket)
    }

    async fn report(&self, parsed: &Parsed, error: io::Error) {
        let local = parsed.local;
        let mut text = format!("{local}: {error}");
        if error.kind() == io::ErrorKind::AddrInUse {
            let protocol = parsed.service.protocol;
            let find = move || holder::holder(protocol, local.port());
            let holder = tokio::task::spawn_blocking(find).await;
            if let Ok(Some(holder)) = holder {
                text = format!("{local} is held by {holder}");
            }
        }
        let mut state = self.state.lock();
        if state.error != text {
            tracing::warn!(address = %parsed.address, error = text, "cannot listen");
            state.error = text;
        }
    }

    /// Accepts clients until nobody serves them any more.
    async fn accept(
        &self,
        ingress: &Ingress,
        parsed: &Parsed,
        socket: TcpListener,
        fib: &mut watch::Receiver<Arc<Fib>>,
    ) {
        let mut pause = ACCEPT_PAUSE_MIN;
        let unserved = unserved(fib, parsed);
        let mut unserved = std::pin::pin!(unserved);
        loop {
            let accepted = tokio::select! {
                biased;
                () = &mut unserved => return,
                accepted = socket.accept() => accepted, // cancel-safe
            };
            match accepted {
                Ok((client, from)) => {
                    pause = ACCEPT_PAUSE_MIN;
                    ingress.start_flow(self.opening(parsed, from), client);
                }
                Err(error) if net::is_exhaustion(&error) => {
                    tracing::warn!(%error, pause_ms = pause.as_millis(), "accepting pauses");
                    sleep(pause).await;
                    pause = (pause * 2).min(ACCEPT_PAUSE_MAX);
                }
                // The client went away while it waited in the backlog.
                Err(error) => tracing::debug!(%error, "a client was not accepted"),
            }
        }
    }

    /// Hears clients until nobody serves them any more. Associations that run go on, and keep the socket open.
    async fn receive(
        &self,
        ingress: &Ingress,
        parsed: &Parsed,
        socket: ServiceSocket,
        fib: &mut watch::Receiver<Arc<Fib>>,
    ) {
        let open = Open::new(socket, ingress);
        let opening = |with: net::Conversation| self.opening(parsed, with.client);
        loop {
            tokio::select! {
                () = unserved(fib, parsed) => {} // cancel-safe
                () = open.receive(Newcomers::Served(&opening)) => {}
            }
            tokio::select! {
                biased;
                () = open.emptied() => return,
                served = fib.wait_for(|fib| !providers(fib, parsed).is_empty()) => {
                    if served.is_err() {
                        return;
                    }
                }
                () = open.receive(Newcomers::Ignored) => {}
            }
        }
    }

    fn opening(&self, parsed: &Parsed, client_address: SocketAddr) -> Opening {
        Opening {
            address: parsed.address.clone(),
            service: parsed.service,
            client_address,
            turn: self.turn.fetch_add(1, Ordering::Relaxed),
        }
    }
}

/// Completes when nobody serves the port: at once when it was withdrawn, after a while when only paths were lost.
async fn unserved(fib: &mut watch::Receiver<Arc<Fib>>, parsed: &Parsed) {
    let mut last = Vec::new();
    loop {
        let lost = {
            let fib = fib.borrow_and_update();
            let now = providers(&fib, parsed);
            let served = !now.is_empty();
            if served {
                last = now;
            }
            let reachable =
                |router: &RouterId| fib.is_local(*router) || fib.routes.contains_key(router);
            if served { None } else { Some(!last.iter().all(reachable)) }
        };
        match lost {
            Some(false) => return,
            Some(true) => {
                let back = fib.wait_for(|fib| !providers(fib, parsed).is_empty());
                if !matches!(tokio::time::timeout(PATH_LOST_MAX, back).await, Ok(Ok(_))) {
                    return;
                }
            }
            None => {
                if fib.changed().await.is_err() {
                    return;
                }
            }
        }
    }
}

fn providers(fib: &Fib, parsed: &Parsed) -> Vec<RouterId> {
    let providers = fib.addresses.get(&parsed.address).map_or(&[][..], |providers| providers);
    let serving = providers.iter().filter(|p| p.entry.ports.contains(&parsed.service));
    serving.map(|provider| provider.router).collect()
}
