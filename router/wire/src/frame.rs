//! The header in front of every end-to-end packet (`docs/protocol.md`, chapter "Frames").
//!
//! All functions work in place on one frame: header, then payload. A frame is authenticated hop by hop; only its
//! payload is secret, and that end to end.

use siphasher::sip::SipHasher24;
use skein_core::{Handle, Label, Pin};
use std::fmt;

/// Length of the ordinary header; a GSO batch relies on it being the same for all frames of a path.
pub const HEADER_LEN: usize = 32;
/// Length of the header for paths of more than eight hops.
pub const LONG_HEADER_LEN: usize = 64;
/// Labels in the ordinary header.
pub const LABELS_SHORT: usize = 7;
/// Labels in the long header.
pub const LABELS_LONG: usize = 23;
/// Pieces a packet may be split into.
pub const FRAGMENTS_MAX: usize = 8;
/// Length of what precedes the piece in a fragment frame's payload.
pub const FRAGMENT_HEAD_LEN: usize = 4;
/// Payload of a control frame, padding excluded.
pub const CONTROL_LEN: usize = 16;
/// How far a frame may lag behind the newest one; wider than the reordering of a network card with several queues.
pub const REPLAY_WINDOW: u64 = 2_048;

const PREFIX_MASK: u8 = 0b1100_0000;
const PREFIX: u8 = 0b1000_0000;
const LONG: u8 = 0b0010_0000;
const REPAIRED: u8 = 0b0001_0000;
const EPOCH_SHIFT: u8 = 2;
const EPOCH_MASK: u8 = 0b0000_1100;
const KIND_MASK: u8 = 0b0000_0011;
const PIN_BITS: u8 = 3;
const PIN_MASK: u8 = 0b0000_0111;
const COUNTER_AT: usize = 2;
const MAC_AT: usize = 6;
const SOURCE_AT: usize = 14;
const LABELS_AT: usize = 18;
/// Payload bytes covered by the authentication code: enough to bind it to one packet of an encrypted stream.
const MAC_PAYLOAD_LEN: usize = 16;

/// Whether a datagram's first byte says frame rather than QUIC, whose packets have bit 0x40 set.
#[must_use]
pub fn is_frame(first_byte: u8) -> bool {
    first_byte & PREFIX_MASK == PREFIX
}

/// What a frame's payload is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum FrameKind {
    /// One end-to-end packet.
    Data,
    /// A piece of one.
    Fragment,
    /// Between neighbours only: probes and challenges.
    Control,
}

/// Why bytes are not a frame.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum FrameError {
    /// Shorter than its header.
    #[error("shorter than its header")]
    Truncated,
    /// The first byte is not that of a frame.
    #[error("not a frame")]
    NotAFrame,
    /// A kind from a later version; to be ignored.
    #[error("a frame kind from a later version")]
    UnknownKind,
}

/// The fixed fields of a header.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Header {
    /// What the payload is.
    pub kind: FrameKind,
    /// Length of the header in bytes.
    pub len: usize,
    /// Sent round a dead link already.
    pub repaired: bool,
    /// Which handshake the key is from, modulo 4.
    pub epoch: u8,
    /// Index of the label the receiver looks at.
    pub position: u8,
    /// The path the packet is pinned to.
    pub pin: Pin,
    /// The router that wrote the packet.
    pub source: Handle,
}

impl Header {
    /// Reads the fixed fields, whose truth [`Opener::open`] establishes.
    ///
    /// # Errors
    /// When the bytes cannot be a frame.
    pub fn parse(frame: &[u8]) -> Result<Self, FrameError> {
        let (&flags, len) = (frame.first().ok_or(FrameError::Truncated)?, header_len(frame));
        if !is_frame(flags) {
            return Err(FrameError::NotAFrame);
        }
        if frame.len() < len {
            return Err(FrameError::Truncated);
        }
        let kind = match flags & KIND_MASK {
            0 => FrameKind::Data,
            1 => FrameKind::Fragment,
            2 => FrameKind::Control,
            _ => return Err(FrameError::UnknownKind),
        };
        Ok(Self {
            kind,
            len,
            repaired: flags & REPAIRED != 0,
            epoch: (flags & EPOCH_MASK) >> EPOCH_SHIFT,
            position: frame[1] >> PIN_BITS,
            pin: Pin(frame[1] & PIN_MASK),
            source: Handle(be32(frame, SOURCE_AT)),
        })
    }

