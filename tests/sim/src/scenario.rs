//! What happens in a run, as data: made from a seed, saved, shrunk and replayed.

use rand::{Rng as _, SeedableRng as _, rngs::StdRng, seq::IndexedRandom as _};
use serde::{Deserialize, Serialize};
use skein_api::Protocol;
use skein_netsim::Path;

/// Faults begin after the network has come up, and end so long before flows have to be done.
const FAULTS_FROM_MS: u64 = 4_000;
const FAULTS_UNTIL_MS: u64 = 22_000;
/// So long lasts what is not mended within the run.
const FOR_GOOD_MS: u64 = 10_000_000;
/// So long after what goes wrong for good everybody has noticed.
const NOTICED_MS: u64 = 10_000;
/// A router reports what has changed within this.
const STATUS_MS: u64 = 3_000;
/// How long a client has datagrams to send at most.
const ASSOCIATION_MS_MAX: u64 = 20_000;
/// Sites of most runs, of some, and of a few.
const SITES_USUAL: std::ops::RangeInclusive<usize> = 3..=8;
const SITES_MANY: std::ops::RangeInclusive<usize> = 9..=20;
const SITES_MOST: std::ops::RangeInclusive<usize> = 30..=100;

/// A run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Scenario {
    /// All chances of the run follow from it.
    pub seed: u64,
    /// The sites; the first began the network.
    pub sites: Vec<SitePlan>,
    /// Who dials whom.
    pub links: Vec<LinkPlan>,
    /// What is served.
    pub services: Vec<ServicePlan>,
    /// What is said.
    pub flows: Vec<FlowPlan>,
    /// What is said by datagrams, over the UDP services beside those.
    #[serde(default)]
    pub associations: Vec<AssociationPlan>,
    /// What goes wrong.
    pub faults: Vec<Fault>,
}

/// A site.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SitePlan {
    /// It listens and carries transit.
    pub is_interior: bool,
    /// Its address is translated, and forgotten when silent for so long.
    pub nat_expiry_ms: Option<u64>,
    /// Its clock is so far ahead.
    pub clock_ahead_ms: i64,
    /// Its router is of a later minor version.
    #[serde(default)]
    pub is_later: bool,
}

/// A link and what its path is like, both ways.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LinkPlan {
    /// Who dials.
    pub from: usize,
    /// Who listens.
    pub to: usize,
    /// Its path.
    pub path: Path,
}

/// An address with one provider.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ServicePlan {
    /// Which address.
    pub address: usize,
    /// Who serves it.
    pub site: usize,
}

/// A flow.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FlowPlan {
    /// Where it enters.
    pub site: usize,
    /// What it is for.
    pub address: usize,
    /// When it begins.
    pub at_ms: u64,
    /// What the client does.
    pub client: Script,
    /// What the server does.
    pub server: Script,
}

/// A client of a UDP service, whose target answers every datagram. It goes on until it is answered after all faults.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AssociationPlan {
    /// Where it enters.
    pub site: usize,
    /// What it is for.
    pub address: usize,
    /// When it begins.
    pub at_ms: u64,
    /// Datagrams at least.
    pub count: u32,
    /// Between two of them.
    pub every_ms: u64,
    /// Instead of that after each sixteenth, if not 0.
    pub pause_ms: u64,
    /// Longest datagram.
    pub len_max: usize,
}

/// What one end of a flow does. It reads all the while, and verifies.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Script {
    /// Waits, and bytes that are written after them.
    pub writes: Vec<(u64, usize)>,
    /// It resets the flow after its last write instead of finishing it.
    pub resets: bool,
    /// Bytes it reads in a second; 0 is as they come.
    pub reads_per_s: usize,
}

impl Script {
    /// Bytes in all.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.writes.iter().map(|(_, bytes)| *bytes as u64).sum()
    }

    /// How long writing takes at least.
    #[must_use]
    pub fn waits_ms(&self) -> u64 {
        self.writes.iter().map(|(wait_ms, _)| wait_ms).sum()
    }
}

/// Something that goes wrong, and is mended later.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fault {
    /// When.
    pub at_ms: u64,
    /// For how long.
    pub for_ms: u64,
    /// What.
    pub what: What,
}

impl Fault {
    /// Whether it is never mended.
    #[must_use]
    pub fn is_for_good(&self) -> bool {
        self.for_ms >= FOR_GOOD_MS
    }
}

