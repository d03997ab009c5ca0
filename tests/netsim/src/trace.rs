//! What has happened, as a number: two runs of one seed must agree on it.

/// Running hash of every event.
#[derive(Debug, Default)]
pub(crate) struct Trace {
    hash: u64,
    events: u64,
}

impl Trace {
    /// Takes an event in.
    pub(crate) fn note(&mut self, words: &[u64]) {
        self.events += 1;
        words.iter().for_each(|word| self.mix(*word));
    }

    /// Takes what was sent in.
    pub(crate) fn note_bytes(&mut self, bytes: &[u8]) {
        let (words, rest) = bytes.as_chunks::<8>();
        for word in words {
            self.mix(u64::from_le_bytes(*word));
        }
        rest.iter().for_each(|byte| self.mix(u64::from(*byte)));
    }

    fn mix(&mut self, word: u64) {
        // FNV-1a over words: cheap, and any difference spreads.
        self.hash = (self.hash ^ word).wrapping_mul(0x0000_0100_0000_01b3).rotate_left(23);
    }

    /// Hash and number of events so far.
    pub(crate) fn digest(&self) -> (u64, u64) {
        (self.hash, self.events)
    }
}
