//! How many labs stand at a time. Most of what happens in one is waiting, so that several share the machine well; a test that measures
//! what the machine can do wants it [`alone`].

use std::marker::PhantomData;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, ThreadId};
use std::time::Duration;

/// Labs of one process that may stand at a time, for each core: they wait two thirds of the time and more.
const LABS_PER_CORE: usize = 2;
/// On a large machine no more than has been tried.
const LABS_MAX: usize = 4;
/// All other tests of a process together take less.
const WAIT_MAX: Duration = Duration::from_secs(2 * 3_600);

static TURNS: Turns = Turns {
    taken: Mutex::new(Taken { labs: Vec::new(), alone: None, waiting_alone: 0 }),
    given_back: Condvar::new(),
};

struct Turns {
    taken: Mutex<Taken>,
    given_back: Condvar,
}

struct Taken {
    /// The threads that made them.
    labs: Vec<ThreadId>,
    /// To whom the machine belongs. Its labs need no turn.
    alone: Option<ThreadId>,
    /// No lab overtakes these.
    waiting_alone: usize,
}

impl Turns {
    fn lock(&self) -> MutexGuard<'_, Taken> {
        // A test that failed has given its turn back all the same.
        self.taken.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait_while(&self, busy: impl Fn(&Taken) -> bool) -> MutexGuard<'_, Taken> {
        let waited = self.given_back.wait_timeout_while(self.lock(), WAIT_MAX, |now| busy(now));
        let (taken, timeout) = waited.unwrap_or_else(PoisonError::into_inner);
        assert!(
            !timeout.timed_out(),
            "no turn for a lab: does a test that is `alone()` make one on another thread?"
        );
        taken
    }
}

/// The turn of one lab, unless its thread has the machine for itself.
#[derive(Debug)]
pub(crate) struct Turn {
    /// Whose it is, which need not be the thread that drops it.
    counted: Option<ThreadId>,
}

impl Turn {
    /// Waits for one.
    ///
    /// # Panics
    /// When a lab of this thread stands, which may be the one that would be waited for.
    pub(crate) fn take() -> Self {
        let me = thread::current().id();
        let now = TURNS.lock();
        if now.alone == Some(me) {
            return Self { counted: None };
        }
        let has_lab = now.labs.contains(&me);
        drop(now);
        assert!(!has_lab, "a test makes a second lab while its first one stands");
        let cores = thread::available_parallelism().map_or(1, usize::from);
        let most = (LABS_PER_CORE * cores).min(LABS_MAX);
        let busy =
            |now: &Taken| now.alone.is_some() || now.waiting_alone > 0 || now.labs.len() >= most;
        TURNS.wait_while(busy).labs.push(me);
        Self { counted: Some(me) }
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        let Some(owner) = self.counted else { return };
        let mut now = TURNS.lock();
        if let Some(at) = now.labs.iter().position(|lab| *lab == owner) {
            now.labs.swap_remove(at);
        }
        TURNS.given_back.notify_all();
    }
}

/// The machine, for the tests of one thread.
#[derive(Debug)]
#[must_use]
pub struct Alone {
    /// It is given back by the thread that has it.
    _thread: PhantomData<*const ()>,
}

/// Waits until no lab of this process stands, and lets none be made but by this thread until what it gives is dropped.
///
/// # Panics
/// When a lab of this thread stands, or the machine belongs to it already: it would wait for itself.
pub fn alone() -> Alone {
    let me = thread::current().id();
    let mut now = TURNS.lock();
    let waits_for_itself = now.alone == Some(me) || now.labs.contains(&me);
    now.waiting_alone += usize::from(!waits_for_itself);
    drop(now);
    assert!(!waits_for_itself, "`alone()` comes first in a test, and once");
    let mut taken = TURNS.wait_while(|now| now.alone.is_some() || !now.labs.is_empty());
    taken.waiting_alone -= 1;
    taken.alone = Some(me);
    Alone { _thread: PhantomData }
}

impl Drop for Alone {
    fn drop(&mut self) {
        TURNS.lock().alone = None;
        TURNS.given_back.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::{Turn, alone};
    use std::panic::catch_unwind;
    use std::sync::mpsc::channel;
    use std::time::Duration;

    #[test]
    fn who_has_the_machine_makes_labs_and_others_wait() {
        let machine = alone();
        drop([Turn::take(), Turn::take(), Turn::take()]);
        let (took, taken) = channel();
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let turn = Turn::take();
                took.send("a lab").ok();
                drop(turn);
                drop(alone());
                took.send("the machine").ok();
            });
            assert!(taken.recv_timeout(Duration::from_millis(50)).is_err(), "nobody waits");
            drop(machine);
            assert_eq!(taken.recv(), Ok("a lab"));
            assert_eq!(taken.recv(), Ok("the machine"));
        });
    }

    #[test]
    fn who_would_wait_for_himself_fails() {
        let turn = Turn::take();
        catch_unwind(Turn::take).expect_err("a second lab");
        catch_unwind(alone).expect_err("the machine, with a lab on it");
        // The turn is given back wherever the lab ends.
        std::thread::scope(|scope| scope.spawn(move || drop(turn)).join()).expect("dropped");
        let machine = alone();
        catch_unwind(alone).expect_err("twice");
        drop(machine);
        drop(Turn::take());
    }
}
