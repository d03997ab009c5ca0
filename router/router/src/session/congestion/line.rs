//! Connections that share a line in virtual time: what congestion control makes of it.

use super::Factory;
use bytes::BytesMut;
use quinn::congestion::{ControllerFactory, CubicConfig};
use quinn::{ClientConfig, EndpointConfig, ServerConfig, TransportConfig, VarInt};
use quinn_proto::{
    Connection, ConnectionHandle, DatagramEvent, Dir, Endpoint, Event, StreamId, Transmit,
};
use rand::{Rng as _, SeedableRng as _, rngs::StdRng};
use std::{
    collections::BTreeMap,
    net::SocketAddr,
    sync::Arc,
    time::{Duration, Instant},
};

const MS: Duration = Duration::from_millis(1);
const SECOND: Duration = Duration::from_secs(1);
/// Of a frame around a packet.
const OVERHEAD: usize = 70;

/// Way from the senders to the receivers; the way back takes the same time and nothing else.
#[derive(Clone, Copy)]
struct Line {
    delay: Duration,
    mbit_per_s: f64,
    queue_bytes: usize,
    loss: f64,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Control {
    Ours,
    /// As quinn has it.
    Cubic,
}

/// An endpoint with its only connection.
struct End {
    endpoint: Endpoint,
    connection: Option<(ConnectionHandle, Connection)>,
}

struct Sender {
    ends: [End; 2],
    stream: Option<StreamId>,
    received: u64,
}

/// Where a packet goes: which sender's, which end.
type To = (usize, usize);

struct Net {
    now: Instant,
    line: Line,
    /// When the bottleneck has sent what it has accepted.
    free: Instant,
    random: StdRng,
    packets: BTreeMap<(Instant, u64), (To, BytesMut)>,
    number: u64,
    senders: Vec<Sender>,
    sent: u64,
    lost: u64,
    overflowed: u64,
    wait_max: Duration,
}

/// What came of a time.
#[derive(Debug)]
struct Outcome {
    mbit_per_s: Vec<f64>,
    overflowed: f64,
    wait_max: Duration,
}

impl Outcome {
    fn sum(&self) -> f64 {
        self.mbit_per_s.iter().sum()
    }
}

fn address(to: To) -> SocketAddr {
    let port = u16::try_from(to.0 * 2 + to.1 + 1).unwrap();
    SocketAddr::from(([127, 0, 0, 1], port))
}

fn transport(control: Control) -> Arc<TransportConfig> {
    let mut cubic = CubicConfig::default();
    cubic.initial_window(1 << 20);
    let cubic = Arc::new(cubic);
    let factory: Arc<dyn ControllerFactory + Send + Sync> = match control {
        Control::Ours => Arc::new(Factory(cubic)),
        Control::Cubic => cubic,
    };
    let mut transport = TransportConfig::default();
    transport
        .mtu_discovery_config(None)
        .initial_mtu(1_440)
        .receive_window(VarInt::from_u32(64 << 20))
        .stream_receive_window(VarInt::from_u32(64 << 20))
        .send_window(16 << 20)
        .congestion_controller_factory(factory);
    Arc::new(transport)
}

impl Net {
    fn new(line: Line, controls: &[Control]) -> Self {
        let now = crate::clock::now();
        let mut net = Self {
            now,
            line,
            free: now,
            random: StdRng::seed_from_u64(1),
            packets: BTreeMap::new(),
            number: 0,
            senders: Vec::new(),
            sent: 0,
            lost: 0,
            overflowed: 0,
            wait_max: Duration::ZERO,
        };
        let key = rcgen::generate_simple_self_signed(["line".to_owned()]).unwrap();
        let certificate = key.cert.der().clone();
        for (i, control) in controls.iter().enumerate() {
            let private =
                rustls_pki_types::PrivatePkcs8KeyDer::from(key.signing_key.serialize_der());
            let mut server =
                ServerConfig::with_single_cert(vec![certificate.clone()], private.into()).unwrap();
            server.transport = transport(*control);
            let mut roots = rustls::RootCertStore::empty();
            roots.add(certificate.clone()).unwrap();
            let mut client = ClientConfig::with_root_certificates(Arc::new(roots)).unwrap();
            client.transport_config(transport(*control));
            let config = Arc::new(EndpointConfig::default());
            let mut sender = Endpoint::new(Arc::clone(&config), None, true, Some([1; 32]));
            let receiver = Endpoint::new(config, Some(Arc::new(server)), true, Some([2; 32]));
            let connection = sender.connect(now, client, address((i, 1)), "line").unwrap();
            net.senders.push(Sender {
                ends: [
                    End { endpoint: sender, connection: Some(connection) },
                    End { endpoint: receiver, connection: None },
                ],
                stream: None,
                received: 0,
            });
            net.drive((i, 0));
            // Each begins with a megabyte: many at once are another matter.
            if controls.len() > 3 {
                net.run(SECOND);
            }
        }
        net
    }