/// Kinds of faults. Sites and links are numbers in the scenario.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum What {
    /// The router is killed, and started again at the end, without its disk if so said.
    Kill {
        /// Whose.
        site: usize,
        /// Its state is lost.
        loses_disk: bool,
    },
    /// The router is killed; when it is back, the site serves nothing any more.
    Withdraw {
        /// Which.
        site: usize,
    },
    /// The host loses power.
    PowerLoss {
        /// Which.
        site: usize,
    },
    /// The router stands still.
    Freeze {
        /// Whose.
        site: usize,
    },
    /// The controller is away.
    ControllerAway {
        /// Whose.
        site: usize,
    },
    /// The router's state directory takes no files.
    DiskFull {
        /// Whose.
        site: usize,
    },
    /// Nothing passes between the ends of a link.
    Cut {
        /// Which.
        link: usize,
    },
    /// Nothing passes one way.
    OneWay {
        /// Which.
        link: usize,
        /// Towards who dialled.
        backwards: bool,
    },
    /// UDP does not pass.
    UdpBlocked {
        /// Which.
        link: usize,
    },
    /// A path is bad in these ways.
    Degraded {
        /// Which.
        link: usize,
        /// Single losses, in thousandths.
        loss_permille: u16,
        /// Begins of bursts of losses, in thousandths.
        burst_permille: u16,
        /// Overtaken packets, in thousandths.
        reorder_permille: u16,
        /// Packets that arrive twice, in thousandths.
        duplicate_permille: u16,
        /// Jitter.
        jitter_us: u64,
    },
    /// A path takes smaller packets only.
    Mtu {
        /// Which.
        link: usize,
        /// Largest packet, IP header included.
        mtu: u16,
    },
    /// Some sites reach no others.
    Partition {
        /// Those below this number against the rest.
        below: usize,
    },
    /// A NAT forgets everything.
    Rebind {
        /// Whose.
        site: usize,
    },
    /// A NAT forgets sooner than it did.
    NatExpiry {
        /// Whose.
        site: usize,
        /// Whom the host has not sent to for so long.
        expiry_ms: u64,
    },
    /// A clock is set.
    Clock {
        /// Whose.
        site: usize,
        /// So far ahead of the truth.
        ahead_ms: i64,
    },
    /// The site leaves for good.
    Leave {
        /// Which.
        site: usize,
    },
}

impl Scenario {
    /// The scenario of a seed.
    #[must_use]
    pub fn generate(seed: u64) -> Self {
        let mut rng = StdRng::seed_from_u64(seed ^ 0x5ce0_a210);
        let sites = match rng.random_range(0..100) {
            0..92 => rng.random_range(SITES_USUAL),
            92..99 => rng.random_range(SITES_MANY),
            _ => rng.random_range(SITES_MOST),
        };
        let plans = site_plans(sites, &mut rng);
        let links = links(&plans, &mut rng);
        let services = services(&plans, &mut rng);
        let flows = (0..rng.random_range(3..=14))
            .filter_map(|_| flow(&plans, &services, &mut rng))
            .collect();
        let associations = associations(&plans, &services, &mut rng);
        let faults = Vec::new();
        let mut scenario =
            Self { seed, sites: plans, links, services, flows, associations, faults };
        let faults = match rng.random_range(0..10) {
            0 => 0,
            1..8 => rng.random_range(1..=4),
            _ => rng.random_range(5..=10),
        };
        for _ in 0..faults {
            if let Some(fault) = scenario.fault(&mut rng) {
                scenario.faults.push(fault);
            }
        }
        scenario.faults.sort_by_key(|fault| fault.at_ms);
        scenario.meet(&mut rng);
        scenario
    }

    /// Lets some flows begin just before faults do: what is half done is where bugs are.
    fn meet(&mut self, rng: &mut StdRng) {
        for flow in &mut self.flows {
            let Some(fault) = self.faults.choose(rng).filter(|_| rng.random_bool(0.4)) else {
                continue;
            };
            flow.at_ms = fault.at_ms.saturating_sub(rng.random_range(0..150));
        }
        for association in &mut self.associations {
            if let Some(fault) = self.faults.choose(rng).filter(|_| rng.random_bool(0.3)) {
                association.at_ms = fault.at_ms.saturating_sub(rng.random_range(0..150));
            }
        }
    }

    /// When the last fault is over.
    #[must_use]
    pub fn healed_ms(&self) -> u64 {
        let ends = self.faults.iter().map(|fault| match fault.is_for_good() {
            true => fault.at_ms,
            false => fault.at_ms + fault.for_ms,
        });
        ends.max().unwrap_or(FAULTS_FROM_MS)
    }

    /// When the network may be judged: what goes wrong for good has been noticed, and routers have said so.
    #[must_use]
    pub fn judged_from_ms(&self) -> u64 {
        let judged = self.faults.iter().map(|fault| match fault.is_for_good() {
            true => fault.at_ms + NOTICED_MS,
            false => fault.at_ms + fault.for_ms + STATUS_MS,
        });
        judged.max().unwrap_or(FAULTS_FROM_MS)
    }

