//! Two ends of a link over a bad network, in virtual time.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use rand::{Rng as _, SeedableRng as _, rngs::StdRng};

use super::{Due, Liveness};

const MS: Duration = Duration::from_millis(1);
const SILENCE_MIN: Duration = Duration::from_millis(300);
const HALF_AN_HOUR: Duration = Duration::from_secs(1_800);

/// What one direction does to frames.
#[derive(Clone, Copy, Debug)]
struct Network {
    loss: f64,
    /// Frames are lost while a signal fades, which takes this long on average, instead of each for itself.
    fade: Duration,
    delay: Duration,
    /// More or less of it, evenly spread.
    jitter: Duration,
    /// Whether frames overtake one another.
    overtaking: bool,
}

const CLEAN: Network = Network {
    loss: 0.0,
    fade: Duration::ZERO,
    delay: MS,
    jitter: Duration::ZERO,
    overtaking: false,
};
const SATELLITE: Network = Network { loss: 0.07, delay: Duration::from_millis(300), ..CLEAN };
const JITTERY: Network =
    Network { delay: Duration::from_millis(200), jitter: Duration::from_millis(200), ..CLEAN };

/// When data is sent.
#[derive(Clone, Copy, Debug)]
enum Traffic {
    /// Never.
    None,
    /// Just often enough to count as flowing, so that all else that arrives are probes and replies.
    Sparse,
    /// For a second and a half of every three.
    OnOff,
    /// From the first end to the other only.
    OneWay,
}

#[derive(Clone, Copy, Debug)]
enum Frame {
    Probe(u64),
    Reply(u64),
    Data,
}

#[derive(Clone, Copy, Debug)]
enum Event {
    Arrival(usize, Frame),
    Send(usize),
}

struct Simulation {
    rng: StdRng,
    now: Instant,
    start: Instant,
    ends: [Liveness; 2],
    /// What happens to frames each end sends; `None` when they all vanish.
    networks: [Option<Network>; 2],
    /// Whether the signal is weak, and until when it stays so.
    fading: [(bool, Instant); 2],
    last_arrival: [Instant; 2],
    events: BTreeMap<(Instant, u64), Event>,
    sequence: u64,
    traffic: Traffic,
}

impl Simulation {
    fn new(seed: u64, network: Network, traffic: Traffic) -> Self {
        let now = crate::clock::now();
        let rtt = 2 * network.delay;
        let mut simulation = Self {
            rng: StdRng::seed_from_u64(seed),
            now,
            start: now,
            ends: [0, 1].map(|_| Liveness::new(now, rtt, SILENCE_MIN)),
            networks: [Some(network); 2],
            fading: [(false, now); 2],
            last_arrival: [now; 2],
            events: BTreeMap::new(),
            sequence: 0,
            traffic,
        };
        for end in 0..2 {
            simulation.schedule_data(end);
        }
        simulation
    }

    /// Runs for `duration` or until an end takes the link for dead; tells which did, and when.
    fn run(&mut self, duration: Duration) -> Option<(usize, Duration)> {
        let until = self.now + duration;
        loop {
            let timers = [0, 1].map(|end| self.ends[end].poll_timeout(self.now).max(self.now));
            let timer = timers[0].min(timers[1]);
            let next = self.events.first_key_value().map(|((at, _), _)| *at);
            if next.is_none_or(|next| timer < next) {
                self.now = timer;
                if self.now >= until {
                    self.now = until;
                    return None;
                }
                let end = usize::from(timers[1] < timers[0]);
                match self.ends[end].handle_timeout(self.now) {
                    Some(Due::Dead(_)) => return Some((end, self.now - self.start)),
                    Some(Due::Probe { token, .. }) => self.send(end, Frame::Probe(token)),
                    None => {}
                }
                continue;
            }
            let Some(((at, _), event)) = self.events.pop_first() else { continue };
            self.now = at;
            if self.now >= until {
                self.schedule(at, event);
                self.now = until;
                return None;
            }
            self.handle(event);
        }
    }

    fn handle(&mut self, event: Event) {
        match event {
            Event::Arrival(end, frame) => {
                self.ends[end].frame_received(self.now);
                match frame {
                    Frame::Probe(token) => self.send(end, Frame::Reply(token)),
                    Frame::Reply(token) => self.ends[end].reply_received(self.now, token),
                    Frame::Data => drop(self.ends[end].data_moved(self.now)),
                }
            }
            Event::Send(end) => {
                self.ends[end].data_moved(self.now);
                self.send(end, Frame::Data);
                self.schedule_data(end);
            }
        }
    }

