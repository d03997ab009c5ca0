//! Everything the simulated network is made of, behind one lock.

use crate::{
    conn::{Conn, ConnEvent, ListenerState},
    nat::Nat,
    path::{Path, PathState},
    trace::Trace,
    udp::{Datagram, UdpState},
};
use rand::rngs::StdRng;
use std::{
    cmp::Reverse,
    collections::{BTreeMap, BinaryHeap},
    net::{IpAddr, Ipv4Addr, SocketAddr},
    path::PathBuf,
    sync::Arc,
    task::Waker,
};

pub(crate) type HostId = usize;
/// Whose socket: a process.
pub(crate) type Owner = u32;

/// Every address of a host.
pub(crate) const ANY: IpAddr = IpAddr::V4(Ipv4Addr::UNSPECIFIED);
/// First ephemeral port.
const EPHEMERAL_MIN: u16 = 32_768;

/// One machine.
#[derive(Debug)]
pub(crate) struct HostState {
    pub(crate) ip: IpAddr,
    pub(crate) nat: Option<Nat>,
    pub(crate) is_up: bool,
    pub(crate) wall_offset_ms: i64,
    pub(crate) udp: BTreeMap<(u16, IpAddr), u64>,
    pub(crate) tcp: BTreeMap<(u16, IpAddr), u64>,
    pub(crate) unix: BTreeMap<PathBuf, u64>,
    pub(crate) names: BTreeMap<String, Vec<IpAddr>>,
    next_port: u16,
}

/// What arrives.
#[derive(Debug)]
pub(crate) enum Event {
    Datagram { host: HostId, datagram: Datagram },
    Conn { conn: u64, event: ConnEvent },
}

#[derive(Debug)]
struct Scheduled {
    due_us: u64,
    order: u64,
    event: Event,
}

impl PartialEq for Scheduled {
    fn eq(&self, other: &Self) -> bool {
        self.order == other.order
    }
}

impl Eq for Scheduled {}

impl PartialOrd for Scheduled {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Scheduled {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        (self.due_us, self.order).cmp(&(other.due_us, other.order))
    }
}

/// Who is shown every datagram that is sent from host to host: when, from where, to where, what.
pub(crate) type Watcher = Arc<dyn Fn(u64, IpAddr, IpAddr, &[u8]) + Send + Sync>;

/// Perhaps somebody who watches.
#[derive(Default)]
pub(crate) struct Watched(pub(crate) Option<Watcher>);

impl std::fmt::Debug for Watched {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Watched").field(&self.0.is_some()).finish()
    }
}

#[derive(Debug)]
pub(crate) struct World {
    pub(crate) now_us: u64,
    pub(crate) rng: StdRng,
    pub(crate) trace: Trace,
    pub(crate) watched: Watched,
    pub(crate) hosts: Vec<HostState>,
    pub(crate) udp: BTreeMap<u64, UdpState>,
    pub(crate) listeners: BTreeMap<u64, ListenerState>,
    pub(crate) conns: BTreeMap<u64, Conn>,
    pub(crate) next_id: u64,
    pub(crate) next_owner: Owner,
    pub(crate) default_path: Path,
    pub(crate) datagrams_sent: u64,
    pub(crate) datagrams_arrived: u64,
    paths: BTreeMap<(HostId, HostId), PathState>,
    by_ip: BTreeMap<IpAddr, HostId>,
    queue: BinaryHeap<Reverse<Scheduled>>,
    order: u64,
    /// Woken once the lock is free: who wakes may call back.
    woken: Vec<Waker>,
}

impl World {
    pub(crate) fn new(rng: StdRng) -> Self {
        Self {
            now_us: 0,
            rng,
            trace: Trace::default(),
            watched: Watched::default(),
            hosts: Vec::new(),
            udp: BTreeMap::new(),
            listeners: BTreeMap::new(),
            conns: BTreeMap::new(),
            next_id: 0,
            next_owner: 0,
            default_path: Path::default(),
            datagrams_sent: 0,
            datagrams_arrived: 0,
            paths: BTreeMap::new(),
            by_ip: BTreeMap::new(),
            queue: BinaryHeap::new(),
            order: 0,
            woken: Vec::new(),
        }
    }

    pub(crate) fn add_host(&mut self, ip: IpAddr) -> HostId {
        let id = self.hosts.len();
        self.by_ip.insert(ip, id);
        self.hosts.push(HostState {
            ip,
            nat: None,
            is_up: true,
            wall_offset_ms: 0,
            udp: BTreeMap::new(),
            tcp: BTreeMap::new(),
            unix: BTreeMap::new(),
            names: BTreeMap::new(),
            next_port: 0,
        });
        id
    }

    /// Puts a host behind a NAT: nobody reaches its own address any more.
    pub(crate) fn put_behind_nat(&mut self, host: HostId, public: IpAddr, expiry_us: u64) {
        self.by_ip.remove(&self.hosts[host].ip);
        self.by_ip.insert(public, host);
        self.hosts[host].nat = Some(Nat::new(public, expiry_us));
    }

    pub(crate) fn id(&mut self) -> u64 {
        self.next_id += 1;
        self.next_id
    }

