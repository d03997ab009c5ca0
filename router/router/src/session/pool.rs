//! Which sessions there are: dialled, one at a time, and accepted.

use super::{
    Account, Class, Reservation, SESSION_BYTES, SessionsConfig,
    admission::{Admission, Slot, Verdict},
    connection::{Close, Peer, Session, Terms},
    control::{self, ControlError, ControlReader},
    transport::{self, Role},
};
use parking_lot::Mutex;
use quinn::crypto::rustls::{NoInitialCipherSuite, QuicClientConfig, QuicServerConfig};
use rustls_pki_types::CertificateDer;
use skein_core::{Fib, Handle, Pin, RouterId, SiteId, TrustView, parse_vaddr};
use skein_trust::{PeerError, peer_identity};
use skein_wire::proto::session::SessionHello;
use std::{
    collections::{BTreeMap, HashMap},
    sync::{Arc, Weak},
    time::Duration,
};
use tokio::{sync::watch, time::timeout};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tracing::Instrument as _;

mod dialling;

/// From the first packet to the peer's hello: a flow waits no longer for an egress either. Besides so many times as long as the path takes:
/// over a satellite that loses packets the handshake alone may take four tries.
const ESTABLISH_TIMEOUT: Duration = Duration::from_secs(5);
const ESTABLISH_TIMEOUT_RTTS: u32 = 16;
const ESTABLISH_TIMEOUT_MAX: Duration = Duration::from_secs(20);
/// Sessions of one peer that are accepted. It needs one per pin, and successors of those whose flows last.
const ACCEPTED_PER_PEER_MAX: usize = 16;

/// Sessions to one router and pin, for packets of so many sizes. Flows beyond do with packets that the fabric splits, where a path keeps
/// changing.
const SIZES_MAX: usize = 4;

/// Why there is no session to a router.
#[derive(Clone, Debug, thiserror::Error)]
pub enum DialError {
    /// The router is not in the network's view, or no path leads to it.
    #[error("there is no path to the router")]
    NoPath,
    /// The path led to an earlier boot of the router, or was lost: whoever waits begins anew.
    #[error("the path to the router has gone")]
    PathGone,
    /// This router stops.
    #[error("this router is shutting down")]
    Draining,
    /// The peer's certificate was refused.
    #[error(transparent)]
    Peer(#[from] PeerError),
    /// The peer did not answer in time.
    #[error("the router did not answer in time")]
    Timeout,
    /// At the ceiling of memory, or of what the peer's site may make this router hold.
    #[error("there is no memory for another session")]
    Overloaded,
    /// The connection failed.
    #[error("the connection failed: {0}")]
    Connection(Arc<str>),
}

/// Names a session at its initiator.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(super) struct Key {
    pub(super) router: RouterId,
    pub(super) handle: Handle,
    pub(super) pin: Pin,
    pub(super) class: Class,
}

/// Sessions by the order in which they began. No number is used again.
#[derive(Debug, Default)]
struct Running {
    begun: u64,
    sessions: BTreeMap<u64, Arc<Session>>,
}

type Dialled = Option<Result<Arc<Session>, DialError>>;

#[derive(Debug)]
pub(super) struct Pool {
    pub(super) config: SessionsConfig,
    dialled: Mutex<HashMap<Key, watch::Receiver<Dialled>>>,
    /// Every session, dialled or accepted, that runs: in the order in which they began, so that what is done to all of them is done in the
    /// same order in every run of a simulation.
    running: Mutex<Running>,
    accounts: Mutex<HashMap<(SiteId, Class), Weak<Account>>>,
    handshakes: Arc<Admission>,
    pub(super) tasks: TaskTracker,
    pub(super) stop: CancellationToken,
}

impl Pool {
    pub(super) fn start(config: SessionsConfig) -> Arc<Self> {
        // Without one an endpoint accepts nothing; what each connection gets depends on its path and replaces it in `admit`.
        let crypto = Arc::new(quic_server(&config.tls.session_server()));
        config.endpoint.set_server_config(Some(quinn::ServerConfig::with_crypto(crypto)));
        let pool = Arc::new(Self {
            config,
            dialled: Mutex::default(),
            running: Mutex::default(),
            accounts: Mutex::default(),
            handshakes: Arc::default(),
            tasks: TaskTracker::new(),
            stop: CancellationToken::new(),
        });
        pool.spawn(Arc::clone(&pool).accept());
        pool.spawn(Arc::clone(&pool).upkeep());
        pool
    }

    pub(super) fn spawn(&self, task: impl Future<Output = ()> + Send + 'static) {
        self.tasks.spawn_on(task, &self.config.surroundings.runtime);
    }

    pub(super) fn fib(&self) -> Arc<Fib> {
        Arc::clone(&self.config.surroundings.fib.borrow())
    }

