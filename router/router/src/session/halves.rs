//! Datagrams of one association that came in two packets, until both are there. Pure.

use bytes::Bytes;
use std::collections::VecDeque;

/// First comers that wait. The halves of a datagram leave one after the other, so more are only waiting where packets were lost.
const WAITING_MAX: usize = 4;

/// `P` pays for the memory that a half takes.
#[derive(Debug)]
pub(super) struct Halves<P> {
    waiting: VecDeque<Half<P>>,
}

#[derive(Debug)]
struct Half<P> {
    number: u64,
    second: bool,
    payload: Bytes,
    _paid: P,
}

/// What became of a half.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Joined {
    /// Both are there.
    Whole(Vec<u8>),
    /// It waits for the other; so many that waited for longer had to go.
    Waits(u64),
    /// There is no memory for it.
    NoMemory,
}

impl<P> Default for Halves<P> {
    fn default() -> Self {
        Self { waiting: VecDeque::new() }
    }
}

impl<P> Halves<P> {
    /// Takes a half; `pay` is asked for the memory of one that has to wait.
    pub(super) fn join(
        &mut self,
        number: u64,
        second: bool,
        payload: &Bytes,
        pay: impl FnOnce(u64) -> Option<P>,
    ) -> Joined {
        let known = self.waiting.iter().position(|half| half.number == number);
        let known = known.and_then(|at| self.waiting.remove(at));
        match known {
            Some(other) if other.second != second => {
                let (first, last) =
                    if second { (&other.payload, payload) } else { (payload, &other.payload) };
                return Joined::Whole([&first[..], last].concat());
            }
            // Sent twice by a peer that makes numbers up, or by the network: the later one waits on.
            Some(_same) => match self.wait(number, second, payload, pay) {
                Joined::Waits(dropped) => return Joined::Waits(dropped + 1),
                other => return other,
            },
            None => {}
        }
        self.wait(number, second, payload, pay)
    }

    fn wait(
        &mut self,
        number: u64,
        second: bool,
        payload: &Bytes,
        pay: impl FnOnce(u64) -> Option<P>,
    ) -> Joined {
        let Some(paid) = pay(payload.len() as u64) else { return Joined::NoMemory };
        // Copied, because what arrives keeps a whole receive buffer.
        let payload = Bytes::copy_from_slice(payload);
        self.waiting.push_back(Half { number, second, payload, _paid: paid });
        let surplus = self.waiting.len().saturating_sub(WAITING_MAX);
        self.waiting.drain(..surplus);
        Joined::Waits(surplus as u64)
    }

    /// Those that still wait.
    pub(super) fn len(&self) -> u64 {
        self.waiting.len() as u64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn join(halves: &mut Halves<()>, number: u64, second: bool) -> Joined {
        let payload = if second { Bytes::from_static(b"two") } else { Bytes::from_static(b"one") };
        halves.join(number, second, &payload, |_| Some(()))
    }

    #[test]
    fn halves_join_in_either_order() {
        let mut halves = Halves::default();
        assert_eq!(join(&mut halves, 0, false), Joined::Waits(0));
        assert_eq!(join(&mut halves, 1, true), Joined::Waits(0));
        assert_eq!(join(&mut halves, 0, true), Joined::Whole(b"onetwo".to_vec()));
        assert_eq!(join(&mut halves, 1, false), Joined::Whole(b"onetwo".to_vec()));
        assert_eq!(halves.len(), 0);
    }

    #[test]
    fn the_newest_displaces_the_oldest() {
        let mut halves = Halves::default();
        for number in 0..4 {
            assert_eq!(join(&mut halves, number, false), Joined::Waits(0));
        }
        assert_eq!(join(&mut halves, 4, false), Joined::Waits(1));
        assert_eq!(join(&mut halves, 0, true), Joined::Waits(1), "its first half is gone");
        assert_eq!(join(&mut halves, 4, true), Joined::Whole(b"onetwo".to_vec()));
        assert_eq!(join(&mut halves, 0, true), Joined::Waits(1), "nothing is left of it");
    }

    /// A first half waits for long; the second half of any later datagram is not its.
    #[test]
    fn halves_of_two_datagrams_are_never_one() {
        let mut halves = Halves::default();
        assert_eq!(join(&mut halves, 5, false), Joined::Waits(0));
        for later in 1..10_000 {
            let number = 5 + later;
            assert_eq!(join(&mut halves, number, false), Joined::Waits(0));
            assert_eq!(join(&mut halves, number, true), Joined::Whole(b"onetwo".to_vec()));
        }
        assert_eq!(join(&mut halves, 5 + 128, true), Joined::Waits(0), "of one that is lost");
        assert_eq!(join(&mut halves, 5 + (1 << 32), true), Joined::Waits(0));
        assert_eq!(join(&mut halves, 5, true), Joined::Whole(b"onetwo".to_vec()));
    }

    #[test]
    fn what_nobody_pays_for_is_not_kept() {
        let mut halves = Halves::<()>::default();
        let refused = halves.join(0, false, &Bytes::from_static(b"one"), |_| None);
        assert_eq!((refused, halves.len()), (Joined::NoMemory, 0));
    }
}