    /// Runs for a time.
    fn run(&mut self, time: Duration) -> Outcome {
        let end = self.now + time;
        let before: Vec<_> = self.senders.iter().map(|sender| sender.received).collect();
        (self.sent, self.lost, self.overflowed, self.wait_max) = (0, 0, 0, Duration::ZERO);
        while let Some((next, to)) = self.next().filter(|(next, _)| *next <= end) {
            self.now = next.max(self.now);
            self.step(to);
        }
        self.now = end;
        let rate = |(sender, before): (&Sender, u64)| {
            (sender.received - before) as f64 * 8e-6 / time.as_secs_f64()
        };
        Outcome {
            mbit_per_s: self.senders.iter().zip(before).map(rate).collect(),
            overflowed: self.overflowed as f64 / self.sent.max(1) as f64,
            wait_max: self.wait_max,
        }
    }

    /// What happens next, and where.
    fn next(&mut self) -> Option<(Instant, To)> {
        let packet = self.packets.first_key_value().map(|((due, _), (to, _))| (*due, *to));
        let mut next = packet;
        for (i, sender) in self.senders.iter_mut().enumerate() {
            for (side, end) in sender.ends.iter_mut().enumerate() {
                let due = end.connection.as_mut().and_then(|(_, c)| c.poll_timeout());
                if let Some(due) = due.filter(|due| next.is_none_or(|(next, _)| *due < next)) {
                    next = Some((due, (i, side)));
                }
            }
        }
        next
    }

    fn step(&mut self, to: To) {
        let is_due = |net: &Self| {
            net.packets
                .first_key_value()
                .is_some_and(|((due, _), (at, _))| *due <= net.now && *at == to)
        };
        while is_due(self) {
            let (_, (_, packet)) = self.packets.pop_first().unwrap();
            self.receive(to, packet);
        }
        let end = &mut self.senders[to.0].ends[to.1];
        if let Some((_, connection)) = &mut end.connection
            && connection.poll_timeout().is_some_and(|due| due <= self.now)
        {
            connection.handle_timeout(self.now);
        }
        self.drive(to);
    }

    fn receive(&mut self, to: To, packet: BytesMut) {
        let end = &mut self.senders[to.0].ends[to.1];
        let (from, mut buffer) = (address((to.0, 1 - to.1)), Vec::new());
        let event = end.endpoint.handle(self.now, from, None, None, packet, &mut buffer);
        match event {
            Some(DatagramEvent::ConnectionEvent(_, event)) => {
                if let Some((_, connection)) = &mut end.connection {
                    connection.handle_event(event);
                }
            }
            Some(DatagramEvent::NewConnection(incoming)) => {
                end.connection = end.endpoint.accept(incoming, self.now, &mut buffer, None).ok();
            }
            Some(DatagramEvent::Response(_)) | None => {}
        }
    }

    /// Lets a connection do whatever it can.
    fn drive(&mut self, at: To) {
        let sender = &mut self.senders[at.0];
        let End { endpoint, connection } = &mut sender.ends[at.1];
        let Some((handle, connection)) = connection else { return };
        while let Some(event) = connection.poll_endpoint_events() {
            if let Some(event) = endpoint.handle_event(*handle, event) {
                connection.handle_event(event);
            }
        }
        while let Some(event) = connection.poll() {
            assert!(!matches!(event, Event::ConnectionLost { .. }), "{event:?}");
        }
        if at.1 == 0 {
            // Once the handshake is over.
            sender.stream = sender.stream.or_else(|| connection.streams().open(Dir::Uni));
            // Until the send window is full.
            let mut is_room = |stream| connection.send_stream(stream).write(&[7; 16 << 10]).is_ok();
            while sender.stream.is_some_and(&mut is_room) {}
        } else if let Some(stream) = sender.stream {
            sender.received += read(connection, stream);
        }
        let mut buffer = Vec::new();
        while let Some(transmit) = self.senders[at.0].ends[at.1].transmit(self.now, &mut buffer) {
            let size = transmit.segment_size.unwrap_or(transmit.size);
            for packet in buffer[..transmit.size].chunks(size) {
                self.send((at.0, 1 - at.1), BytesMut::from(packet));
            }
            buffer.clear();
        }
    }

