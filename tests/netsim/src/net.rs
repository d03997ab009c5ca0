//! The network as its users see it: hosts, paths, names, time.

use crate::{
    path::Path,
    process::Process,
    world::{HostId, Owner, Watched, World},
};
use parking_lot::Mutex;
use rand::{SeedableRng as _, rngs::StdRng};
use std::{
    cell::RefCell,
    io,
    net::{IpAddr, SocketAddr},
    sync::Arc,
    task::{Context, Waker},
};

/// Wall-clock time at the beginning: 2027-01-15, in milliseconds.
const EPOCH_MS: i64 = 1_800_000_000_000;

thread_local! {
    static CURRENT: RefCell<Option<Host>> = const { RefCell::new(None) };
}

/// The network. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Net(Arc<Mutex<World>>);

/// A host, as a process on it sees it. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Host {
    pub(crate) net: Net,
    pub(crate) id: HostId,
    pub(crate) owner: Owner,
}

/// What there is, for oracles.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Datagrams between hosts, sent.
    pub datagrams_sent: u64,
    /// Datagrams that arrived, those within a host included.
    pub datagrams_arrived: u64,
    /// TCP and Unix connections that are not over at both ends.
    pub conns: usize,
    /// UDP sockets.
    pub udp_sockets: usize,
    /// Listening sockets.
    pub listeners: usize,
}

/// What a process holds open, for oracles.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Sockets {
    /// Unix connections.
    pub unix: usize,
    /// TCP connections within the host.
    pub tcp_within: usize,
    /// TCP connections with other hosts.
    pub tcp_between: usize,
    /// UDP sockets that talk to one other alone.
    pub udp_connected: usize,
    /// UDP sockets that talk to anybody.
    pub udp_bound: usize,
}

/// The host whose process runs on this thread now.
#[must_use]
pub fn current() -> Option<Host> {
    CURRENT.with_borrow(Clone::clone)
}

/// The time of day on the current host, in milliseconds since the Unix epoch.
///
/// # Panics
/// When no simulated process runs on this thread.
#[must_use]
pub fn unix_ms() -> i64 {
    current().expect("invariant: only simulated processes ask").unix_ms()
}

/// Makes `host` current until the guard is dropped.
pub(crate) fn enter(host: &Host) -> Entered {
    Entered(CURRENT.replace(Some(host.clone())))
}

pub(crate) struct Entered(Option<Host>);

impl Drop for Entered {
    fn drop(&mut self) {
        CURRENT.set(self.0.take());
    }
}

/// Remembers whom to wake, once.
pub(crate) fn register(wakers: &mut Vec<Waker>, cx: &Context<'_>) {
    if !wakers.iter().any(|waker| waker.will_wake(cx.waker())) {
        wakers.push(cx.waker().clone());
    }
}

impl Net {
    /// An empty network whose chances follow from `seed`.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        Self(Arc::new(Mutex::new(World::new(StdRng::seed_from_u64(seed)))))
    }

    /// Does something with the world, lets follow what follows at once, and then wakes whom it concerns.
    pub(crate) fn with<R>(&self, f: impl FnOnce(&mut World) -> R) -> R {
        let (outcome, woken) = {
            let mut world = self.0.lock();
            let outcome = f(&mut world);
            world.settle();
            (outcome, world.take_woken())
        };
        woken.into_iter().for_each(Waker::wake);
        outcome
    }

    /// Adds a host with this address.
    #[must_use]
    pub fn host(&self, ip: IpAddr) -> Host {
        self.with(|world| Host { net: self.clone(), id: world.add_host(ip), owner: 0 })
    }

    /// What paths are like that nobody has set.
    pub fn set_default_path(&self, path: Path) {
        self.with(|world| world.default_path = path);
    }

    /// Changes the path from one host to another, in this direction.
    pub fn change_path(&self, from: &Host, to: &Host, change: impl FnOnce(&mut Path)) {
        self.with(|world| change(&mut world.path(from.id, to.id).path));
    }

    /// Shows `watcher` every datagram that is sent from one host to another: the time in microseconds, from where, to where, what.
    pub fn watch(&self, watcher: impl Fn(u64, IpAddr, IpAddr, &[u8]) + Send + Sync + 'static) {
        self.with(|world| world.watched = Watched(Some(Arc::new(watcher))));
    }

    /// Lets time pass: steps every process in turn, a tick at a time.
    pub fn run_until(&self, until_us: u64, tick_us: u64, processes: &mut [&mut Process]) {
        loop {
            let now_us = self.now_us();
            if now_us >= until_us {
                return;
            }
            for process in &mut *processes {
                process.step(now_us + tick_us);
            }
            self.with(|world| world.now_us = now_us + tick_us);
        }
    }

    /// Virtual time since the beginning, in microseconds.
    #[must_use]
    pub fn now_us(&self) -> u64 {
        self.0.lock().now_us
    }

    /// Hash and number of everything that has happened between hosts so far.
    #[must_use]
    pub fn trace(&self) -> (u64, u64) {
        self.0.lock().trace.digest()
    }

    /// What there is now.
    #[must_use]
    pub fn counts(&self) -> Counts {
        let world = self.0.lock();
        Counts {
            datagrams_sent: world.datagrams_sent,
            datagrams_arrived: world.datagrams_arrived,
            conns: world.conns.len(),
            udp_sockets: world.udp.len(),
            listeners: world.listeners.len(),
        }
    }
}

