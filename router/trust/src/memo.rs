//! Remembers checks that passed, in bounded memory.

use std::collections::HashMap;

/// A set of digests, each good until a time. Two generations: when the young one is full it becomes the old one, and
/// what was not asked for since the last change is forgotten.
#[derive(Debug)]
pub(crate) struct Memo {
    young: HashMap<[u8; 32], i64>,
    old: HashMap<[u8; 32], i64>,
    generation_len_max: usize,
}

impl Memo {
    /// Holds at most `len_max` digests.
    pub(crate) fn new(len_max: usize) -> Self {
        Self { young: HashMap::new(), old: HashMap::new(), generation_len_max: len_max / 2 }
    }

    /// Until when `digest` is good; `None` if it is not known or no longer good at `unix_s`.
    pub(crate) fn until(&mut self, digest: &[u8; 32], unix_s: i64) -> Option<i64> {
        let known = self.young.get(digest).or_else(|| self.old.get(digest)).copied();
        let until = known.filter(|&until| until > unix_s)?;
        if !self.young.contains_key(digest) {
            self.insert(*digest, until);
        }
        Some(until)
    }

    pub(crate) fn contains(&mut self, digest: &[u8; 32], unix_s: i64) -> bool {
        self.until(digest, unix_s).is_some()
    }

    pub(crate) fn insert(&mut self, digest: [u8; 32], until: i64) {
        if self.young.len() >= self.generation_len_max {
            self.old = std::mem::take(&mut self.young);
        }
        self.young.insert(digest, until);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn digest(n: u32) -> [u8; 32] {
        let mut out = [0; 32];
        out[..4].copy_from_slice(&n.to_be_bytes());
        out
    }

    #[test]
    fn what_is_asked_for_stays_and_the_rest_is_forgotten() {
        let mut memo = Memo::new(100);
        for n in 0..10_000 {
            memo.insert(digest(n), i64::MAX);
            assert!(memo.contains(&digest(0), 0), "asked for all the time");
            assert!(memo.young.len() + memo.old.len() <= 100);
        }
        assert!(memo.contains(&digest(9_999), 0));
        assert!(!memo.contains(&digest(5_000), 0));
    }

    #[test]
    fn what_expired_is_not_good() {
        let mut memo = Memo::new(100);
        memo.insert(digest(1), 10);
        assert_eq!(memo.until(&digest(1), 9), Some(10));
        assert_eq!(memo.until(&digest(1), 10), None);
    }
}