    /// The label the receiver has to follow; `None` when the frame has arrived.
    #[must_use]
    pub fn next_label(&self, frame: &[u8]) -> Option<Label> {
        let at = LABELS_AT + 2 * usize::from(self.position);
        let label = frame.get(at..at + 2).filter(|_| at + 2 <= self.len)?;
        let label = u16::from_be_bytes([label[0], label[1]]);
        (label != 0).then_some(Label(label))
    }

    /// The labels after the one the receiver follows, to the end of the stack.
    pub fn labels_after_next<'a>(&self, frame: &'a [u8]) -> impl Iterator<Item = Label> + 'a {
        let from = (LABELS_AT + 2 * (usize::from(self.position) + 1)).min(self.len);
        let stack = frame.get(from..self.len).unwrap_or_default();
        stack
            .chunks_exact(2)
            .map(|label| Label(u16::from_be_bytes([label[0], label[1]])))
            .take_while(|label| label.0 != 0)
    }
}

fn header_len(frame: &[u8]) -> usize {
    if frame.first().is_some_and(|flags| flags & LONG != 0) { LONG_HEADER_LEN } else { HEADER_LEN }
}

fn be32(bytes: &[u8], at: usize) -> u32 {
    u32::from_be_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

/// The path has more labels than the header has room for.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("the path is too long for a frame header")]
pub struct StackTooLong;

/// A header without counter and authentication code: made once per destination, copied in front of each packet.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Template {
    bytes: [u8; LONG_HEADER_LEN],
    len: usize,
}

impl Template {
    /// The header of data that `source` sends along `labels`, the long form only where it must be.
    ///
    /// # Errors
    /// When there are more than [`LABELS_LONG`] labels.
    pub fn data(source: Handle, pin: Pin, labels: &[Label]) -> Result<Self, StackTooLong> {
        let mut bytes = [0; LONG_HEADER_LEN];
        let len = match labels.len() {
            0..=LABELS_SHORT => HEADER_LEN,
            n if n <= LABELS_LONG => LONG_HEADER_LEN,
            _ => return Err(StackTooLong),
        };
        bytes[0] = PREFIX | if len == LONG_HEADER_LEN { LONG } else { 0 };
        bytes[1] = pin.0 & PIN_MASK;
        bytes[SOURCE_AT..LABELS_AT].copy_from_slice(&source.0.to_be_bytes());
        write_stack(&mut bytes[..len], labels);
        Ok(Self { bytes, len })
    }

    /// The header's bytes.
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        &self.bytes[..self.len]
    }

    /// The same header in front of fragments.
    #[must_use]
    pub fn fragment(mut self) -> Self {
        self.bytes[0] |= 1;
        self
    }
}

impl fmt::Debug for Template {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Template").field(&Header::parse(self.bytes())).finish()
    }
}

fn write_stack(header: &mut [u8], labels: &[Label]) {
    let stack = &mut header[LABELS_AT..];
    stack.fill(0);
    for (slot, label) in stack.chunks_exact_mut(2).zip(labels) {
        slot.copy_from_slice(&label.0.to_be_bytes());
    }
}

/// Moves a frame's position to the next label; the frame then needs sealing for its next link.
///
/// # Panics
/// If the frame is shorter than a header: it must have been opened before.
pub fn advance(frame: &mut [u8]) {
    frame[1] = frame[1].wrapping_add(1 << PIN_BITS);
}