    pub(crate) fn path(&mut self, from: HostId, to: HostId) -> &mut PathState {
        self.path_and_rng(from, to).0
    }

    /// The state of a path, and what it draws from.
    pub(crate) fn path_and_rng(
        &mut self,
        from: HostId,
        to: HostId,
    ) -> (&mut PathState, &mut StdRng) {
        let default = &self.default_path;
        let path = self.paths.entry((from, to)).or_insert_with(|| PathState::new(default.clone()));
        (path, &mut self.rng)
    }

    /// The host that packets from `from` to `ip` go to.
    pub(crate) fn host_at(&self, from: HostId, ip: IpAddr) -> Option<HostId> {
        if ip.is_loopback() || ip.is_unspecified() || ip == self.hosts[from].ip {
            return Some(from);
        }
        self.by_ip.get(&ip).copied()
    }

    /// The address packets of `host` to `to` come from, before any NAT.
    pub(crate) fn source_ip(&self, host: HostId, bound: IpAddr, to: IpAddr) -> IpAddr {
        match bound {
            bound if !bound.is_unspecified() => bound,
            _ if to.is_loopback() => Ipv4Addr::LOCALHOST.into(),
            _ => self.hosts[host].ip,
        }
    }

    /// Whether a host may bind `ip`.
    pub(crate) fn owns(&self, host: HostId, ip: IpAddr) -> bool {
        ip.is_unspecified() || ip.is_loopback() || ip == self.hosts[host].ip
    }

    /// A port that is free for UDP and TCP alike.
    pub(crate) fn ephemeral(&mut self, host: HostId) -> u16 {
        let state = &mut self.hosts[host];
        loop {
            let port = EPHEMERAL_MIN + state.next_port;
            state.next_port = (state.next_port + 1) % (u16::MAX - EPHEMERAL_MIN);
            let any = (port, ANY);
            if !state.udp.contains_key(&any) && !state.tcp.contains_key(&any) {
                return port;
            }
        }
    }

    pub(crate) fn schedule(&mut self, due_us: u64, event: Event) {
        self.order += 1;
        self.queue.push(Reverse(Scheduled { due_us, order: self.order, event }));
    }

    /// Lets everything arrive that is due.
    pub(crate) fn settle(&mut self) {
        while self.queue.peek().is_some_and(|Reverse(next)| next.due_us <= self.now_us) {
            let Some(Reverse(Scheduled { event, .. })) = self.queue.pop() else { return };
            match event {
                Event::Datagram { host, datagram } => self.datagram_arrives(host, datagram),
                Event::Conn { conn, event } => self.conn_event(conn, event),
            }
        }
    }

    pub(crate) fn wake(&mut self, wakers: &mut Vec<Waker>) {
        self.woken.append(wakers);
    }

    pub(crate) fn take_woken(&mut self) -> Vec<Waker> {
        std::mem::take(&mut self.woken)
    }

    /// The kernel closes what a killed process leaves.
    pub(crate) fn close_all_of(&mut self, owner: Owner) {
        let udp: Vec<_> =
            self.udp.iter().filter(|(_, s)| s.owner == owner).map(|(id, _)| *id).collect();
        udp.into_iter().for_each(|id| self.udp_close(id));
        let listeners: Vec<_> =
            self.listeners.iter().filter(|(_, s)| s.owner == owner).map(|(id, _)| *id).collect();
        listeners.into_iter().for_each(|id| self.listener_close(id));
        let mut ends = Vec::new();
        for (id, conn) in &self.conns {
            let of_owner = |side: &usize| conn.ends[*side].owner == owner;
            ends.extend([0, 1].into_iter().filter(of_owner).map(|side| (*id, side)));
        }
        ends.into_iter().for_each(|(id, side)| self.conn_close(id, side));
    }

    /// A host loses power: its sockets are gone, nobody is told.
    pub(crate) fn lose_power(&mut self, host: HostId) {
        self.hosts[host].is_up = false;
        self.hosts[host].udp.clear();
        self.hosts[host].tcp.clear();
        self.hosts[host].unix.clear();
        self.udp.retain(|_, socket| socket.host != host);
        self.listeners.retain(|_, listener| listener.host != host);
        let mut wakers = Vec::new();
        for conn in self.conns.values_mut() {
            if conn.ends[0].host == host {
                wakers.append(&mut conn.connecting);
            }
            for end in conn.ends.iter_mut().filter(|end| end.host == host) {
                end.vanish(&mut wakers);
            }
        }
        // Nobody will close what was within the host.
        self.conns.retain(|_, conn| !conn.is_over());
        self.wake(&mut wakers);
    }

    pub(crate) fn note(&mut self, kind: u64, from: SocketAddr, to: SocketAddr, len: usize) {
        let word = |addr: SocketAddr| match addr.ip() {
            IpAddr::V4(ip) => u64::from(u32::from(ip)) << 16 | u64::from(addr.port()),
            IpAddr::V6(_) => u64::from(addr.port()),
        };
        self.trace.note(&[self.now_us, kind, word(from), word(to), len as u64]);
    }
}
