//! A process on a simulated host: a runtime of its own, stepped in virtual time.

use crate::net::{Host, Sockets, enter};
use std::{io, time::Duration};
use tokio::{
    runtime::{Builder, Handle, Runtime},
    time::{self, Instant},
};

/// A process. Dropped, it ends as by `kill -9`.
#[derive(Debug)]
pub struct Process {
    host: Host,
    runtime: Option<Runtime>,
    /// The runtime's clock when it began, and virtual time then.
    began: Instant,
    began_us: u64,
    clock_us: u64,
    is_frozen: bool,
}

impl Process {
    /// A process without anything to do yet.
    ///
    /// # Errors
    /// There is no runtime to be had.
    pub fn new(host: &Host) -> io::Result<Self> {
        // No I/O driver: whoever reaches for the real network fails.
        let runtime = Builder::new_current_thread().enable_time().start_paused(true).build()?;
        let began = runtime.block_on(async { Instant::now() });
        let began_us = host.net.now_us();
        Ok(Self {
            host: host.for_process(),
            runtime: Some(runtime),
            began,
            began_us,
            clock_us: began_us,
            is_frozen: false,
        })
    }

    /// Its host, with this process as the owner of sockets.
    #[must_use]
    pub fn host(&self) -> &Host {
        &self.host
    }

    /// Its runtime, to spawn on.
    #[must_use]
    pub fn handle(&self) -> &Handle {
        self.runtime.as_ref().expect("invariant: taken only when dropped").handle()
    }

    /// What it holds open.
    #[must_use]
    pub fn sockets(&self) -> Sockets {
        self.host.net.with(|world| world.sockets_of(self.host.owner))
    }

    /// Runs `f` as a part of this process, at once.
    pub fn run<R>(&self, f: impl FnOnce() -> R) -> R {
        let _current = enter(&self.host);
        let _runtime = self.handle().enter();
        f()
    }

    /// Lets it run until then.
    pub(crate) fn step(&mut self, until_us: u64) {
        if self.is_frozen {
            return;
        }
        let _current = enter(&self.host);
        let behind_us = until_us.saturating_sub(self.clock_us);
        let missed = behind_us.saturating_sub(1_000);
        let until = self.began + Duration::from_micros(until_us - self.began_us);
        let was_frozen = missed > 20_000;
        let Some(runtime) = &self.runtime else { return };
        runtime.block_on(async {
            if was_frozen {
                // Its clock ran on: everything that was due is due now, at once.
                time::advance(Duration::from_micros(missed)).await;
            }
            time::sleep_until(until).await;
        });
        self.clock_us = until_us;
    }

    /// Stops it where it is, or lets it go on. Its sockets live on: the kernel is not frozen.
    pub fn set_frozen(&mut self, is_frozen: bool) {
        self.is_frozen = is_frozen;
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // The kernel closes its sockets; whatever its code does while it is taken down, nobody hears.
        self.host.net.with(|world| world.close_all_of(self.host.owner));
        let _current = enter(&self.host);
        drop(self.runtime.take());
    }
}