    fn establish_timeout(&self, handle: Handle, pin: Pin) -> Duration {
        let path_us = self.fib().path(handle, pin).map_or(0, |path| path.metric_us);
        let most = ESTABLISH_TIMEOUT + ESTABLISH_TIMEOUT_RTTS * Duration::from_micros(path_us);
        most.min(ESTABLISH_TIMEOUT_MAX)
    }

    pub(super) fn trust(&self) -> Arc<TrustView> {
        Arc::clone(&self.config.surroundings.trust.borrow())
    }

    /// Both say hello at once; returns the peer's.
    async fn hello(
        &self,
        writer: &mut quinn::SendStream,
        reader: &mut ControlReader,
        pin: Pin,
        class: Class,
    ) -> Result<SessionHello, ControlError> {
        // Fails only on a stream that is gone, which the write reports.
        let _ = writer.set_priority(1);
        let boot_epoch = self.config.surroundings.local.boot_epoch;
        control::write_hello(writer, boot_epoch, pin, class).await?;
        reader.hello().await
    }

    fn session_of(
        &self,
        connection: quinn::Connection,
        peer: Peer,
        terms: Terms,
        paid: Reservation,
    ) -> Arc<Session> {
        let counters = Arc::clone(&self.config.surroundings.counters);
        Session::new(connection, peer, terms, paid, counters)
    }

    /// Pays for a session whose peer has not said yet what it is for.
    fn pay_before_hello(&self, site: SiteId) -> Option<Reservation> {
        let pay = |class| self.account(site, class).reserve(SESSION_BYTES);
        [Class::Streams, Class::Datagrams].into_iter().find_map(pay)
    }

    /// One for all sessions of this class with the routers of `site`.
    fn account(&self, site: SiteId, class: Class) -> Arc<Account> {
        let mut accounts = self.accounts.lock();
        accounts.retain(|_, account| account.strong_count() > 0);
        accounts.get(&(site, class)).and_then(Weak::upgrade).unwrap_or_else(|| {
            let account = Account::new(Arc::clone(&self.config.surroundings.budget), class);
            accounts.insert((site, class), Arc::downgrade(&account));
            account
        })
    }

    /// Who is at the other end, from the verified leaf.
    fn peer(
        &self,
        connection: &quinn::Connection,
        handle: Handle,
        pin: Pin,
    ) -> Result<Peer, PeerError> {
        let chain = connection.peer_identity().ok_or(PeerError::Missing)?;
        let chain =
            chain.downcast::<Vec<CertificateDer<'static>>>().map_err(|_| PeerError::Malformed)?;
        let identity = peer_identity(&chain)?;
        let router = identity.router.ok_or(PeerError::Malformed)?;
        Ok(Peer { router, site: identity.site, handle, pin })
    }

    async fn accept(self: Arc<Self>) {
        loop {
            let incoming = tokio::select! {
                incoming = self.config.endpoint.accept() => incoming, // cancel-safe
                () = self.stop.cancelled() => return,
            };
            let Some(incoming) = incoming else { return };
            let Some((handle, pin)) = parse_vaddr(&incoming.remote_address()) else {
                incoming.ignore();
                continue;
            };
            let fib = self.fib();
            // Without a route our answer would not get there.
            let route = fib.handles.get(&handle).and_then(|router| fib.routes.get(router));
            let verdict = route.map(|route| {
                let is_proven = incoming.remote_address_validated();
                self.handshakes.enter(route.router, route.site, is_proven)
            });
            match verdict {
                Some(Verdict::Enter(slot)) => {
                    self.spawn(Arc::clone(&self).admit_and_run(incoming, handle, pin, slot));
                }
                Some(Verdict::Prove) => {
                    incoming.retry().expect("invariant: what is not validated may be retried");
                }
                // Its first packet comes again: by then we may have heard of it, or have time.
                Some(Verdict::Ignore) | None => incoming.ignore(),
            }
        }
    }

    async fn admit_and_run(
        self: Arc<Self>,
        incoming: quinn::Incoming,
        handle: Handle,
        pin: Pin,
        slot: Slot,
    ) {
        let most = self.establish_timeout(handle, pin);
        let admitted = timeout(most, self.admit(incoming, handle, pin)).await;
        drop(slot);
        match admitted.unwrap_or(Err(DialError::Timeout)) {
            Ok((session, writer, reader)) => self.run(session, writer, reader).await,
            Err(error) => {
                self.config.surroundings.counters.sessions_failed.add(1);
                tracing::debug!(handle = handle.0, %error, "session not accepted");
            }
        }
    }