/// Gives a frame a new stack that leads round a dead link and marks it, so that it is not repaired again.
///
/// # Errors
/// When the new stack does not fit the header the frame has; its length must not change.
pub fn reroute(frame: &mut [u8], labels: &[Label]) -> Result<(), StackTooLong> {
    let len = header_len(frame);
    let room = if len == LONG_HEADER_LEN { LABELS_LONG } else { LABELS_SHORT };
    if labels.len() > room || frame.len() < len {
        return Err(StackTooLong);
    }
    write_stack(&mut frame[..len], labels);
    frame[0] |= REPAIRED;
    frame[1] &= PIN_MASK;
    Ok(())
}

/// Secret of one direction of one link.
#[derive(Clone)]
pub struct Key([u8; 16]);

impl Key {
    /// A key from the link's handshake.
    #[must_use]
    pub fn new(bytes: [u8; 16]) -> Self {
        Self(bytes)
    }

    /// Authentication code over counter, header, length and the beginning of the payload.
    fn code(&self, frame: &[u8], counter: u64) -> u64 {
        const COVERED_MAX: usize = 8 + 2 + LONG_HEADER_LEN - SOURCE_AT + 2 + MAC_PAYLOAD_LEN;
        let header = header_len(frame);
        let payload = (frame.len() - header).min(MAC_PAYLOAD_LEN);
        let mut input = [0_u8; COVERED_MAX];
        input[..8].copy_from_slice(&counter.to_be_bytes());
        input[8..10].copy_from_slice(&frame[..2]);
        // A datagram is shorter than 65,536 bytes.
        #[allow(clippy::cast_possible_truncation, reason = "bounded by UDP")]
        input[10..12].copy_from_slice(&(frame.len() as u16).to_be_bytes());
        let covered = header - SOURCE_AT + payload;
        input[12..12 + covered].copy_from_slice(&frame[SOURCE_AT..SOURCE_AT + covered]);
        SipHasher24::new_with_key(&self.0).hash(&input[..12 + covered])
    }
}

impl fmt::Debug for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Key(..)")
    }
}

/// Writes epoch, counter and authentication code into a frame. A counter must never be used twice with a key.
///
/// # Panics
/// If the frame is shorter than its header.
pub fn seal(frame: &mut [u8], key: &Key, epoch: u8, counter: u64) {
    frame[0] = frame[0] & !EPOCH_MASK | (epoch << EPOCH_SHIFT) & EPOCH_MASK;
    #[allow(clippy::cast_possible_truncation, reason = "the low half is what is sent")]
    frame[COUNTER_AT..MAC_AT].copy_from_slice(&(counter as u32).to_be_bytes());
    let code = key.code(frame, counter);
    frame[MAC_AT..SOURCE_AT].copy_from_slice(&code.to_be_bytes());
}

/// Why a frame is not accepted.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum OpenError {
    /// Not a frame at all.
    #[error(transparent)]
    Malformed(#[from] FrameError),
    /// The authentication code is wrong.
    #[error("wrong authentication code")]
    Unauthenticated,
    /// Seen before, or too old to tell.
    #[error("replayed or too old")]
    Replayed,
}

/// The receiving end of one link direction: key and replay window.
#[derive(Debug)]
pub struct Opener {
    key: Key,
    window: ReplayWindow,
}

impl Opener {
    /// Opens frames sealed with `key`.
    #[must_use]
    pub fn new(key: Key) -> Self {
        Self { key, window: ReplayWindow::default() }
    }

    /// Checks a frame and takes its counter; each frame opens once.
    ///
    /// # Errors
    /// When the frame is malformed, not from the neighbour, or not new. The window is then as before.
    pub fn open(&mut self, frame: &[u8]) -> Result<Header, OpenError> {
        let header = Header::parse(frame)?;
        let counter = self.window.reconstruct(be32(frame, COUNTER_AT));
        let sent = u64::from(be32(frame, MAC_AT)) << 32 | u64::from(be32(frame, MAC_AT + 4));
        // One comparison of two words: nothing to learn from its duration.
        if self.key.code(frame, counter) != sent {
            return Err(OpenError::Unauthenticated);
        }
        if !self.window.take(counter) {
            return Err(OpenError::Replayed);
        }
        Ok(header)
    }
}

