//! Dialling sessions: one at a time for a router, a pin and a class, and successors where packets of another size pass.

use super::{
    super::{
        Class,
        connection::{Session, Terms},
        control::ControlReader,
        transport::{self, Role},
    },
    DialError, Dialled, Key, Pool, SIZES_MAX, overloaded, quic_client,
};
use skein_core::{Fib, Pin, RouterId, vaddr};
use skein_trust::SERVER_NAME;
use std::sync::{Arc, atomic::Ordering};
use tokio::{sync::watch, time::timeout};

/// A session whose peer has said hello, and both ways of its control stream.
type Opened = (Arc<Session>, quinn::SendStream, ControlReader);

impl Pool {
    /// The session to `router` under `pin` for flows of this class, dialled if there is none.
    pub(in super::super) async fn session(
        self: &Arc<Self>,
        router: RouterId,
        pin: Pin,
        class: Class,
    ) -> Result<Arc<Session>, DialError> {
        loop {
            let fib = self.fib();
            let route = fib.routes.get(&router).ok_or(DialError::NoPath)?;
            let key = Key { router, handle: route.handle, pin, class };
            let mut dialled = self.dialled_or_dial(key)?;
            let dialled = dialled.wait_for(Option::is_some).await;
            let dialled = dialled
                .map_err(|_closed| DialError::Draining)?
                .clone()
                .expect("invariant: waited until there was an outcome");
            match dialled {
                Ok(session) => {
                    session.note_use();
                    return Ok(session);
                }
                Err(DialError::PathGone) => {}
                Err(error) => return Err(error),
            }
        }
    }

    /// The dial of `key` that succeeded or goes on, or a new one. It runs on its own, so that a waiter that gives up takes nothing from
    /// the others.
    fn dialled_or_dial(self: &Arc<Self>, key: Key) -> Result<watch::Receiver<Dialled>, DialError> {
        if self.stop.is_cancelled() {
            return Err(DialError::Draining);
        }
        let mut dialled = self.dialled.lock();
        if let Some(dial) = dialled.get(&key) {
            let serves = match &*dial.borrow() {
                None => true,
                Some(outcome) => outcome.as_ref().is_ok_and(|session| session.is_usable()),
            };
            if serves {
                return Ok(dial.clone());
            }
        }
        if let Some(spare) = self.spare(key) {
            let (_, receiver) = watch::channel(Some(Ok(spare)));
            dialled.insert(key, receiver.clone());
            return Ok(receiver);
        }
        let (outcome, receiver) = watch::channel(None);
        dialled.insert(key, receiver.clone());
        self.spawn(Arc::clone(self).dial_and_run(key, outcome));
        Ok(receiver)
    }

    async fn dial_and_run(self: Arc<Self>, key: Key, outcome: watch::Sender<Dialled>) {
        match self.dial_in_time(key).await {
            Ok((session, writer, reader)) => {
                tracing::info!(peer = %key.router, site = %session.peer.site, pin = key.pin.0, "session opened");
                outcome.send_replace(Some(Ok(Arc::clone(&session))));
                self.run(session, writer, reader).await;
            }
            Err(error) => {
                tracing::debug!(peer = %key.router, pin = key.pin.0, %error, "session not opened");
                self.config.surroundings.counters.sessions_failed.add(1);
                outcome.send_replace(Some(Err(error)));
            }
        }
        self.forget(key);
    }

    /// Forgets how the dial of `key` ended if nothing came of it, or no more will.
    fn forget(&self, key: Key) {
        let mut dialled = self.dialled.lock();
        let is_over = |dial: &watch::Receiver<Dialled>| match &*dial.borrow() {
            None => false,
            Some(Ok(session)) => session.connection.close_reason().is_some(),
            Some(Err(_)) => true,
        };
        if dialled.get(&key).is_some_and(is_over) {
            dialled.remove(&key);
        }
    }

    /// Sessions that this router has dialled to `key`, the one for new flows among them.
    fn ours(&self, key: Key) -> impl Iterator<Item = Arc<Session>> {
        let is_ours = move |session: &Arc<Session>| {
            session.terms.role == Role::Initiator && session.key() == key
        };
        self.sessions().into_iter().filter(is_ours)
    }

    /// One of them whose packets are of the size that the path has now: it had that before.
    fn spare(&self, key: Key) -> Option<Arc<Session>> {
        let mtu = transport::mtu(self.fib().path(key.handle, key.pin));
        self.ours(key).find(|session| session.is_usable() && !session.is_outgrown(mtu))
    }

