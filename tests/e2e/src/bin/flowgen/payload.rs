//! Bytes that are a function of (seed, flow, direction, offset).

/// Writes or checks one direction of one flow, from its beginning.
#[derive(Clone, Debug)]
pub(crate) struct Payload {
    state: u64,
    word: [u8; 8],
    used: usize,
}

/// Which way the bytes go.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Direction {
    Up,
    Down,
}

impl Payload {
    pub(crate) fn new(seed: u64, flow: u64, direction: Direction) -> Self {
        let salt = match direction {
            Direction::Up => 0x9e37_79b9_7f4a_7c15,
            Direction::Down => 0xd1b5_4a32_d192_ed03,
        };
        let state = mix(seed ^ salt).wrapping_add(mix(flow.wrapping_add(salt)));
        Self { state, word: [0; 8], used: 8 }
    }

    pub(crate) fn fill(&mut self, buffer: &mut [u8]) {
        for byte in buffer {
            *byte = self.next();
        }
    }

    /// How many bytes are not what they should be.
    pub(crate) fn check(&mut self, buffer: &[u8]) -> u64 {
        buffer.iter().map(|byte| u64::from(*byte != self.next())).sum()
    }

    fn next(&mut self) -> u8 {
        if self.used == self.word.len() {
            self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
            self.word = mix(self.state).to_le_bytes();
            self.used = 0;
        }
        let byte = self.word[self.used];
        self.used += 1;
        byte
    }
}

/// SplitMix64.
fn mix(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::{Direction, Payload};

    #[test]
    fn any_difference_is_counted_and_pieces_do_not_matter() {
        let mut bytes = vec![0; 1000];
        Payload::new(1, 2, Direction::Up).fill(&mut bytes);
        let mut check = Payload::new(1, 2, Direction::Up);
        assert_eq!(check.check(&bytes[..13]) + check.check(&bytes[13..]), 0);
        assert!(Payload::new(1, 2, Direction::Down).check(&bytes) > 900);
        assert!(Payload::new(1, 3, Direction::Up).check(&bytes) > 900);
        assert!(Payload::new(1, 2, Direction::Up).check(&bytes[1..]) > 900);
        bytes[500] ^= 1;
        assert_eq!(Payload::new(1, 2, Direction::Up).check(&bytes), 1);
    }
}
