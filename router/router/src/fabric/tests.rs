use super::*;
use crate::{
    carrier::{Port, Remote, UdpPort},
    clock, net,
};
use skein_core::{Label, LocalRouter, Path, Route, RouterId, SiteId};
use skein_wire::frame::{self, Control, Key, Opener, Template};
use std::{collections::HashMap, time::Duration};
use tokio::{net::UdpSocket, time::timeout};

const PATIENCE: Duration = Duration::from_secs(5);
const HOME: SiteId = SiteId([1; 32]);
const ABROAD: SiteId = SiteId([2; 32]);
const US: RouterId = RouterId([0; 16]);

/// Our side: a fabric with one port.
struct Here {
    fabric: Arc<Fabric>,
    port: Arc<UdpPort>,
}

/// A neighbour, with what it needs to write to us.
struct Neighbour {
    socket: UdpSocket,
    link: Arc<FrameLink>,
    key: Key,
    counter: u64,
    opener: Opener,
}

fn any() -> UdpSocket {
    net::udp_bind("127.0.0.1:0".parse().unwrap()).unwrap()
}

impl Here {
    async fn new() -> Self {
        let (fabric, port) = (Fabric::new(Handle(1)), UdpPort::new(any()).unwrap());
        // The runtime has to hear of a socket before it lets us write without waiting.
        port.writable().await;
        Self { fabric, port }
    }

    fn neighbour(&self, n: u8) -> Neighbour {
        let socket = any();
        let addr = socket.local_addr().unwrap();
        let keys = LinkKeys { send: Key::new([n; 16]), receive: Key::new([!n; 16]), epoch: 0 };
        let remote = Remote { addr, local_ip: None };
        let carrier = Port::Udp(Arc::clone(&self.port)).carrier(remote, [n; 32]);
        let id = (LinkId(n.into()), Handle(1));
        let link = FrameLink::new(id, carrier, keys, (clock::now(), Duration::ZERO));
        link.carrier().attach(&link);
        self.fabric.add_link(Arc::clone(&link));
        let opener = Opener::new(Key::new([n; 16]));
        Neighbour { socket, link, key: Key::new([!n; 16]), counter: 0, opener }
    }

    /// A datagram arrives, seemingly from `addr`.
    fn receive(&self, datagram: &[u8], addr: SocketAddr) {
        let mut buffer = self.fabric.pool.take_one();
        buffer[..datagram.len()].copy_from_slice(datagram);
        let (len, stride) = (datagram.len(), datagram.len());
        let meta = RecvMeta { addr, len, stride, ..RecvMeta::default() };
        self.fabric.receive(&Port::Udp(Arc::clone(&self.port)), &mut buffer, &meta, clock::now());
    }

    fn who_is_at(&self, addr: SocketAddr) -> Option<LinkId> {
        self.port.link_from(&addr).map(|link| link.id())
    }

    fn unauthenticated(&self) -> u64 {
        self.fabric.counters().dropped_unauthenticated.total()
    }
}

impl Neighbour {
    fn addr(&self) -> SocketAddr {
        self.socket.local_addr().unwrap()
    }

    fn seal(&mut self, mut frame: Vec<u8>) -> Vec<u8> {
        frame::seal(&mut frame, &self.key, 0, self.counter);
        self.counter += 1;
        frame
    }

    fn control(&mut self, control: Control) -> Vec<u8> {
        let mut frame = Vec::new();
        control.encode(Handle(9), 0, &mut frame);
        self.seal(frame)
    }

    fn data(&mut self, labels: &[u16]) -> Vec<u8> {
        let labels: Vec<Label> = labels.iter().copied().map(Label).collect();
        let mut frame = Template::data(Handle(9), PathPin(0), &labels).unwrap().bytes().to_vec();
        frame.extend_from_slice(&[0; 64]);
        self.seal(frame)
    }

    /// The challenge that has come to `socket`.
    async fn challenge(&mut self, socket: &UdpSocket) -> [u8; frame::CONTROL_LEN] {
        let mut buffer = [0; 2_048];
        loop {
            let received = timeout(PATIENCE, socket.recv(&mut buffer)).await;
            let n = received.expect("no challenge came").unwrap();
            if self.opener.open(&buffer[..n]).is_ok()
                && let Some(Control::Challenge(nonce)) = Control::decode(&buffer[..n])
            {
                return nonce;
            }
        }
    }
}

#[tokio::test]
async fn who_forges_an_address_takes_nothing_from_who_is_there() {
    let here = Here::new().await;
    let (mut honest, mut forger) = (here.neighbour(1), here.neighbour(2));
    let forged = forger.control(Control::Probe { token: 0 });
    here.receive(&forged, honest.addr());
    assert_eq!(here.who_is_at(honest.addr()), Some(honest.link.id()));
    let probe = honest.control(Control::Probe { token: 0 });
    here.receive(&probe, honest.addr());
    assert_eq!(here.unauthenticated(), 0);
    assert!(honest.link.traffic().1 > 0);
    // And it is found elsewhere as well.
    let probe = honest.control(Control::Probe { token: 0 });
    here.receive(&probe, any().local_addr().unwrap());
    assert_eq!(here.unauthenticated(), 0);
    honest.link.detach();
    forger.link.detach();
    assert!(!here.port.has_links());
}