    /// Lets new flows have a session whose packets have the right size, if `old` is the one that they have now: one that is left from
    /// before, or a new one, unless there are many.
    pub(in super::super) fn replace(self: &Arc<Self>, old: Arc<Session>) {
        let key = old.key();
        let mut dialled = self.dialled.lock();
        let is_for_new_flows = dialled.get(&key).is_some_and(
            |dial| matches!(&*dial.borrow(), Some(Ok(session)) if Arc::ptr_eq(session, &old)),
        );
        if !is_for_new_flows {
            return;
        }
        if let Some(spare) = self.spare(key) {
            tracing::debug!(peer = %key.router, pin = key.pin.0, mtu = spare.terms.path_mtu, "session resumed");
            dialled.insert(key, watch::channel(Some(Ok(spare))).1);
        } else if self.ours(key).count() < SIZES_MAX
            && !old.is_succeeded.swap(true, Ordering::Relaxed)
        {
            self.spawn(Arc::clone(self).succeed(old));
        }
    }

    /// Dials a session that takes the place of `old` for new flows, and runs it. Until it is there, and if it does not come about, `old`
    /// goes on.
    async fn succeed(self: Arc<Self>, old: Arc<Session>) {
        let key @ Key { router, pin, .. } = old.key();
        let dialled = self.dial_in_time(key).await;
        old.is_succeeded.store(false, Ordering::Relaxed);
        drop(old);
        let (session, writer, reader) = match dialled {
            Ok(dialled) => dialled,
            Err(error) => {
                tracing::debug!(peer = %router, pin = pin.0, %error, "session keeps its packet size");
                self.config.surroundings.counters.sessions_failed.add(1);
                return;
            }
        };
        tracing::info!(peer = %router, pin = pin.0, mtu = session.terms.path_mtu, "session succeeded");
        self.dialled.lock().insert(key, watch::channel(Some(Ok(Arc::clone(&session)))).1);
        self.run(session, writer, reader).await;
        self.forget(key);
    }

    /// A session, unless it takes too long or there is no path any more.
    async fn dial_in_time(&self, key: Key) -> Result<Opened, DialError> {
        let most = self.establish_timeout(key.handle, key.pin);
        tokio::select! {
            dialled = timeout(most, self.dial(key)) => dialled.unwrap_or(Err(DialError::Timeout)),
            () = self.path_gone(key) => Err(DialError::PathGone), // dropped, the handshake ends
        }
    }

    /// Completes when no path leads to this boot of the router: what is sent there is repeated ever less often, and the next handshake is
    /// quicker.
    async fn path_gone(&self, Key { router, handle, .. }: Key) {
        let mut fib = self.config.surroundings.fib.clone();
        let is_gone =
            |fib: &Arc<Fib>| fib.routes.get(&router).is_none_or(|route| route.handle != handle);
        // Without a sender this router stops.
        let _ = fib.wait_for(is_gone).await;
    }

    async fn dial(&self, key: Key) -> Result<Opened, DialError> {
        let dial = self.config.tls.session_client(key.router);
        let fib = self.fib();
        let path = fib.path(key.handle, key.pin);
        let transport = transport::transport(Role::Initiator, key.class, path);
        let mut config = quinn::ClientConfig::new(Arc::new(quic_client(&dial.config)));
        config.transport_config(transport);
        let failed = |error: &dyn std::error::Error| match dial.refusal() {
            Some(refusal) => refusal.clone().into(),
            None => DialError::Connection(error.to_string().into()),
        };
        let connecting =
            self.config.endpoint.connect_with(config, vaddr(key.handle, key.pin), SERVER_NAME);
        let connection = connecting.map_err(|e| failed(&e))?.await.map_err(|e| failed(&e))?;
        let peer = self.peer(&connection, key.handle, key.pin)?;
        let paid = self.account(peer.site, key.class).reserve(key.class.held_bytes());
        let paid = paid.ok_or_else(|| overloaded(&connection))?;
        let (mut writer, reader) = connection.open_bi().await.map_err(|e| failed(&e))?;
        let mut reader = ControlReader::new(reader);
        let hello = self.hello(&mut writer, &mut reader, key.pin, key.class);
        let hello = hello.await.map_err(|e| failed(&e))?;
        let terms = Terms::new(Role::Initiator, key.class, transport::mtu(path), &hello);
        Ok((self.session_of(connection, peer, terms, paid), writer, reader))
    }
}
