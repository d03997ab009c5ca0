//! What the kernels at both ends of a TCP connection do, as far as programs can tell: order, bounded buffers, FIN, RST, retransmission.
//!
//! A Unix socket's connection is one within a host that was found by a path instead of a port.

use crate::{
    net::Sockets,
    world::{ANY, Event, HostId, Owner, World},
};
use bytes::{Buf as _, Bytes, BytesMut};
use std::{collections::VecDeque, io, net::SocketAddr, task::Waker};

/// Bytes on their way or unread, in one direction: a receive buffer.
const WINDOW_BYTES: usize = 256 << 10;
/// Bytes written and not sent.
pub(crate) const UNSENT_BYTES_MAX: usize = 64 << 10;
/// Connections that wait to be accepted.
const BACKLOG: usize = 1_024;
/// Sent at once at most.
const CHUNK_BYTES: usize = 64 << 10;
/// First wait of a sender whose flight was lost, and longest.
const RETRY_US: u64 = 200_000;
const RETRY_US_MAX: u64 = 3_200_000;
const SYN_RETRY_US: u64 = 1_000_000;
const SYN_TRIES: u32 = 6;

#[derive(Debug)]
pub(crate) struct ListenerState {
    pub(crate) host: HostId,
    pub(crate) owner: Owner,
    pub(crate) local: SocketAddr,
    pub(crate) path: Option<std::path::PathBuf>,
    pub(crate) waiting: VecDeque<u64>,
    pub(crate) wakers: Vec<Waker>,
}