#[tokio::test]
async fn neighbours_whose_addresses_were_swapped_are_both_found_and_followed() {
    let here = Here::new().await;
    let (mut a, mut b) = (here.neighbour(1), here.neighbour(2));
    let (x, y) = (a.addr(), b.addr());
    std::mem::swap(&mut a.socket, &mut b.socket);
    for neighbour in [&mut a, &mut b] {
        let probe = neighbour.control(Control::Probe { token: 0 });
        here.receive(&probe, neighbour.addr());
    }
    assert_eq!(here.unauthenticated(), 0);
    for neighbour in [&mut a, &mut b] {
        let socket = std::mem::replace(&mut neighbour.socket, any());
        let nonce = neighbour.challenge(&socket).await;
        let echo = neighbour.control(Control::Echo(nonce));
        here.receive(&echo, socket.local_addr().unwrap());
        neighbour.socket = socket;
    }
    assert_eq!((a.link.carrier().remote(), b.link.carrier().remote()), (y, x));
    for neighbour in [&mut a, &mut b] {
        let probe = neighbour.control(Control::Probe { token: 0 });
        here.receive(&probe, neighbour.addr());
        assert_eq!(here.who_is_at(neighbour.addr()), Some(neighbour.link.id()));
    }
    assert_eq!(here.unauthenticated(), 0);
}

#[tokio::test]
async fn challenges_do_not_follow_from_each_other() {
    let here = Here::new().await;
    let mut neighbour = here.neighbour(1);
    let mut seen = Vec::new();
    for _ in 0..3 {
        let elsewhere = any();
        let probe = neighbour.control(Control::Probe { token: 0 });
        here.receive(&probe, elsewhere.local_addr().unwrap());
        seen.push(neighbour.challenge(&elsewhere).await);
    }
    for pair in seen.windows(2) {
        let differing = pair[0].iter().zip(&pair[1]).filter(|(a, b)| a != b).count();
        assert!(differing > 8, "{pair:?}");
    }
}

#[tokio::test]
async fn frames_before_any_link_are_not_taken_for_forgeries() {
    let here = Here::new().await;
    let mut neighbour = here.neighbour(1);
    neighbour.link.detach();
    let early = neighbour.control(Control::Probe { token: 0 });
    here.receive(&early, neighbour.addr());
    assert_eq!(here.unauthenticated(), 0);
    assert_eq!(here.fabric.counters().dropped_no_link.total(), 1);
}

fn router(n: u8) -> RouterId {
    RouterId([n; 16])
}

fn route(n: u8, site: SiteId) -> (RouterId, Arc<Route>) {
    let path = Path {
        first_link: LinkId(n.into()),
        labels: Vec::new(),
        hops: vec![router(n)],
        cost: 1,
        metric_us: 1,
        mtu: 1_200,
    };
    let (router, handle) = (router(n), Handle(n.into()));
    let paths = vec![path];
    (router, Arc::new(Route { router, site, site_name: "".into(), handle, boot_epoch: 1, paths }))
}

/// A guest 1, routers 2 and 3 of our own site, a router 4 of another; router n is behind everybody's label n.
fn with_guest() -> Fib {
    let ids = [0, 1, 2, 3, 4];
    let mut neighbors = HashMap::new();
    for from in ids {
        for to in ids.into_iter().filter(|to| *to != from) {
            neighbors.insert((router(from), Label(u16::from(to) + 10)), router(to));
        }
    }
    Fib {
        local: Some(LocalRouter { router: US, site: HOME, handle: Handle(1) }),
        labels: [1, 2, 3, 4].into_iter().map(|n| (Label(n + 10), LinkId(n.into()))).collect(),
        routes: [route(1, ABROAD), route(2, HOME), route(3, HOME), route(4, ABROAD)].into(),
        guests: [LinkId(1)].into(),
        neighbors: Arc::new(neighbors),
        ..Fib::default()
    }
}

#[tokio::test]
async fn a_guest_has_nobody_carry_its_frames_beyond_our_site() {
    let here = Here::new().await;
    let mut neighbours = [1, 2, 3, 4].map(|n| here.neighbour(n));
    here.fabric.publish(Arc::new(with_guest()));
    let mut passes = |from: usize, labels: &[u16]| {
        let counters = here.fabric.counters();
        let before = (counters.frames_forwarded.total(), counters.dropped_not_transit.total());
        let frame = neighbours[from - 1].data(labels);
        here.receive(&frame, neighbours[from - 1].addr());
        let after = (counters.frames_forwarded.total(), counters.dropped_not_transit.total());
        assert_eq!(after.0 + after.1, before.0 + before.1 + 1);
        after.0 > before.0
    };
    assert!(passes(1, &[12]) && passes(1, &[12, 13]), "to our own routers");
    assert!(!passes(1, &[14]), "through us to another site");
    assert!(!passes(1, &[12, 14]), "and through another router of ours");
    assert!(!passes(1, &[12, 13, 12, 13]), "round and round");
    assert!(!passes(1, &[12, 10]), "and back to us");
    assert!(!passes(1, &[12, 99]), "who knows where");
    assert!(passes(2, &[14]) && passes(2, &[11]), "members have us carry what they like");
    // Back where it came from goes nothing, whoever asks.
    assert!(!passes(1, &[11]) && !passes(2, &[12]) && !passes(4, &[14, 10, 14]));
}
