//! Limits of time on a machine that is busy with other things.
#![allow(dead_code, reason = "each test uses its part")]

use parking_lot::Mutex;
use std::{sync::Arc, time::Duration};
use tokio::{
    runtime::Handle,
    task::JoinSet,
    time::{self, Instant},
};

/// How often it is looked whether the runtime comes to it in time.
const TICK: Duration = Duration::from_millis(10);

/// The time since it was started, and how late tasks ran meanwhile on the runtimes that it was started on.
pub(crate) struct Stopwatch {
    began: Instant,
    ticks: Vec<Arc<Mutex<Ticks>>>,
    _ticking: JoinSet<()>,
}

struct Ticks {
    next: Instant,
    late_max: Duration,
}

impl Ticks {
    fn late_max(&self) -> Duration {
        self.late_max.max(self.next.elapsed())
    }
}

impl Stopwatch {
    /// On the runtime of the caller.
    pub(crate) fn start() -> Self {
        Self::start_on([Handle::current()])
    }

    /// On runtimes that live as long as it is looked at.
    pub(crate) fn start_on(runtimes: impl IntoIterator<Item = Handle>) -> Self {
        let began = Instant::now();
        let mut ticking = JoinSet::new();
        let start = |runtime| {
            let ticks = Ticks { next: began + TICK, late_max: Duration::ZERO };
            let ticks = Arc::new(Mutex::new(ticks));
            ticking.spawn_on(tick(Arc::clone(&ticks)), &runtime);
            ticks
        };
        Self { began, ticks: runtimes.into_iter().map(start).collect(), _ticking: ticking }
    }

    /// How late tasks ran at worst.
    pub(crate) fn late_max(&self) -> Duration {
        self.ticks.iter().map(|ticks| ticks.lock().late_max()).max().unwrap_or_default()
    }

    /// `limit`, and what the machine adds: on a way of a few steps each waits for it once.
    pub(crate) fn extended(&self, limit: Duration) -> Duration {
        limit + 4 * self.late_max()
    }

    /// That it was started less than `limit` ago, extended.
    #[track_caller]
    pub(crate) fn assert_within(&self, limit: Duration) {
        let (took, extended) = (self.began.elapsed(), self.extended(limit));
        assert!(took < extended, "{took:?}, and no more than {extended:?} are expected");
    }
}

async fn tick(ticks: Arc<Mutex<Ticks>>) {
    loop {
        let next = ticks.lock().next;
        time::sleep_until(next).await;
        let mut ticks = ticks.lock();
        ticks.late_max = ticks.late_max();
        ticks.next = Instant::now() + TICK;
    }
}