    fn send(&mut self, from: usize, frame: Frame) {
        let Some(network) = self.networks[from] else { return };
        if self.is_lost(from, network) {
            return;
        }
        let jitter = 2 * network.jitter.mul_f64(self.rng.random());
        let mut at = self.now + network.delay + jitter - network.jitter;
        if !network.overtaking {
            at = at.max(self.last_arrival[from]);
            self.last_arrival[from] = at;
        }
        self.schedule(at, Event::Arrival(1 - from, frame));
    }

    fn is_lost(&mut self, from: usize, network: Network) -> bool {
        if network.fade.is_zero() {
            return self.rng.random_bool(network.loss);
        }
        while self.fading[from].1 <= self.now {
            let (is_weak, since) = self.fading[from];
            let mean =
                if is_weak { network.fade.mul_f64(1.0 / network.loss - 1.0) } else { network.fade };
            let random: f64 = self.rng.random();
            self.fading[from] = (!is_weak, since + mean.mul_f64(-(1.0 - random).ln()));
        }
        self.fading[from].0
    }

    fn schedule_data(&mut self, end: usize) {
        let gap = match self.traffic {
            Traffic::Sparse => 900 * MS,
            Traffic::OneWay if end == 0 => 20 * MS,
            Traffic::OnOff => {
                let at = (self.now - self.start).as_millis() % 3_000;
                if at < 1_500 { 50 * MS } else { 1_500 * MS }
            }
            _ => return,
        };
        self.schedule(self.now + gap, Event::Send(end));
    }

    fn schedule(&mut self, at: Instant, event: Event) {
        self.sequence += 1;
        self.events.insert((at, self.sequence), event);
    }
}

const TRAFFIC: [Traffic; 4] = [Traffic::None, Traffic::Sparse, Traffic::OnOff, Traffic::OneWay];

/// A few of them in an ordinary run.
fn seeds() -> std::ops::Range<u64> {
    0..if std::env::var_os("SKEIN_LONG").is_some() { 200 } else { 1 }
}

#[test]
fn loss_delay_and_jitter_are_no_death() {
    let networks = [
        SATELLITE,
        Network { jitter: 30 * MS, ..SATELLITE },
        Network { fade: 50 * MS, ..SATELLITE },
        Network { loss: 0.01, delay: 25 * MS, ..CLEAN },
        Network { loss: 0.07, ..CLEAN },
        JITTERY,
        Network { overtaking: true, ..JITTERY },
    ];
    for network in networks {
        for traffic in TRAFFIC {
            for seed in seeds() {
                let alarm = Simulation::new(seed, network, traffic).run(HALF_AN_HOUR);
                assert_eq!(alarm, None, "{network:?} {traffic:?} seed {seed}");
            }
        }
    }
}

/// How long after everything stops from one end, or both, an end notices, and which.
fn cut(network: Network, traffic: Traffic, silent: &[usize]) -> (usize, Duration) {
    let mut simulation = Simulation::new(7, network, traffic);
    assert_eq!(simulation.run(Duration::from_secs(60)), None);
    for &end in silent {
        simulation.networks[end] = None;
    }
    let before = simulation.now - simulation.start;
    let (end, at) = simulation.run(Duration::from_secs(60)).expect("it is noticed");
    (end, at - before)
}

#[test]
fn a_death_is_noticed_as_fast_as_the_link_allows_and_one_way_loss_where_nothing_arrives() {
    for silent in [&[0, 1][..], &[0], &[1]] {
        for traffic in [Traffic::Sparse, Traffic::OneWay] {
            let (end, after) = cut(CLEAN, traffic, silent);
            assert!(after <= 301 * MS, "{after:?} {silent:?} {traffic:?}");
            assert!(silent.contains(&(1 - end)), "{silent:?}");
            // What is on its way still arrives, and silence then has to be long for such a link.
            let (_, after) = cut(SATELLITE, traffic, silent);
            assert!(after <= 2_000 * MS, "{after:?} {silent:?} {traffic:?}");
            let (_, after) = cut(JITTERY, traffic, silent);
            assert!(after <= 3_500 * MS, "{after:?} {silent:?} {traffic:?}");
        }
        let (_, after) = cut(CLEAN, Traffic::None, silent);
        assert!(after <= 2_010 * MS, "{after:?} {silent:?}");
    }
}