    async fn admit(
        &self,
        incoming: quinn::Incoming,
        handle: Handle,
        pin: Pin,
    ) -> Result<(Arc<Session>, quinn::SendStream, ControlReader), DialError> {
        let failed =
            |error: &dyn std::error::Error| DialError::Connection(error.to_string().into());
        let fib = self.fib();
        let crypto = Arc::new(quic_server(&self.config.tls.session_server()));
        let mut config = quinn::ServerConfig::with_crypto(crypto);
        let path = fib.path(handle, pin);
        config.migration(false).transport_config(transport::transport(
            Role::Responder,
            Class::Streams,
            path,
        ));
        let connecting = incoming.accept_with(Arc::new(config)).map_err(|e| failed(&e))?;
        let connection = connecting.await.map_err(|e| failed(&e))?;
        let peer = self.peer(&connection, handle, pin)?;
        if !is_current(&peer, &self.fib(), &self.trust()) {
            connection
                .close(Close::Stale.code(), b"handle and certificate are of different routers");
            return Err(DialError::NoPath);
        }
        let paid = self.pay_before_hello(peer.site).ok_or_else(|| overloaded(&connection))?;
        let (mut writer, reader) = connection.accept_bi().await.map_err(|e| failed(&e))?;
        let mut reader = ControlReader::new(reader);
        let hello = self.hello(&mut writer, &mut reader, pin, Class::Streams);
        let hello = hello.await.map_err(|e| failed(&e))?;
        let class = if hello.datagrams { Class::Datagrams } else { Class::Streams };
        let paid = paid.settled(&self.account(peer.site, class), class.held_bytes());
        let paid = paid.ok_or_else(|| overloaded(&connection))?;
        let terms = Terms::new(Role::Responder, class, transport::mtu(path), &hello);
        Ok((self.session_of(connection, peer, terms, paid), writer, reader))
    }

    async fn run(&self, session: Arc<Session>, writer: quinn::SendStream, reader: ControlReader) {
        self.config.surroundings.counters.sessions_opened.add(1);
        let id = {
            let mut running = self.running.lock();
            running.begun += 1;
            let id = running.begun;
            running.sessions.insert(id, Arc::clone(&session));
            id
        };
        if !is_current(&session.peer, &self.fib(), &self.trust()) {
            // The view changed during the handshake.
            session.close(Close::Stale);
        }
        if session.terms.role == Role::Responder
            && self.accepted(session.peer.router).count() > ACCEPTED_PER_PEER_MAX
        {
            // Not an older one, whose flows are well.
            session.close(Close::TooMany);
        }
        let span =
            tracing::info_span!("session", peer = %session.peer.router, pin = session.peer.pin.0);
        let run = session.run(writer, reader, |flow| self.config.egress.serve(flow));
        run.instrument(span).await;
        self.running.lock().sessions.remove(&id);
    }

    fn accepted(&self, from: RouterId) -> impl Iterator<Item = Arc<Session>> {
        let is_accepted = move |session: &Arc<Session>| {
            session.terms.role == Role::Responder && session.peer.router == from
        };
        self.sessions().into_iter().filter(is_accepted)
    }

    /// Whether new flows of the peer had better come in another session than `old`, whose packets have the wrong size, and it has none.
    pub(super) fn wants_another(&self, old: &Session, path_mtu: u16) -> bool {
        let same: Vec<_> =
            self.accepted(old.peer.router).filter(|other| is_same(other, old)).collect();
        let fits = |other: &Arc<Session>| other.is_usable() && !other.is_outgrown(path_mtu);
        same.len() < SIZES_MAX && !same.iter().any(fits)
    }

    pub(super) fn sessions(&self) -> Vec<Arc<Session>> {
        self.running.lock().sessions.values().cloned().collect()
    }

    /// The same with what names each of them.
    pub(super) fn numbered_sessions(&self) -> Vec<(u64, Arc<Session>)> {
        let running = self.running.lock();
        running.sessions.iter().map(|(id, session)| (*id, Arc::clone(session))).collect()
    }
}

fn overloaded(connection: &quinn::Connection) -> DialError {
    let close = Close::Overloaded;
    connection.close(close.code(), close.reason().as_bytes());
    DialError::Overloaded
}

/// Whether the two are for the same flows.
fn is_same(one: &Session, other: &Session) -> bool {
    one.peer == other.peer && one.terms.class == other.terms.class
}

/// Whether the peer's handle is still that of the same router, and its site trusted.
pub(super) fn is_current(peer: &Peer, fib: &Fib, trust: &TrustView) -> bool {
    fib.handles.get(&peer.handle) == Some(&peer.router) && trust.site(peer.site).is_some()
}

fn quic_client(config: &Arc<rustls::ClientConfig>) -> QuicClientConfig {
    QuicClientConfig::try_from(Arc::clone(config)).unwrap_or_else(|error| no_quic(&error))
}

fn quic_server(config: &Arc<rustls::ServerConfig>) -> QuicServerConfig {
    QuicServerConfig::try_from(Arc::clone(config)).unwrap_or_else(|error| no_quic(&error))
}

fn no_quic(_: &NoInitialCipherSuite) -> ! {
    unreachable!("invariant: the provider has TLS13_AES_128_GCM_SHA256")
}