    /// Latency of the fastest path.
    pub(crate) fn fastest_us(&self) -> u64 {
        self.links.iter().map(|link| link.path.latency_us).min().unwrap_or_default()
    }

    /// Addresses of every kind of service.
    #[must_use]
    pub fn addresses(&self) -> usize {
        self.services.iter().map(|service| service.address + 1).max().unwrap_or(0)
    }

    /// The kinds of services that every address has: byte streams, and datagrams where anybody sends some.
    pub(crate) fn kinds_of_services(&self) -> impl Iterator<Item = (&'static str, Protocol)> {
        let kinds = [("svc", Protocol::Tcp), ("dgram", Protocol::Udp)];
        kinds.into_iter().take(1 + usize::from(!self.associations.is_empty()))
    }

    /// Whether a site leaves for good.
    #[must_use]
    pub fn leaves(&self, site: usize) -> bool {
        self.faults.iter().any(|fault| fault.what == What::Leave { site })
    }

    fn fault(&self, rng: &mut StdRng) -> Option<Fault> {
        let at_ms = rng.random_range(FAULTS_FROM_MS..FAULTS_UNTIL_MS);
        let for_ms = match rng.random_range(0..10) {
            0..3 => rng.random_range(20..400),
            3..9 => rng.random_range(400..8_000),
            // Long enough for what waits longer each time.
            _ if rng.random_bool(0.2) => rng.random_range(60_000..120_000),
            _ => rng.random_range(8_000..20_000),
        };
        let site = rng.random_range(0..self.sites.len());
        let link = rng.random_range(0..self.links.len());
        let what = match rng.random_range(0..23) {
            0 | 1 => What::Kill { site, loses_disk: rng.random_bool(0.3) },
            2 => What::PowerLoss { site },
            3 | 4 => What::Freeze { site },
            5 => What::ControllerAway { site },
            6 => What::DiskFull { site },
            7..10 => What::Cut { link },
            10 | 11 => What::OneWay { link, backwards: rng.random() },
            12 | 13 => What::UdpBlocked { link },
            14 | 15 => What::Degraded {
                link,
                loss_permille: *[0, 5, 20, 70, 300].choose(rng)?,
                burst_permille: *[0, 0, 5].choose(rng)?,
                reorder_permille: *[0, 20, 200].choose(rng)?,
                duplicate_permille: *[0, 20, 200].choose(rng)?,
                jitter_us: *[0, 5_000, 60_000].choose(rng)?,
            },
            16 | 17 => What::Mtu { link, mtu: *[1_280, 1_400, 9_000].choose(rng)? },
            18 => What::Partition { below: rng.random_range(1..self.sites.len()) },
            19 => {
                let behind: Vec<_> = (0..self.sites.len())
                    .filter(|site| self.sites[*site].nat_expiry_ms.is_some())
                    .collect();
                let site = *behind.choose(rng)?;
                if rng.random() {
                    What::Rebind { site }
                } else {
                    What::NatExpiry { site, expiry_ms: rng.random_range(2_000..15_000) }
                }
            }
            20 => What::Clock { site, ahead_ms: rng.random_range(-200_000..200_000) },
            21 => What::Withdraw { site: self.services.choose(rng)?.site },
            _ if site > 0 && !self.leaves(site) && !self.sites[site].is_interior => {
                What::Leave { site }
            }
            _ => return None,
        };
        // Everything works without UDP as well, and with small packets.
        let is_bearable = matches!(what, What::UdpBlocked { .. } | What::Mtu { .. });
        let for_good = is_bearable && rng.random_bool(0.4);
        Some(Fault { at_ms, for_ms: if for_good { FOR_GOOD_MS } else { for_ms }, what })
    }
}

fn site_plans(sites: usize, rng: &mut StdRng) -> Vec<SitePlan> {
    let interior = 1 + rng.random_range(0..=(sites / 2).min(8));
    let are_mixed = rng.random_bool(0.3);
    let plan = |site: usize| SitePlan {
        is_interior: site < interior,
        nat_expiry_ms: (site >= interior && rng.random_bool(0.4))
            .then(|| rng.random_range(20_000..120_000)),
        clock_ahead_ms: if rng.random_bool(0.2) { rng.random_range(-60_000..60_000) } else { 0 },
        is_later: are_mixed && rng.random(),
    };
    (0..sites).map(plan).collect()
}

