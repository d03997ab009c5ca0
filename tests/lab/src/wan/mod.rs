//! A WAN box: a thread of this process that carries frames between two network interfaces and treats them as a long, lossy or
//! narrow way would.
//!
//! The interfaces are TUN devices (of the Ethernet kind): one is the host's, the other is plugged into the LAN in the host's
//! place. What becomes of the n-th packet is decided by the seed; when it passes is real time, to within what the scheduler of
//! the machine allows.

mod packet;
mod path;
mod profile;

use std::fmt;
use std::fs::File;
use std::io::{self, ErrorKind};
use std::os::fd::AsFd as _;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, mpsc};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use tun_rs::{DeviceBuilder, Layer, SyncDevice};

pub use profile::{Counters, Loss, Mtu, Profile, Rate};

use crate::clock;
use path::Path;

/// The largest frame of a TUN device.
const FRAME_BYTES_MAX: usize = 65_535 + 14;
/// Frames taken from an interface until the other one and what is due have their turn.
const BATCH_MAX: usize = 64;
/// Frames the kernel keeps for us while we do not run: what a box drops must be what it was told to drop.
const KERNEL_QUEUE_FRAMES: u32 = 10_000;
/// How soon the thread notices that it is to end.
const NAP_MAX: Duration = Duration::from_millis(50);

/// Which way packets go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// From the host to the LAN.
    Up,
    /// From the LAN to the host.
    Down,
}

/// A way between a host and a LAN, changed while packets travel it. Handles are cheap to clone; the host has one.
#[derive(Clone)]
pub struct Wan {
    shared: Arc<Shared>,
}

struct Shared {
    paths: Arc<Paths>,
    thread: Option<JoinHandle<()>>,
}

struct Paths {
    up: Mutex<Path>,
    down: Mutex<Path>,
    stop: AtomicBool,
}

/// Names of the two interfaces.
pub(crate) struct Ends<'a> {
    pub(crate) host: &'a str,
    pub(crate) lan: &'a str,
}

impl Wan {
    /// Makes both interfaces in a network namespace, from where they can be moved.
    pub(crate) fn start(seed: u64, network: File, ends: Ends<'_>) -> Result<Self> {
        let names = [ends.host, ends.lan].map(str::to_owned);
        let paths = Arc::new(Paths {
            up: Mutex::new(Path::new(seed)),
            // What happens one way must not mirror what happens the other way.
            down: Mutex::new(Path::new(!seed)),
            stop: AtomicBool::new(false),
        });
        let (told, made) = mpsc::channel();
        let run = {
            let paths = Arc::clone(&paths);
            move || match devices(&network, &names) {
                Ok(devices) => {
                    // Whoever asked waits for it.
                    let _ = told.send(Ok(()));
                    paths.carry(&devices);
                }
                Err(error) => drop(told.send(Err(error))),
            }
        };
        let thread = std::thread::Builder::new().name("wan".to_owned()).spawn(run)?;
        let wan = Self { shared: Arc::new(Shared { paths, thread: Some(thread) }) };
        made.recv().context("the thread of the WAN box ended")??;
        Ok(wan)
    }

    /// Sets how packets that enter from now on fare, in both directions.
    pub fn set(&self, profile: &Profile) {
        self.set_one_way(Direction::Up, profile.clone());
        self.set_one_way(Direction::Down, profile.clone());
    }

    /// Sets how packets that enter from now on fare, in one direction.
    pub fn set_one_way(&self, direction: Direction, profile: Profile) {
        self.path(direction).set(profile);
    }

    /// Changes some of what is set, in both directions.
    pub fn change(&self, change: impl Fn(&mut Profile)) {
        for direction in [Direction::Up, Direction::Down] {
            let mut path = self.path(direction);
            let mut profile = path.profile().clone();
            change(&mut profile);
            path.set(profile);
        }
    }

    /// What has happened in one direction so far.
    #[must_use]
    pub fn counters(&self, direction: Direction) -> Counters {
        self.path(direction).counters
    }

