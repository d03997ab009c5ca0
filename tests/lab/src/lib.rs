//! Network namespaces as a test network: LANs, NAT, firewalls, cuts, and long, lossy and narrow ways.
//!
//! A [`Lab`] is one process and a few namespaces it holds; every [`Host`] is a nested set of namespaces
//! (network, mount, process ids, host name) on one or more [`Lan`]s. Nothing is named outside of those
//! namespaces and every process lives below the lab's own first process, which ends when this process
//! does, however it ends: the kernel then removes all of it.
//!
//! As root the real users of the machine exist inside the lab (a database refuses to run as root); as
//! any other user the lab lives in a user namespace with one user, and [`Lab::rootless`] says so.
//!
//! Delay and loss come from a [`Wan`], a thread of this process: the kernels this runs on have no `netem`.

mod clock;
mod command;
mod host;
mod lan;
mod namespace;
mod require;
mod turn;
mod wan;

use std::net::Ipv4Addr;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU32, Ordering};

use anyhow::{Context as _, Result};

pub use clock::{Deadline, eventually};
pub use command::{Command, Output, Process};
pub use host::{Host, Signal};
pub use lan::Lan;
pub use require::{require_programs, require_root, skipped};
pub use turn::{Alone, alone};
pub use wan::{Counters, Direction, Loss, Mtu, Profile, Rate, Wan};

use namespace::Holder;
use turn::Turn;

/// A test network, empty at first. Dropping the last handle to it and its hosts removes everything.
#[derive(Clone, Debug)]
pub struct Lab {
    inner: Arc<Inner>,
}

#[derive(Debug)]
pub(crate) struct Inner {
    // Order matters: the holder ends every process before the directory they write to goes.
    pub(crate) core: Holder,
    pub(crate) dir: tempfile::TempDir,
    /// Given back last.
    _turn: Turn,
    lans: AtomicU8,
    hosts: AtomicU8,
    pub(crate) runs: AtomicU32,
}

impl Lab {
    /// Makes the namespace the LANs of the lab live in. Waits until few enough labs of this process stand, so make one at a time; see
    /// [`alone`].
    ///
    /// # Errors
    /// When the machine does not allow namespaces (unprivileged user namespaces switched off), or a
    /// program the lab is made with (`unshare`, `nsenter`, `ip`) is missing.
    pub fn new() -> Result<Self> {
        let turn = Turn::take();
        namespace::reap_stale();
        let dir = tempfile::Builder::new()
            .prefix(&format!("{}{}-", namespace::DIR_PREFIX, std::process::id()))
            .tempdir()
            .context("make the directory of the lab")?;
        // Servers that run as users of their own reach their directories through this one.
        let mode = std::os::unix::fs::PermissionsExt::from_mode(0o711);
        std::fs::set_permissions(dir.path(), mode)?;
        let core = Holder::core(dir.path())?;
        let lab = Inner {
            core,
            dir,
            _turn: turn,
            lans: AtomicU8::new(0),
            hosts: AtomicU8::new(0),
            runs: AtomicU32::new(0),
        };
        Ok(Self { inner: Arc::new(lab) })
    }

    /// Whether the lab lives in a user namespace with a single user.
    #[must_use]
    pub fn rootless() -> bool {
        namespace::rootless()
    }

    /// Where hosts keep their state and logs; removed with the lab.
    #[must_use]
    pub fn dir(&self) -> &Path {
        self.inner.dir.path()
    }

    /// A public LAN: a bridge that owns `network.1`, which is every joining host's default route and
    /// leads nowhere else. `network` is a /24.
    ///
    /// # Errors
    /// When `ip` fails.
    pub fn lan(&self, name: &str, network: Ipv4Addr) -> Result<Lan> {
        let index = self.inner.lans.fetch_add(1, Ordering::Relaxed);
        let lan = Lan::new(Arc::clone(&self.inner), name, index, network)?;
        lan.make_bridge_the_router()?;
        Ok(lan)
    }

    /// A host without a network: [`Host::join`] a LAN next.
    ///
    /// # Errors
    /// When the namespaces cannot be made.
    pub fn host(&self, name: &str) -> Result<Host> {
        let index = self.inner.hosts.fetch_add(1, Ordering::Relaxed);
        Host::new(Arc::clone(&self.inner), name, index)
    }

    /// A host alone on a private LAN behind a gateway (`NAME-gw`) on `outside`, which masquerades and
    /// lets nothing in that was not asked for.
    ///
    /// # Errors
    /// When the namespaces, links or firewall rules cannot be made.
    pub fn host_behind_nat(&self, name: &str, outside: &Lan) -> Result<Host> {
        let index = self.inner.lans.fetch_add(1, Ordering::Relaxed);
        let network = Ipv4Addr::new(192, 168, index, 0);
        let inside = Lan::new(Arc::clone(&self.inner), &format!("{name}-lan"), index, network)?;
        let gateway = self.host(&format!("{name}-gw"))?;
        gateway.join(outside)?;
        gateway.route_for(&inside, outside)?;
        let host = self.host(name)?;
        host.join(&inside)?;
        host.set_gateway(gateway);
        Ok(host)
    }

    /// Silences a pair of neighbours on every LAN they share, as a broken path does: packets vanish,
    /// links stay up.
    ///
    /// # Errors
    /// When the two share no LAN, or `iptables` fails.
    pub fn cut(&self, a: &Host, b: &Host) -> Result<()> {
        self.cut_one_way(a, b)?;
        self.cut_one_way(b, a)
    }

    /// Like [`Lab::cut`], but only what `from` sends to `to` vanishes.
    ///
    /// # Errors
    /// As [`Lab::cut`].
    pub fn cut_one_way(&self, from: &Host, to: &Host) -> Result<()> {
        to.edge().drop_from(&from.edge(), true)
    }

    /// Ends [`Lab::cut`] or [`Lab::cut_one_way`] between the two, whichever it was.
    ///
    /// # Errors
    /// As [`Lab::cut`].
    pub fn heal(&self, a: &Host, b: &Host) -> Result<()> {
        b.edge().drop_from(&a.edge(), false)?;
        a.edge().drop_from(&b.edge(), false)
    }
}