/// What happens to a connection; `to` is the end it happens at: 0 is who connected.
#[derive(Debug)]
pub(crate) enum ConnEvent {
    Syn,
    SynAck,
    SynRetry,
    Data {
        to: usize,
        bytes: Bytes,
    },
    Fin {
        to: usize,
    },
    Rst {
        to: usize,
    },
    /// The other end has read so much.
    Credit {
        to: usize,
        len: usize,
    },
    /// Time to send again what was lost.
    Retry {
        to: usize,
    },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Phase {
    Connecting,
    Open,
    Failed(io::ErrorKind),
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Finish {
    #[default]
    NotWanted,
    Wanted,
    Sent,
}

#[derive(Debug)]
pub(crate) struct Conn {
    pub(crate) ends: [End; 2],
    pub(crate) phase: Phase,
    pub(crate) connecting: Vec<Waker>,
    path: Option<std::path::PathBuf>,
    tries: u32,
    /// Which mapping of whose NAT it goes through.
    nat: Option<(HostId, u64)>,
}

#[derive(Debug)]
pub(crate) struct End {
    pub(crate) host: HostId,
    pub(crate) owner: Owner,
    pub(crate) local: SocketAddr,
    pub(crate) remote: SocketAddr,
    /// The kernel knows the connection.
    is_alive: bool,
    /// A program holds the socket, or can accept it.
    is_open: bool,
    pub(crate) rx: BytesMut,
    rx_finished: bool,
    pub(crate) error: Option<io::ErrorKind>,
    /// Read and not yet told the sender.
    uncredited: usize,
    tx: BytesMut,
    pub(crate) finish: Finish,
    in_flight: usize,
    last_due_us: u64,
    failing_since_us: Option<u64>,
    retries: u32,
    waits_to_retry: bool,
    pub(crate) lingers_not: bool,
    pub(crate) timeout_us: u64,
    pub(crate) readers: Vec<Waker>,
    pub(crate) writers: Vec<Waker>,
    pub(crate) watchers: Vec<Waker>,
}

impl Conn {
    /// Nobody at either end is interested any more.
    pub(crate) fn is_over(&self) -> bool {
        self.ends.iter().all(End::is_over)
    }
}

/// Why nothing was sent.
enum Lost {
    /// Nobody knows; try again.
    OnTheWay,
    /// A NAT has forgotten the connection.
    Forgotten,
}

impl End {
    fn new(host: HostId, owner: Owner, local: SocketAddr, remote: SocketAddr) -> Self {
        Self {
            host,
            owner,
            local,
            remote,
            is_alive: false,
            is_open: false,
            rx: BytesMut::new(),
            rx_finished: false,
            error: None,
            uncredited: 0,
            tx: BytesMut::new(),
            finish: Finish::NotWanted,
            in_flight: 0,
            last_due_us: 0,
            failing_since_us: None,
            retries: 0,
            waits_to_retry: false,
            lingers_not: false,
            timeout_us: u64::MAX,
            readers: Vec::new(),
            writers: Vec::new(),
            watchers: Vec::new(),
        }
    }

    /// The host has lost power; whoever in the simulation stands for its programs notices.
    pub(crate) fn vanish(&mut self, wakers: &mut Vec<Waker>) {
        self.is_alive = false;
        self.is_open = false;
        wakers.append(&mut self.readers);
        wakers.append(&mut self.writers);
        wakers.append(&mut self.watchers);
        self.error.get_or_insert(io::ErrorKind::ConnectionAborted);
        self.rx.clear();
        self.tx.clear();
    }

    /// Neither the kernel nor a program is interested any more.
    fn is_over(&self) -> bool {
        !self.is_open && (!self.is_alive || self.finish == Finish::Sent)
    }

    pub(crate) fn is_readable(&self) -> bool {
        !self.rx.is_empty() || self.rx_finished || self.error.is_some() || !self.is_alive
    }

    pub(crate) fn is_writable(&self) -> bool {
        self.unsent() < UNSENT_BYTES_MAX || self.error.is_some() || !self.is_alive
    }

    pub(crate) fn unsent(&self) -> usize {
        self.tx.len()
    }

    /// Takes what is there; empty at the end of the stream.
    fn read(&mut self, len_max: usize) -> io::Result<Bytes> {
        if !self.rx.is_empty() {
            let len = self.rx.len().min(len_max);
            self.uncredited += len;
            return Ok(self.rx.split_to(len).freeze());
        }
        match self.error {
            Some(kind) => Err(kind.into()),
            None if self.rx_finished => Ok(Bytes::new()),
            None if !self.is_alive => Err(io::ErrorKind::ConnectionAborted.into()),
            None => Err(io::ErrorKind::WouldBlock.into()),
        }
    }

    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if let Some(kind) = self.error {
            return Err(kind.into());
        }
        if self.finish != Finish::NotWanted || !self.is_alive {
            return Err(io::ErrorKind::BrokenPipe.into());
        }
        let len = bytes.len().min(UNSENT_BYTES_MAX.saturating_sub(self.tx.len()));
        if len == 0 && !bytes.is_empty() {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        self.tx.extend_from_slice(&bytes[..len]);
        Ok(len)
    }
}

impl World {
    /// What the programs of a process hold open.
    pub(crate) fn sockets_of(&self, owner: Owner) -> Sockets {
        let mut sockets = Sockets::default();
        for conn in self.conns.values() {
            let is_within = conn.ends[0].host == conn.ends[1].host;
            let count = match (&conn.path, is_within) {
                (Some(_), _) => &mut sockets.unix,
                (None, true) => &mut sockets.tcp_within,
                (None, false) => &mut sockets.tcp_between,
            };
            let is_held = |end: &&End| end.owner == owner && end.is_open;
            *count += conn.ends.iter().filter(is_held).count();
        }
        let udp = self.udp.values().filter(|socket| socket.owner == owner);
        let (connected, bound): (Vec<_>, Vec<_>) = udp.partition(|socket| socket.peer.is_some());
        (sockets.udp_connected, sockets.udp_bound) = (connected.len(), bound.len());
        sockets
    }

    pub(crate) fn listener_close(&mut self, id: u64) {
        let Some(listener) = self.listeners.remove(&id) else { return };
        let host = &mut self.hosts[listener.host];
        match &listener.path {
            Some(path) => drop(host.unix.remove(path)),
            None => drop(host.tcp.remove(&(listener.local.port(), listener.local.ip()))),
        }
        for conn in listener.waiting {
            if let Some(conn) = self.conns.get_mut(&conn) {
                conn.ends[1].lingers_not = true;
            }
            self.conn_close(conn, 1);
        }
    }

    /// Begins to connect; the outcome shows in the connection's phase.
    pub(crate) fn connect(
        &mut self,
        (host, owner): (HostId, Owner),
        remote: SocketAddr,
        source: Option<std::net::IpAddr>,
        path: Option<std::path::PathBuf>,
    ) -> io::Result<u64> {
        let target = self.host_at(host, remote.ip()).ok_or(io::ErrorKind::HostUnreachable)?;
        let bound = source.unwrap_or(ANY);
        let ip = self.source_ip(host, bound, remote.ip());
        let local = SocketAddr::new(ip, self.ephemeral(host));
        let (mut seen, mut nat) = (local, None);
        if let Some(state) = self.hosts[host].nat.as_mut().filter(|_| target != host) {
            seen = SocketAddr::new(state.public, state.free_port());
            nat = Some((host, state.epoch));
        }
        let id = self.id();
        let mut near = End::new(host, owner, local, remote);
        (near.is_alive, near.is_open) = (true, true);
        let conn = Conn {
            ends: [near, End::new(target, 0, remote, seen)],
            phase: Phase::Connecting,
            connecting: Vec::new(),
            path,
            tries: 0,
            nat,
        };
        self.conns.insert(id, conn);
        self.send_syn(id);
        Ok(id)
    }

    fn send_syn(&mut self, id: u64) {
        let now_us = self.now_us;
        let Some(conn) = self.conns.get_mut(&id) else { return };
        conn.tries += 1;
        if conn.tries > SYN_TRIES {
            return self.fail_connect(id, io::ErrorKind::TimedOut);
        }
        let again_us = now_us + (SYN_RETRY_US << (conn.tries - 1));
        match self.transit(id, 0, 0) {
            Ok(due_us) => self.conn_later(due_us, id, ConnEvent::Syn),
            Err(_) => self.conn_later(again_us, id, ConnEvent::SynRetry),
        }
    }

    fn fail_connect(&mut self, id: u64, kind: io::ErrorKind) {
        let Some(conn) = self.conns.get_mut(&id) else { return };
        if conn.phase == Phase::Connecting {
            conn.phase = Phase::Failed(kind);
            conn.ends[0].is_alive = false;
            let mut wakers = std::mem::take(&mut conn.connecting);
            self.wake(&mut wakers);
        }
    }

    /// When something sent by an end arrives at the other.
    fn transit(&mut self, id: u64, from: usize, len: usize) -> Result<u64, Lost> {
        let conn = self.conns.get(&id).ok_or(Lost::OnTheWay)?;
        let (near, far) = (&conn.ends[from], &conn.ends[1 - from]);
        let (host, target, last_due_us) = (near.host, far.host, near.last_due_us);
        if host == target {
            return Ok(self.now_us);
        }
        if let Some((behind, epoch)) = conn.nat
            && self.hosts[behind].nat.as_ref().is_some_and(|nat| nat.epoch != epoch)
        {
            return Err(if behind == host { Lost::Forgotten } else { Lost::OnTheWay });
        }
        let inner = self.hosts[target].nat.as_ref().map(|nat| nat.public);
        if from == 0 && inner == Some(conn.ends[0].remote.ip()) {
            return Err(Lost::OnTheWay); // Nobody gets in through a NAT.
        }
        if !self.hosts[target].is_up {
            return Err(Lost::OnTheWay);
        }
        let now_us = self.now_us;
        let (path, rng) = self.path_and_rng(host, target);
        let due_us = path.segment(now_us, len, rng).ok_or(Lost::OnTheWay)?.max(last_due_us);
        let near = &mut self.conns.get_mut(&id).ok_or(Lost::OnTheWay)?.ends[from];
        near.last_due_us = due_us;
        let (from, to) = (near.local, near.remote);
        self.note(3, from, to, len);
        Ok(due_us)
    }

    fn conn_later(&mut self, due_us: u64, conn: u64, event: ConnEvent) {
        self.schedule(due_us, Event::Conn { conn, event });
    }

    pub(crate) fn conn_event(&mut self, id: u64, event: ConnEvent) {
        match event {
            ConnEvent::Syn => self.syn_arrives(id),
            ConnEvent::SynRetry => {
                if self.conns.get(&id).is_some_and(|conn| conn.phase == Phase::Connecting) {
                    self.send_syn(id);
                }
            }
            ConnEvent::SynAck => {
                let Some(conn) = self.conns.get_mut(&id) else { return };
                if conn.phase == Phase::Connecting {
                    conn.phase = Phase::Open;
                    let mut wakers = std::mem::take(&mut conn.connecting);
                    self.wake(&mut wakers);
                    self.pump(id, 0);
                }
            }
            ConnEvent::Data { to, bytes } => self.data_arrives(id, to, &bytes),
            ConnEvent::Fin { to } => {
                let Some(conn) = self.conns.get_mut(&id) else { return };
                let end = &mut conn.ends[to];
                end.rx_finished = true;
                let mut wakers = std::mem::take(&mut end.readers);
                self.wake(&mut wakers);
                self.forget_if_over(id);
            }
            ConnEvent::Rst { to } => self.end_fails(id, to, io::ErrorKind::ConnectionReset),
            ConnEvent::Credit { to, len } => {
                let Some(conn) = self.conns.get_mut(&id) else { return };
                let end = &mut conn.ends[to];
                end.in_flight = end.in_flight.saturating_sub(len);
                self.pump(id, to);
            }
            ConnEvent::Retry { to } => {
                if let Some(conn) = self.conns.get_mut(&id) {
                    conn.ends[to].waits_to_retry = false;
                    self.pump(id, to);
                    self.tell_credit(id, to);
                }
            }
        }
    }

    fn syn_arrives(&mut self, id: u64) {
        let Some(conn) = self.conns.get(&id) else { return };
        if conn.phase != Phase::Connecting {
            return;
        }
        let (host, local) = (&self.hosts[conn.ends[1].host], conn.ends[1].local);
        let listener = match &conn.path {
            Some(path) => host.unix.get(path),
            None => host
                .tcp
                .get(&(local.port(), local.ip()))
                .or_else(|| host.tcp.get(&(local.port(), ANY))),
        };
        let (is_up, again_us) = (host.is_up, self.now_us + SYN_RETRY_US);
        let listener = listener.copied().and_then(|id| self.listeners.get_mut(&id));
        let is_new = !conn.ends[1].is_alive;
        let reply = match listener {
            _ if !is_up => return self.conn_later(again_us, id, ConnEvent::SynRetry),
            Some(listener) if is_new && listener.waiting.len() >= BACKLOG => {
                return self.conn_later(again_us, id, ConnEvent::SynRetry);
            }
            Some(listener) => {
                if is_new {
                    listener.waiting.push_back(id);
                    let (owner, mut wakers) =
                        (listener.owner, std::mem::take(&mut listener.wakers));
                    let conn = self.conns.get_mut(&id).expect("invariant: it was just there");
                    conn.ends[1].owner = owner;
                    (conn.ends[1].is_alive, conn.ends[1].is_open) = (true, true);
                    self.wake(&mut wakers);
                }
                ConnEvent::SynAck
            }
            None if !is_new => ConnEvent::SynAck,
            None => ConnEvent::Rst { to: 0 },
        };
        match self.transit(id, 1, 0) {
            Ok(due_us) => self.conn_later(due_us, id, reply),
            Err(_) => self.conn_later(again_us, id, ConnEvent::SynRetry),
        }
    }

    fn data_arrives(&mut self, id: u64, to: usize, bytes: &Bytes) {
        let Some(conn) = self.conns.get_mut(&id) else { return };
        let end = &mut conn.ends[to];
        if end.is_alive && end.is_open {
            if end.error.is_none() {
                end.rx.extend_from_slice(bytes);
            }
            let mut wakers = std::mem::take(&mut end.readers);
            return self.wake(&mut wakers);
        }
        if !self.hosts[conn.ends[to].host].is_up {
            // Whoever read it has gone with the power. It is sent again until somebody answers, and what it was does not matter any more.
            return self.retry_later(id, 1 - to);
        }
        // Nobody will read it.
        end_of_life(&mut conn.ends[to]);
        self.send_rst(id, to);
    }

    fn send_rst(&mut self, id: u64, from: usize) {
        if let Ok(due_us) = self.transit(id, from, 0) {
            self.conn_later(due_us, id, ConnEvent::Rst { to: 1 - from });
        }
    }

    fn end_fails(&mut self, id: u64, to: usize, kind: io::ErrorKind) {
        if to == 0 {
            self.fail_connect(id, io::ErrorKind::ConnectionRefused);
        }
        let Some(conn) = self.conns.get_mut(&id) else { return };
        let end = &mut conn.ends[to];
        end.error.get_or_insert(kind);
        end.is_alive = false;
        end.tx.clear();
        let mut wakers = Vec::new();
        wakers.append(&mut end.readers);
        wakers.append(&mut end.writers);
        wakers.append(&mut end.watchers);
        self.wake(&mut wakers);
        self.forget_if_over(id);
    }

    /// Sends what there is as far as the other end has room.
    fn pump(&mut self, id: u64, side: usize) {
        loop {
            let Some(conn) = self.conns.get_mut(&id) else { return };
            let is_open = conn.phase == Phase::Open || side == 1;
            let is_gone = !conn.ends[1 - side].is_alive && conn.phase == Phase::Open;
            let end = &mut conn.ends[side];
            if !is_open || !end.is_alive || end.waits_to_retry {
                return;
            }
            let len = end.tx.len().min(CHUNK_BYTES).min(WINDOW_BYTES.saturating_sub(end.in_flight));
            let finishes = end.tx.is_empty() && end.finish == Finish::Wanted;
            let probes = is_gone && end.failing_since_us.is_some();
            if len == 0 && !finishes && !probes {
                break;
            }
            let due_us = match self.transit(id, side, len) {
                Ok(due_us) => due_us,
                Err(Lost::OnTheWay) => return self.retry_later(id, side),
                Err(Lost::Forgotten) => {
                    return self.end_fails(id, side, io::ErrorKind::ConnectionReset);
                }
            };
            let Some(conn) = self.conns.get_mut(&id) else { return };
            let end = &mut conn.ends[side];
            (end.failing_since_us, end.retries) = (None, 0);
            let event = if len > 0 || probes {
                end.in_flight += len;
                ConnEvent::Data { to: 1 - side, bytes: end.tx.split_to(len).freeze() }
            } else {
                end.finish = Finish::Sent;
                ConnEvent::Fin { to: 1 - side }
            };
            self.conn_later(due_us, id, event);
        }
        let Some(conn) = self.conns.get_mut(&id) else { return };
        let end = &mut conn.ends[side];
        if end.is_writable() {
            let mut wakers = std::mem::take(&mut end.writers);
            self.wake(&mut wakers);
        }
        self.forget_if_over(id);
    }

    fn retry_later(&mut self, id: u64, side: usize) {
        let now_us = self.now_us;
        let Some(conn) = self.conns.get_mut(&id) else { return };
        let end = &mut conn.ends[side];
        let since_us = *end.failing_since_us.get_or_insert(now_us);
        if now_us - since_us > end.timeout_us {
            return self.end_fails(id, side, io::ErrorKind::TimedOut);
        }
        if !end.waits_to_retry {
            end.waits_to_retry = true;
            let wait_us = (RETRY_US << end.retries.min(8)).min(RETRY_US_MAX);
            end.retries += 1;
            self.conn_later(now_us + wait_us, id, ConnEvent::Retry { to: side });
        }
    }

    /// Tells the sender what has been read, once it is worth it.
    fn tell_credit(&mut self, id: u64, side: usize) {
        let Some(conn) = self.conns.get(&id) else { return };
        let len = conn.ends[side].uncredited;
        if len < WINDOW_BYTES / 4 || conn.ends[side].waits_to_retry {
            return;
        }
        match self.transit(id, side, 0) {
            Ok(due_us) => {
                if let Some(conn) = self.conns.get_mut(&id) {
                    let end = &mut conn.ends[side];
                    end.uncredited = 0;
                    (end.failing_since_us, end.retries) = (None, 0);
                }
                self.conn_later(due_us, id, ConnEvent::Credit { to: 1 - side, len });
            }
            Err(_) => self.retry_later(id, side),
        }
    }

    pub(crate) fn conn_read(&mut self, id: u64, side: usize, max: usize) -> io::Result<Bytes> {
        let conn = self.conns.get_mut(&id).ok_or(io::ErrorKind::NotConnected)?;
        let read = conn.ends[side].read(max)?;
        self.tell_credit(id, side);
        Ok(read)
    }

    pub(crate) fn conn_write(&mut self, id: u64, side: usize, bytes: &[u8]) -> io::Result<usize> {
        let conn = self.conns.get_mut(&id).ok_or(io::ErrorKind::NotConnected)?;
        let len = conn.ends[side].write(bytes)?;
        self.pump(id, side);
        Ok(len)
    }

    pub(crate) fn conn_finish(&mut self, id: u64, side: usize) -> io::Result<()> {
        let conn = self.conns.get_mut(&id).ok_or(io::ErrorKind::NotConnected)?;
        let end = &mut conn.ends[side];
        if end.error.is_some() || !end.is_alive {
            return Err(io::ErrorKind::NotConnected.into());
        }
        if end.finish == Finish::NotWanted {
            end.finish = Finish::Wanted;
            self.pump(id, side);
        }
        Ok(())
    }

    /// The program lets go of its socket.
    pub(crate) fn conn_close(&mut self, id: u64, side: usize) {
        let Some(conn) = self.conns.get_mut(&id) else { return };
        let is_connecting = side == 0 && conn.phase == Phase::Connecting;
        let end = &mut conn.ends[side];
        if !end.is_open {
            return;
        }
        end.is_open = false;
        let aborts = end.lingers_not || !end.rx.is_empty();
        if end.is_alive && (aborts || is_connecting) {
            end_of_life(end);
            self.send_rst(id, side);
        } else if end.is_alive && end.finish == Finish::NotWanted {
            end.finish = Finish::Wanted;
            self.pump(id, side);
        }
        self.forget_if_over(id);
    }

    fn forget_if_over(&mut self, id: u64) {
        // A reset that is still on its way to an open end must arrive.
        if self.conns.get(&id).is_some_and(Conn::is_over) {
            self.conns.remove(&id);
        }
    }
}

fn end_of_life(end: &mut End) {
    end.is_alive = false;
    end.rx.clear();
    end.tx.clear();
    debug_assert!(!end.tx.has_remaining());
}

#[cfg(test)]
mod tests;