    fn path(&self, direction: Direction) -> MutexGuard<'_, Path> {
        self.shared.paths.path(direction)
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        self.paths.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            // It has said why on stderr if it panicked.
            let _ = thread.join();
        }
    }
}

/// Both interfaces, the host's first, made in `network`. Enters it for good: for a thread of its own.
fn devices(network: &File, names: &[String; 2]) -> Result<[SyncDevice; 2]> {
    move_into_link_name_space(network.as_fd(), Some(LinkNameSpaceType::Network))
        .context("enter the network of the lab (only root can)")?;
    let make = |name: &String| -> Result<SyncDevice> {
        let device = DeviceBuilder::new()
            .name(name.as_str())
            .layer(Layer::L2)
            .tx_queue_len(KERNEL_QUEUE_FRAMES)
            .enable(false)
            .build_sync()
            .with_context(|| format!("make the TUN device {name}"))?;
        device.set_nonblocking(true)?;
        Ok(device)
    };
    Ok([make(&names[0])?, make(&names[1])?])
}

impl Paths {
    fn path(&self, direction: Direction) -> MutexGuard<'_, Path> {
        let path = match direction {
            Direction::Up => &self.up,
            Direction::Down => &self.down,
        };
        path.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Carries frames until told to stop or an interface is gone.
    fn carry(&self, [host, lan]: &[SyncDevice; 2]) {
        let mut buffer = vec![0; FRAME_BYTES_MAX];
        while !self.stop.load(Ordering::Relaxed) {
            let more = [
                self.take_in(Direction::Up, host, &mut buffer),
                self.take_in(Direction::Down, lan, &mut buffer),
            ];
            self.let_out(Direction::Up, lan);
            self.let_out(Direction::Down, host);
            let nap = if more.contains(&true) { Duration::ZERO } else { self.nap() };
            if wait([host, lan], nap).is_err() {
                return;
            }
        }
    }

    /// Takes what has arrived at an interface; `true` if there may be more.
    fn take_in(&self, direction: Direction, from: &SyncDevice, buffer: &mut [u8]) -> bool {
        for _ in 0..BATCH_MAX {
            let Ok(len) = from.recv(buffer) else { return false };
            let told = self.path(direction).push(clock::now(), buffer[..len].to_vec());
            if let Some(told) = told {
                self.send(direction, from, &told);
            }
        }
        true
    }

    fn let_out(&self, direction: Direction, to: &SyncDevice) {
        loop {
            let frame = self.path(direction).pop(clock::now());
            let Some(frame) = frame else { return };
            self.send(direction, to, &frame);
        }
    }

    fn send(&self, direction: Direction, to: &SyncDevice, frame: &[u8]) {
        if to.send(frame).is_err() {
            self.path(direction).counters.undelivered += 1;
        }
    }

    fn nap(&self) -> Duration {
        let next = |direction| self.path(direction).next_due();
        let next: Option<Instant> =
            next(Direction::Up).into_iter().chain(next(Direction::Down)).min();
        next.map_or(NAP_MAX, |due| due.saturating_duration_since(clock::now()).min(NAP_MAX))
    }
}

/// Waits until a frame arrives or the time is over.
fn wait(devices: [&SyncDevice; 2], nap: Duration) -> io::Result<()> {
    let mut fds = devices.map(|device| PollFd::from_borrowed_fd(device.as_fd(), PollFlags::IN));
    let nap = Timespec::try_from(nap).map_err(|_| ErrorKind::InvalidInput)?;
    match poll(&mut fds, Some(&nap)) {
        Ok(_) | Err(rustix::io::Errno::INTR) => {}
        Err(error) => return Err(error.into()),
    }
    let is_gone = |fd: &PollFd<'_>| fd.revents().contains(PollFlags::ERR);
    if fds.iter().any(is_gone) { Err(ErrorKind::NotConnected.into()) } else { Ok(()) }
}

impl fmt::Debug for Wan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (up, down) = (self.counters(Direction::Up), self.counters(Direction::Down));
        f.debug_struct("Wan").field("up", &up).field("down", &down).finish()
    }
}