/// A tree of interior sites with some more links among them; every edge has one or two of them.
fn links(sites: &[SitePlan], rng: &mut StdRng) -> Vec<LinkPlan> {
    let interior = sites.iter().filter(|site| site.is_interior).count();
    let mut pairs = Vec::new();
    for from in 1..sites.len() {
        let reachable = from.min(interior);
        pairs.push((from, rng.random_range(0..reachable)));
        if rng.random_bool(0.6) {
            pairs.push((from, rng.random_range(0..reachable)));
        }
    }
    pairs.dedup();
    // Where all are slow, time passes in larger steps.
    let fastest_us = if rng.random_bool(0.3) { 2_000 } else { 5_000 };
    let link = |(from, to)| LinkPlan { from, to, path: path(fastest_us, rng) };
    pairs.into_iter().map(link).collect()
}

fn path(fastest_us: u64, rng: &mut StdRng) -> Path {
    let latency_us = match rng.random_range(0..10) {
        0..4 => rng.random_range(fastest_us..8_000),
        4..9 => rng.random_range(8_000..60_000),
        _ => rng.random_range(60_000..300_000),
    };
    Path {
        latency_us,
        jitter_us: if rng.random_bool(0.2) { latency_us / 10 } else { 0 },
        rate_bytes_per_s: if rng.random_bool(0.3) {
            rng.random_range(250_000..5_000_000)
        } else {
            0
        },
        queue_us: rng.random_range(20_000..200_000),
        mtu: if rng.random_bool(0.1) { 1_400 } else { 1_500 },
        loss_permille: if rng.random_bool(0.15) { rng.random_range(1..=10) } else { 0 },
        ..Path::default()
    }
}

fn services(sites: &[SitePlan], rng: &mut StdRng) -> Vec<ServicePlan> {
    let addresses = rng.random_range(1..=3);
    let mut services = Vec::new();
    for address in 0..addresses {
        for _ in 0..rng.random_range(1..=2) {
            let service = ServicePlan { address, site: rng.random_range(0..sites.len()) };
            if !services.contains(&service) {
                services.push(service);
            }
        }
    }
    services
}

fn flow(sites: &[SitePlan], services: &[ServicePlan], rng: &mut StdRng) -> Option<FlowPlan> {
    let address = services.choose(rng)?.address;
    let (mut client, mut server) = (Script::default(), Script::default());
    let (few, many) = (rng.random_range(1..2_000), rng.random_range(20_000..400_000));
    match rng.random_range(0..8) {
        0 | 1 => {
            client.writes = vec![(0, few)];
            server.writes = vec![(5, many)];
        }
        2 => client.writes = vec![(0, many)],
        3 | 4 => {
            let rounds = rng.random_range(5..60);
            let wait_ms = rng.random_range(20..600);
            client.writes = vec![(wait_ms, few); rounds];
            server.writes = vec![(wait_ms, few); rounds];
        }
        5 => {
            let wait_ms = rng.random_range(5_000..18_000);
            client.writes = vec![(0, few), (wait_ms, few)];
            server.writes = vec![(0, few), (wait_ms, few)];
        }
        6 => {
            client.writes = vec![(0, many), (100, many)];
            server.reads_per_s = rng.random_range(60_000..200_000);
        }
        _ => {
            client.writes = vec![(0, many), (50, few)];
            server.writes = vec![(0, many), (50, few)];
            if rng.random() {
                client.resets = true;
            } else {
                server.resets = true;
            }
        }
    }
    // The first byte of the server says that the flow is open.
    server.writes.insert(0, (0, 1));
    let at_ms = rng.random_range(1_000..20_000);
    Some(FlowPlan { site: rng.random_range(0..sites.len()), address, at_ms, client, server })
}

/// Two of three networks have UDP services as well.
fn associations(
    sites: &[SitePlan],
    services: &[ServicePlan],
    rng: &mut StdRng,
) -> Vec<AssociationPlan> {
    let count = if rng.random_bool(0.66) { rng.random_range(1..=4) } else { 0 };
    let association = |_| {
        let len_max = *[40, 400, 1_100, 1_450, 2_300, 9_000, 60_000].choose(rng)?;
        let every_ms = (*[10, 20, 50, 100, 300].choose(rng)?).max(len_max as u64 / 50);
        let pause_ms = if rng.random_bool(0.2) { rng.random_range(4_000..9_000) } else { 0 };
        let count_max = (ASSOCIATION_MS_MAX / (every_ms + pause_ms / 16)) as u32;
        Some(AssociationPlan {
            site: rng.random_range(0..sites.len()),
            address: services.choose(rng)?.address,
            at_ms: rng.random_range(1_000..20_000),
            count: rng.random_range(1..count_max.min(200)),
            every_ms,
            pause_ms,
            len_max,
        })
    };
    (0..count).filter_map(association).collect()
}
