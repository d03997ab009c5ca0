//! What a direction of a WAN box does to packets.

use std::time::Duration;

/// How one direction behaves; the default passes everything at once. Shares are between 0 and 1.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Profile {
    /// How long every packet travels.
    pub delay: Duration,
    /// Each packet travels up to this much more or less, evenly spread.
    pub jitter: Duration,
    /// Whether jitter may make packets overtake one another.
    pub jitter_reorders: bool,
    /// Which packets vanish.
    pub loss: Loss,
    /// The share of packets held back by [`Profile::reorder_by`], so that later ones overtake them.
    pub reorder: f64,
    /// How long those are held back.
    pub reorder_by: Duration,
    /// The share of packets that arrive twice.
    pub duplicate: f64,
    /// The bottleneck, if there is one.
    pub rate: Option<Rate>,
    /// The largest packet that passes, if not all do.
    pub mtu: Option<Mtu>,
    /// Drops UDP and lets all else pass.
    pub block_udp: bool,
    /// Drops everything.
    pub blackhole: bool,
}

impl Profile {
    /// One with nothing but delay and random loss.
    #[must_use]
    pub fn lossy(delay: Duration, loss: f64) -> Self {
        Self { delay, loss: Loss::Random(loss), ..Self::default() }
    }
}

/// Which packets vanish on the way.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub enum Loss {
    /// None.
    #[default]
    None,
    /// This share, each for itself.
    Random(f64),
    /// All in a bad state and none in a good one (Gilbert).
    Burst {
        /// Chance of turning bad before a packet.
        enter: f64,
        /// Chance of turning good again before a packet.
        leave: f64,
    },
}

impl Loss {
    /// Bursts of `packets` on average that add up to `share` of all packets.
    #[must_use]
    pub fn burst(share: f64, packets: f64) -> Self {
        let leave = 1.0 / packets.max(1.0);
        Self::Burst { enter: leave * share / (1.0 - share).max(f64::EPSILON), leave }
    }
}

/// A line of limited speed with a queue before it that drops what does not fit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rate {
    /// Bits per second, Ethernet headers included.
    pub bits_per_second: u64,
    /// Bytes that wait at most.
    pub queue_bytes: u64,
}

/// The largest packet that passes. What is larger vanishes: nothing is split.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mtu {
    /// Bytes, IP header included.
    pub bytes: u16,
    /// Whether senders are told (fragmentation needed, packet too big), as many networks do not.
    pub is_told: bool,
}

/// What became of the packets of one direction.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Came in.
    pub received: u64,
    /// Went out, copies included.
    pub delivered: u64,
    /// Bytes that went out, Ethernet headers included.
    pub delivered_bytes: u64,
    /// Vanished by [`Profile::loss`].
    pub lost: u64,
    /// Copied.
    pub duplicated: u64,
    /// Held back for others to overtake.
    pub reordered: u64,
    /// Did not fit the queue of the bottleneck.
    pub overflowed: u64,
    /// Were too large.
    pub too_large: u64,
    /// Were UDP while that was blocked, or anything in a black hole.
    pub blocked: u64,
    /// Found too many bytes on their way: more than the box can hold, so that its figures are no good any more.
    pub unheld: u64,
    /// The interface they were for was down.
    pub undelivered: u64,
}