const WORDS: usize = (REPLAY_WINDOW / 64) as usize;

/// Which of the newest counters have been seen.
#[derive(Clone, Debug, Default)]
pub struct ReplayWindow {
    /// One above the highest counter seen; 0 when none was.
    next: u64,
    /// Bit `counter % REPLAY_WINDOW` of each counter in the window.
    seen: [u64; WORDS],
}

impl ReplayWindow {
    /// The full counter nearest to the newest one whose low half is `low`.
    #[must_use]
    pub fn reconstruct(&self, low: u32) -> u64 {
        const SPAN: u64 = 1 << 32;
        let guess = self.next & !(SPAN - 1) | u64::from(low);
        if guess.saturating_add(SPAN / 2) < self.next {
            guess.saturating_add(SPAN)
        } else if guess > self.next.saturating_add(SPAN / 2) && guess >= SPAN {
            guess - SPAN
        } else {
            guess
        }
    }

    /// Marks a counter as seen; `false` if it was before, or lies behind the window.
    pub fn take(&mut self, counter: u64) -> bool {
        if counter == u64::MAX || counter + REPLAY_WINDOW < self.next {
            return false;
        }
        if counter >= self.next {
            self.forget(counter);
            self.next = counter + 1;
        }
        let (word, bit) = Self::place(counter);
        let new = self.seen[word] & bit == 0;
        self.seen[word] |= bit;
        new
    }

    /// Clears the bits of the counters from `next` to `to`, which reuse those that leave the window.
    fn forget(&mut self, to: u64) {
        if to - self.next >= REPLAY_WINDOW {
            self.seen = [0; WORDS];
            return;
        }
        for counter in self.next..=to {
            let (word, bit) = Self::place(counter);
            self.seen[word] &= !bit;
        }
    }

    fn place(counter: u64) -> (usize, u64) {
        let at = counter % REPLAY_WINDOW;
        #[allow(clippy::cast_possible_truncation, reason = "below REPLAY_WINDOW")]
        ((at / 64) as usize, 1 << (at % 64))
    }
}

/// What neighbours tell each other outside of the hop connection, because it is about the frames' own way.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Control {
    /// Asks for a reply; padded to the packet size under test.
    Probe {
        /// Opaque to the neighbour.
        token: u64,
    },
    /// Answers a probe.
    ProbeReply {
        /// As in the probe.
        token: u64,
        /// Length of the probe frame as received, in bytes.
        size: u16,
    },
    /// Asks whoever sends from a new address to prove that it is there.
    Challenge([u8; CONTROL_LEN]),
    /// Answers a challenge.
    Echo([u8; CONTROL_LEN]),
}

impl Control {
    /// Appends the frame, still unsealed, padded to `len` bytes at least.
    pub fn encode(&self, source: Handle, len: usize, out: &mut Vec<u8>) {
        let start = out.len();
        let mut payload = [0_u8; CONTROL_LEN];
        let kind = match *self {
            Self::Probe { token } => {
                payload[..8].copy_from_slice(&token.to_be_bytes());
                1
            }
            Self::ProbeReply { token, size } => {
                payload[..8].copy_from_slice(&token.to_be_bytes());
                payload[8..10].copy_from_slice(&size.to_be_bytes());
                2
            }
            Self::Challenge(nonce) => {
                payload = nonce;
                3
            }
            Self::Echo(nonce) => {
                payload = nonce;
                4
            }
        };
        let mut header = [0_u8; HEADER_LEN];
        header[0] = PREFIX | 2;
        header[SOURCE_AT..LABELS_AT].copy_from_slice(&source.0.to_be_bytes());
        header[LABELS_AT] = kind;
        out.extend_from_slice(&header);
        out.extend_from_slice(&payload);
        out.resize(out.len().max(start + len), 0);
    }

