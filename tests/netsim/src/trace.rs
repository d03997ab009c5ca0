//! What has happened, as a number: two runs of one seed must agree on it.

/// Running hash of every event, and the log of them where somebody wants to read it.
#[derive(Debug, Default)]
pub(crate) struct Trace {
    hash: u64,
    events: u64,
}

impl Trace {
    /// Takes an event in.
    pub(crate) fn note(&mut self, words: &[u64]) {
        self.events += 1;
        for word in words {
            // FNV-1a over words: cheap, and any difference spreads.
            self.hash = (self.hash ^ word).wrapping_mul(0x0000_0100_0000_01b3).rotate_left(23);
        }
    }

    /// Hash and number of events so far.
    pub(crate) fn digest(&self) -> (u64, u64) {
        (self.hash, self.events)
    }
}
