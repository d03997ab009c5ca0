//! How many labs stand at a time. Most of what happens in one is waiting, so that several share the machine well; a test that measures
//! what the machine can do wants it [`alone`].

use std::cell::Cell;
use std::marker::PhantomData;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

/// Labs of one process that may stand at a time, for each core: they wait two thirds of the time and more.
const LABS_PER_CORE: usize = 2;
/// On a large machine no more than has been tried.
const LABS_MAX: usize = 4;

static TURNS: Turns = Turns {
    taken: Mutex::new(Taken { labs: 0, is_alone: false, waiting_alone: 0 }),
    given_back: Condvar::new(),
};

thread_local! {
    /// Whether the machine belongs to this thread, whose labs need no turn.
    static HAS_MACHINE: Cell<bool> = const { Cell::new(false) };
}

struct Turns {
    taken: Mutex<Taken>,
    given_back: Condvar,
}

struct Taken {
    labs: usize,
    is_alone: bool,
    /// No lab overtakes these.
    waiting_alone: usize,
}

impl Turns {
    fn lock(&self) -> MutexGuard<'_, Taken> {
        // A test that failed has given its turn back all the same.
        self.taken.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait_while(&self, busy: impl Fn(&Taken) -> bool) -> MutexGuard<'_, Taken> {
        let waited = self.given_back.wait_while(self.lock(), |taken| busy(taken));
        waited.unwrap_or_else(PoisonError::into_inner)
    }
}

/// The turn of one lab, unless its thread has the machine for itself.
#[derive(Debug)]
pub(crate) struct Turn {
    is_counted: bool,
}

impl Turn {
    /// Waits for one.
    pub(crate) fn take() -> Self {
        let is_counted = !HAS_MACHINE.get();
        if is_counted {
            let cores = std::thread::available_parallelism().map_or(1, usize::from);
            let most = (LABS_PER_CORE * cores).min(LABS_MAX);
            let busy = |now: &Taken| now.is_alone || now.waiting_alone > 0 || now.labs >= most;
            TURNS.wait_while(busy).labs += 1;
        }
        Self { is_counted }
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        if self.is_counted {
            TURNS.lock().labs -= 1;
            TURNS.given_back.notify_all();
        }
    }
}

/// The machine, for the tests of one thread.
#[derive(Debug)]
#[must_use]
pub struct Alone {
    /// It is given back by the thread that has it.
    _thread: PhantomData<*const ()>,
}

/// Waits until no lab of this process stands, and lets none be made but by this thread until what it gives is dropped. Take it before the
/// first lab: a lab that stands would be waited for.
pub fn alone() -> Alone {
    TURNS.lock().waiting_alone += 1;
    let mut taken = TURNS.wait_while(|now| now.is_alone || now.labs > 0);
    taken.waiting_alone -= 1;
    taken.is_alone = true;
    HAS_MACHINE.set(true);
    Alone { _thread: PhantomData }
}

impl Drop for Alone {
    fn drop(&mut self) {
        HAS_MACHINE.set(false);
        TURNS.lock().is_alone = false;
        TURNS.given_back.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::{Turn, alone};
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
}