    /// Reads an opened control frame; `None` for what a later version may have added.
    #[must_use]
    pub fn decode(frame: &[u8]) -> Option<Self> {
        let payload: [u8; CONTROL_LEN] =
            frame.get(HEADER_LEN..HEADER_LEN + CONTROL_LEN)?.try_into().ok()?;
        let token = u64::from_be_bytes(payload[..8].try_into().ok()?);
        match frame[LABELS_AT] {
            1 => Some(Self::Probe { token }),
            2 => {
                let size = u16::from_be_bytes([payload[8], payload[9]]);
                Some(Self::ProbeReply { token, size })
            }
            3 => Some(Self::Challenge(payload)),
            4 => Some(Self::Echo(payload)),
            _ => None,
        }
    }
}

/// What precedes the piece in a fragment frame's payload.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct FragmentHead {
    /// Names the packet among those of its source and pin.
    pub packet: u16,
    /// Which piece.
    pub index: u8,
    /// How many there are.
    pub count: u8,
}

impl FragmentHead {
    /// The encoded form.
    #[must_use]
    pub fn to_bytes(self) -> [u8; FRAGMENT_HEAD_LEN] {
        let packet = self.packet.to_be_bytes();
        [packet[0], packet[1], self.index, self.count]
    }

    /// Splits a fragment's payload; `None` if it is not a possible fragment.
    #[must_use]
    pub fn split(payload: &[u8]) -> Option<(Self, &[u8])> {
        let (&[high, low, index, count], piece) = payload.split_first_chunk()?;
        let head = Self { packet: u16::from_be_bytes([high, low]), index, count };
        let possible =
            (2..=FRAGMENTS_MAX).contains(&usize::from(count)) && index < count && !piece.is_empty();
        possible.then_some((head, piece))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::{collection::vec, prelude::*};
    use std::collections::HashSet;

    const SOURCE: Handle = Handle(0xdead_beef);

    fn labels(n: usize) -> Vec<Label> {
        (0..n).map(|i| Label(u16::try_from(i).unwrap() * 257 + 1)).collect()
    }

    fn frame(labels: &[Label], payload: &[u8]) -> Vec<u8> {
        let mut frame = Template::data(SOURCE, Pin(2), labels).unwrap().bytes().to_vec();
        frame.extend_from_slice(payload);
        frame
    }

    fn key(byte: u8) -> Key {
        Key::new([byte; 16])
    }

    #[test]
    fn a_frame_walks_its_stack() {
        for n in 0..=LABELS_LONG {
            let stack = labels(n);
            let mut frame = frame(&stack, b"payload");
            for (hop, label) in stack.iter().enumerate() {
                let counter = u64::try_from(hop).unwrap() * 7;
                seal(&mut frame, &key(1), 3, counter);
                let header = Opener::new(key(1)).open(&frame).unwrap();
                assert_eq!(header.next_label(&frame), Some(*label));
                assert!(header.labels_after_next(&frame).eq(stack[hop + 1..].iter().copied()));
                assert_eq!((header.source, header.pin, header.epoch), (SOURCE, Pin(2), 3));
                advance(&mut frame);
            }
            let header = Header::parse(&frame).unwrap();
            assert_eq!(header.next_label(&frame), None);
            assert_eq!(&frame[header.len..], b"payload");
            assert_eq!(header.len == HEADER_LEN, n <= LABELS_SHORT);
        }
        assert_eq!(Template::data(SOURCE, Pin(0), &labels(LABELS_LONG + 1)), Err(StackTooLong));
    }

    #[test]
    fn a_repaired_frame_says_so_and_keeps_its_length() {
        let mut frame = frame(&labels(3), b"x");
        advance(&mut frame);
        let len = frame.len();
        reroute(&mut frame, &[Label(9), Label(8)]).unwrap();
        let header = Header::parse(&frame).unwrap();
        assert!(header.repaired && frame.len() == len);
        assert_eq!(header.next_label(&frame), Some(Label(9)));
        assert!(header.labels_after_next(&frame).eq([Label(8)]));
        assert_eq!(reroute(&mut frame, &labels(8)), Err(StackTooLong));
    }

    #[test]
    fn first_bytes_tell_frames_from_quic() {
        for byte in 0..=u8::MAX {
            assert!(!(is_frame(byte) && byte & 0x40 != 0));
        }
        for frame in [frame(&[], b""), frame(&labels(9), b"")] {
            assert!(is_frame(frame[0]));
        }
    }

    #[test]
    fn a_restarted_window_accepts_any_start_and_no_repetition() {
        let mut window = ReplayWindow::default();
        assert!(window.take(5_000_000) && !window.take(5_000_000));
        assert!(window.take(5_000_000 - REPLAY_WINDOW + 1));
        assert!(!window.take(5_000_000 - REPLAY_WINDOW));
    }

    #[test]
    fn controls_round_trip_and_unknown_ones_are_ignored() {
        for control in [
            Control::Probe { token: 7 },
            Control::ProbeReply { token: u64::MAX, size: 1_472 },
            Control::Challenge([9; CONTROL_LEN]),
            Control::Echo([8; CONTROL_LEN]),
        ] {
            let mut out = vec![1, 2, 3];
            control.encode(SOURCE, 100, &mut out);
            assert_eq!(out.len(), 103);
            let frame = &mut out[3..];
            assert_eq!(Header::parse(frame).unwrap().kind, FrameKind::Control);
            assert_eq!(Control::decode(frame), Some(control));
            frame[LABELS_AT] = 77;
            assert_eq!(Control::decode(frame), None);
        }
    }

    proptest! {
        #[test]
        fn any_change_is_noticed(
            n in 0..=LABELS_LONG, payload in vec(any::<u8>(), 0..64), counter: u64, at: usize, bit in 0..8_u8,
        ) {
            let counter = counter & 0xffff_ffff;
            let mut frame = frame(&labels(n), &payload);
            seal(&mut frame, &key(1), 1, counter);
            prop_assert_eq!(Opener::new(key(2)).open(&frame), Err(OpenError::Unauthenticated));
            let shorter = &frame[..frame.len() - 1];
            prop_assert!(Opener::new(key(1)).open(shorter).is_err());
            let header = Header::parse(&frame).unwrap().len;
            let covered = frame.len().min(header + MAC_PAYLOAD_LEN);
            frame[at % covered] ^= 1 << bit;
            prop_assert!(Opener::new(key(1)).open(&frame).is_err());
        }

        #[test]
        fn random_bytes_never_open_nor_panic(bytes in vec(any::<u8>(), 0..200)) {
            prop_assert!(Opener::new(key(1)).open(&bytes).is_err());
            let _ = Control::decode(&bytes);
            let _ = FragmentHead::split(&bytes);
            if let Ok(header) = Header::parse(&bytes) {
                let _ = (header.next_label(&bytes), header.labels_after_next(&bytes).count());
            }
        }

        #[test]
        fn counters_come_back_from_their_low_half(next: u64, back in 0..REPLAY_WINDOW, ahead in 0_u64..1 << 30) {
            let next = next >> 1;
            let window = ReplayWindow { next, ..ReplayWindow::default() };
            for counter in [next.saturating_sub(back), next + ahead] {
                #[allow(clippy::cast_possible_truncation, reason = "the low half")]
                let low = counter as u32;
                prop_assert_eq!(window.reconstruct(low), counter);
            }
        }

        #[test]
        fn the_window_agrees_with_a_set(
            start in 0_u64..1 << 40, steps in vec((any::<bool>(), 0..3 * REPLAY_WINDOW), 1..300),
        ) {
            let (mut window, mut seen, mut highest) = (ReplayWindow::default(), HashSet::new(), None);
            for (forward, step) in steps {
                let base = highest.unwrap_or(start);
                let counter = if forward { base + step } else { base.saturating_sub(step) };
                let expected = highest.is_none_or(|highest| counter + REPLAY_WINDOW > highest)
                    && seen.insert(counter);
                prop_assert_eq!(window.take(counter), expected);
                highest = highest.max(Some(counter));
            }
        }
    }
}