impl Host {
    /// The network it is in.
    #[must_use]
    pub fn net(&self) -> &Net {
        &self.net
    }

    /// The same host, for a process of its own.
    pub(crate) fn for_process(&self) -> Self {
        let owner = self.net.with(|world| {
            world.next_owner += 1;
            world.next_owner
        });
        Self { owner, ..self.clone() }
    }

    /// Its address, behind its NAT if it has one.
    #[must_use]
    pub fn ip(&self) -> IpAddr {
        self.net.with(|world| world.hosts[self.id].ip)
    }

    /// Puts it behind a NAT of its own, which forgets whom it has not sent to for `expiry_us`.
    pub fn put_behind_nat(&self, public: IpAddr, expiry_us: u64) {
        self.net.with(|world| world.put_behind_nat(self.id, public, expiry_us));
    }

    /// Its NAT forgets everything and uses other ports from now on.
    pub fn rebind_nat(&self) {
        self.net.with(|world| {
            if let Some(nat) = &mut world.hosts[self.id].nat {
                nat.rebind();
            }
        });
    }

    /// Changes how soon its NAT forgets.
    pub fn set_nat_expiry(&self, expiry_us: u64) {
        self.net.with(|world| {
            if let Some(nat) = &mut world.hosts[self.id].nat {
                nat.set_expiry(expiry_us);
            }
        });
    }

    /// It loses power: all sockets are gone, nobody is told. Kill its processes as well.
    pub fn lose_power(&self) {
        self.net.with(|world| world.lose_power(self.id));
    }

    /// It has power again.
    pub fn power_on(&self) {
        self.net.with(|world| world.hosts[self.id].is_up = true);
    }

    /// Sets its clock that far off.
    pub fn set_wall_offset_ms(&self, offset_ms: i64) {
        self.net.with(|world| world.hosts[self.id].wall_offset_ms = offset_ms);
    }

    /// The time of day there, in milliseconds since the Unix epoch.
    #[must_use]
    pub fn unix_ms(&self) -> i64 {
        let (now_us, offset_ms) =
            self.net.with(|world| (world.now_us, world.hosts[self.id].wall_offset_ms));
        EPOCH_MS + i64::try_from(now_us / 1_000).unwrap_or(i64::MAX) + offset_ms
    }

    /// Gives a name addresses, as seen from here.
    pub fn set_name(&self, name: &str, ips: Vec<IpAddr>) {
        self.net.with(|world| world.hosts[self.id].names.insert(name.to_owned(), ips));
    }

    /// Resolves `host:port`, where host is an address or a name.
    ///
    /// # Errors
    /// Nobody knows the name, or the text is not `host:port`.
    pub fn resolve(&self, endpoint: &str) -> io::Result<Vec<SocketAddr>> {
        if let Ok(addr) = endpoint.parse() {
            return Ok(vec![addr]);
        }
        let (name, port) = endpoint.rsplit_once(':').ok_or(io::ErrorKind::InvalidInput)?;
        let port = port.parse().map_err(|_| io::ErrorKind::InvalidInput)?;
        let ips = self.net.with(|world| world.hosts[self.id].names.get(name).cloned());
        let ips = ips.ok_or(io::ErrorKind::NotFound)?;
        Ok(ips.into_iter().map(|ip| SocketAddr::new(ip, port)).collect())
    }
}