    fn send(&mut self, to: To, packet: BytesMut) {
        let mut due = self.now + self.line.delay;
        if to.1 == 1 {
            self.sent += 1;
            if self.random.random_bool(self.line.loss) {
                self.lost += 1;
                return;
            }
            let time =
                |bytes: usize| Duration::from_secs_f64(bytes as f64 * 8e-6 / self.line.mbit_per_s);
            let wait = self.free.saturating_duration_since(self.now);
            if wait > time(self.line.queue_bytes) {
                self.overflowed += 1;
                return;
            }
            self.wait_max = self.wait_max.max(wait);
            self.free = self.now + wait + time(packet.len() + OVERHEAD);
            due = self.free + self.line.delay;
        }
        self.number += 1;
        self.packets.insert((due, self.number), (to, packet));
    }
}

/// Takes what has arrived.
fn read(connection: &mut Connection, stream: StreamId) -> u64 {
    // At first there is none, later there are no others.
    let _ = connection.streams().accept(Dir::Uni);
    let mut receive = connection.recv_stream(stream);
    let Ok(mut chunks) = receive.read(true) else { return 0 };
    let mut bytes = 0;
    while let Ok(Some(chunk)) = chunks.next(usize::MAX) {
        bytes += chunk.bytes.len() as u64;
    }
    // Whatever there is to send is sent anyway.
    let _ = chunks.finalize();
    bytes
}

impl End {
    fn transmit(&mut self, now: Instant, buffer: &mut Vec<u8>) -> Option<Transmit> {
        self.connection.as_mut()?.1.poll_transmit(now, 10, buffer)
    }
}

fn line(rtt_ms: u32, mbit_per_s: f64, queue_bytes: usize, loss: f64) -> Line {
    Line { delay: MS * rtt_ms / 2, mbit_per_s, queue_bytes, loss }
}

/// In steady state: after some seconds.
fn settled(line: Line, controls: &[Control], seconds: u32) -> Outcome {
    let mut net = Net::new(line, controls);
    net.run(SECOND * 5);
    net.run(SECOND * seconds)
}

const OURS: &[Control] = &[Control::Ours];
const CUBIC: &[Control] = &[Control::Cubic];

#[test]
fn random_loss_does_not_slow_a_flow_down() {
    for (rtt_ms, loss, mbit) in [(50, 0.01, 20.0), (600, 0.03, 10.0)] {
        let line = line(rtt_ms, mbit, 500_000, loss);
        let (ours, cubic) = (settled(line, OURS, 10).sum(), settled(line, CUBIC, 10).sum());
        assert!(ours > 0.25 * mbit, "{rtt_ms} ms, {loss}: {ours} Mbit/s, CUBIC {cubic}");
        assert!(ours > 2.0 * cubic, "{rtt_ms} ms, {loss}: {ours}, {cubic}");
    }
}

#[test]
fn a_queue_that_overflows_is_congestion() {
    for queue_bytes in [30_000, 250_000] {
        let line = line(40, 20.0, queue_bytes, 0.0);
        let (ours, cubic) = (settled(line, OURS, 10), settled(line, CUBIC, 10));
        assert!(ours.sum() > 0.95 * cubic.sum(), "{ours:?} {cubic:?}");
        assert!(ours.wait_max <= cubic.wait_max + MS, "{ours:?} {cubic:?}");
        assert!(ours.overflowed <= 1.5 * cubic.overflowed + 0.001, "{ours:?} {cubic:?}");
    }
}

#[test]
fn a_queue_too_short_to_be_seen_loses_little() {
    // Less than two milliseconds: not much more than what leaves at once.
    let line = line(40, 60.0, 12_000, 0.0);
    let ours = settled(line, OURS, 5);
    assert!(ours.overflowed < 0.03, "{ours:?}");
    let ours = settled(line, &[Control::Ours; 3], 5);
    assert!(ours.overflowed < 0.05, "{ours:?}");
}

/// What a queue of less than two milliseconds drops, and what those get of the line who take every loss for congestion.
#[test]
fn many_on_a_short_queue_lose_little_more_than_without_a_judge() {
    let line = line(40, 60.0, 12_000, 0.0);
    for sessions in [8, 24] {
        let half = [Control::Cubic, Control::Ours].repeat(sessions / 2);
        let [cubic, ours, mixed] =
            [&vec![Control::Cubic; sessions], &vec![Control::Ours; sessions], &half]
                .map(|controls| settled(line, controls, 5));
        for judged in [&ours, &mixed] {
            assert!(judged.overflowed < cubic.overflowed + 0.025, "{judged:?} {cubic:?}");
            assert!(judged.sum() > 0.95 * cubic.sum(), "{judged:?} {cubic:?}");
        }
        let theirs: f64 = mixed.mbit_per_s.iter().step_by(2).sum();
        assert!(theirs > 0.1 * mixed.sum(), "{mixed:?}");
    }
}

#[test]
fn flows_share_a_line() {
    let share = |outcome: Outcome| outcome.mbit_per_s[0] / outcome.sum();
    let lossy = share(settled(line(40, 20.0, 100_000, 0.01), &[Control::Ours; 2], 20));
    assert!((0.3..0.7).contains(&lossy), "{lossy}");
    // CUBIC takes its time to share; beside it we are as it is.
    let clean = line(40, 20.0, 100_000, 0.0);
    let [ours, cubic] = [Control::Ours, Control::Cubic]
        .map(|first| share(settled(clean, &[first, Control::Cubic], 20)));
    assert!((ours - cubic).abs() < 0.1, "{ours} {cubic}");
}

#[test]
fn a_line_that_becomes_slow_is_not_flooded_for_long() {
    let mut net = Net::new(line(40, 20.0, 100_000, 0.0), OURS);
    net.run(SECOND * 5);
    net.line.mbit_per_s = 2.0;
    net.run(SECOND * 5);
    let slow = net.run(SECOND * 10);
    assert!(slow.sum() > 1.6 && slow.overflowed < 0.05, "{slow:?}");
    net.line.mbit_per_s = 20.0;
    net.run(SECOND * 10);
    let fast = net.run(SECOND * 10);
    assert!(fast.sum() > 16.0, "{fast:?}");
}
