//! Random networks and histories: whatever happened, connected routers come to know the same and route the same.

mod common;

use common::{Network, entry, router_id, twin};
use proptest::{prelude::*, test_runner::FileFailurePersistence};
use skein_core::{Input, LinkId, RecordHeader, Role, Settings};
use std::{collections::BTreeSet, time::Duration};

#[derive(Clone, Debug)]
enum Event {
    LinkUp(usize, usize, u16),
    LinkDown(usize),
    /// Only one end learns of it for now.
    HalfUp(usize, usize, u16, bool),
    /// Only one end learns of it for now.
    HalfDown(usize, bool),
    /// All links of which only one end knows come up or go down.
    FinishLinks,
    Restart(usize),
    /// Neighbours do not learn of it for now.
    Crash(usize),
    /// The controller counts from here again.
    LoseCount(usize, u64),
    Renew(usize),
    Leave(usize),
    Role(usize, bool),
    Addresses(usize, BTreeSet<u8>),
    /// Somebody made a second edition of a record that one router knows, with the same sequence, and tells another one.
    Twin {
        known_to: usize,
        nth: usize,
        told: usize,
        n: u8,
        other_key: bool,
    },
    Deliver(usize),
    Wait(u64),
    /// Long enough for records to age.
    Age(u64),
}

fn event(routers: usize) -> impl Strategy<Value = Event> {
    let router = 0..routers;
    let addresses = prop::collection::btree_set(0..12_u8, 0..6);
    prop_oneof![
        8 => (router.clone(), router.clone(), 1..5_u16).prop_map(|(a, b, c)| Event::LinkUp(a, b, c)),
        3 => (0..20_usize).prop_map(Event::LinkDown),
        3 => (router.clone(), router.clone(), 1..5_u16, any::<bool>())
            .prop_map(|(a, b, c, first)| Event::HalfUp(a, b, c, first)),
        2 => (0..20_usize, any::<bool>()).prop_map(|(nth, first)| Event::HalfDown(nth, first)),
        2 => Just(Event::FinishLinks),
        1 => router.clone().prop_map(Event::Restart),
        1 => router.clone().prop_map(Event::Crash),
        1 => (router.clone(), 0..3_u64).prop_map(|(n, boot)| Event::LoseCount(n, boot)),
        1 => router.clone().prop_map(Event::Renew),
        1 => router.clone().prop_map(Event::Leave),
        1 => (router.clone(), any::<bool>()).prop_map(|(n, edge)| Event::Role(n, edge)),
        4 => (router, addresses).prop_map(|(n, a)| Event::Addresses(n, a)),
        2 => (0..routers, 0..100_usize, 0..routers, any::<u8>(), any::<bool>()).prop_map(
            |(known_to, nth, told, n, other_key)| Event::Twin { known_to, nth, told, n, other_key }
        ),
        6 => (0..30_usize).prop_map(Event::Deliver),
        3 => (0..300_u64).prop_map(Event::Wait),
        1 => prop_oneof![1..30_u64, 1_190..1_210_u64, 3_580..3_620_u64].prop_map(Event::Age),
    ]
}

fn apply(network: &mut Network, event: &Event) {
    match event {
        Event::LinkUp(a, b, cost) => {
            if a != b {
                network.endorse(*a, *b);
                network.connect(*a, *b, *cost);
            }
        }
        Event::LinkDown(nth) => {
            if let Some(link) = nth_link(network, *nth) {
                network.disconnect(link);
            }
        }
        Event::HalfUp(a, b, cost, first) => {
            if a != b {
                network.endorse(*a, *b);
                let link = network.begin(*a, *b, *cost);
                network.tell_up(link, usize::from(*first));
            }
        }
        Event::HalfDown(nth, first) => {
            if let Some(link) = nth_link(network, *nth) {
                network.tell_down(link, usize::from(*first));
            }
        }
        Event::FinishLinks => network.finish_links(),
        Event::Restart(n) => network.restart(*n),
        Event::Crash(n) => network.crash(*n),
        Event::LoseCount(n, boot_epoch) => {
            // Records are not issued faster than one a second in the long run.
            age(network, Duration::from_secs(1_000));
            network.routers[*n].boot_epoch = *boot_epoch;
            network.restart(*n);
        }
        Event::Renew(n) => network.renew(*n),
        Event::Leave(n) => {
            network.routers[*n].left = true;
            network.input(*n, Input::Leave);
        }
        Event::Role(n, edge) => {
            let role = if *edge { Role::Edge } else { Role::Interior };
            network.routers[*n].role = role;
            let settings = Settings { role, site_name: "site".into(), ..Settings::default() };
            network.input(*n, Input::Settings(settings));
        }
        Event::Addresses(n, numbers) => {
            let entries = numbers.iter().map(|i| entry(&format!("svc-{i}"))).collect();
            network.set_addresses(*n, entries);
        }
        Event::Twin { known_to, nth, told, n, other_key } => {
            let lsdb = network.routers[*known_to].engine.lsdb();
            let headers: Vec<_> = lsdb.headers().collect();
            let header = headers.get(nth % headers.len().max(1));
            let entry = header.and_then(|header| lsdb.get(&header.key));
            if let Some(entry) = entry.filter(|_| known_to != told) {
                let twin = twin(&entry.record, *n, *other_key);
                network.endorse(*told, *known_to);
                network.whisper(*known_to, *told, twin);
            }
        }
        Event::Deliver(count) => {
            for _ in 0..*count {
                network.deliver_one();
            }
        }
        Event::Wait(ms) => network.run_for(Duration::from_millis(*ms)),
        Event::Age(s) => age(network, Duration::from_secs(*s)),
    }
}

/// Both ends notice within seconds what became of a link.
fn age(network: &mut Network, duration: Duration) {
    network.finish_links();
    network.run_for(duration);
}

fn nth_link(network: &Network, nth: usize) -> Option<LinkId> {
    let links: Vec<_> = network.links.keys().copied().collect();
    (!links.is_empty()).then(|| links[nth % links.len()])
}

fn check(network: &Network) -> Result<(), TestCaseError> {
    prop_assert!(network.is_quiet());
    for n in 0..network.routers.len() {
        for &other in &network.component(n) {
            prop_assert_eq!(
                lasting(network, n, other),
                lasting(network, other, n),
                "{}/{}",
                n,
                other
            );
        }
        check_routes(network, n)?;
        check_addresses(network, n)?;
    }
    Ok(())
}

/// What `n` knows, but for what is about to age out and has done so at `other` already.
fn lasting(network: &Network, n: usize, other: usize) -> Vec<RecordHeader> {
    let other = network.routers[other].engine.lsdb();
    let lsdb = network.routers[n].engine.lsdb();
    let lasts = |header: &RecordHeader| {
        let remaining_s = lsdb.get(&header.key).map_or(0, |entry| entry.remaining_s(network.now));
        remaining_s > 60 || other.get(&header.key).is_some()
    };
    lsdb.headers().filter(lasts).collect()
}

fn check_routes(network: &Network, n: usize) -> Result<(), TestCaseError> {
    let (fib, oracle) = (&network.routers[n].fib, network.oracle(n));
    for (other, metric) in oracle.iter().enumerate().filter(|(other, _)| *other != n) {
        let route = fib.routes.get(&router_id(other));
        let found = route.map(|route| route.paths[0].metric_us);
        prop_assert_eq!(found, *metric, "from {} to {}", n, other);
        for path in route.map_or(&[][..], |route| &route.paths) {
            let passed = network.forward(n, path);
            let ids: Vec<_> = passed.iter().map(|&at| router_id(at)).collect();
            prop_assert_eq!(&ids, &path.hops);
            prop_assert_eq!(passed.last(), Some(&other));
            let transits = &passed[..passed.len() - 1];
            let distinct: BTreeSet<_> = passed.iter().collect();
            prop_assert_eq!(distinct.len(), passed.len(), "no router twice");
            prop_assert!(!passed.contains(&n), "never back through the ingress");
            prop_assert!(transits.iter().all(|&t| network.routers[t].role == Role::Interior));
        }
    }
    Ok(())
}

/// Every address is served by exactly the routers that serve it and can be reached.
fn check_addresses(network: &Network, n: usize) -> Result<(), TestCaseError> {
    let oracle = network.oracle(n);
    let mut expected = BTreeSet::new();
    for (other, router) in network.routers.iter().enumerate() {
        if oracle[other].is_some() && !router.left {
            let of_router = router.addresses.iter().map(|e| (e.address.clone(), router_id(other)));
            expected.extend(of_router);
        }
    }
    let found: BTreeSet<_> = network.routers[n]
        .fib
        .addresses
        .iter()
        .flat_map(|(address, providers)| providers.iter().map(|p| (address.clone(), p.router)))
        .collect();
    prop_assert_eq!(found, expected, "addresses at {}", n);
    Ok(())
}

/// Lets a history happen, then the network come to rest.
fn run((routers, room): (usize, usize), seed: u64, events: &[Event]) -> Result<(), TestCaseError> {
    let mut network = Network::new(routers, seed);
    network.room = room;
    for event in events {
        apply(&mut network, event);
    }
    network.finish_links();
    network.run_for(Duration::from_secs(5));
    check(&network)?;
    // The refresh changes nothing.
    network.run_for(Duration::from_secs(2 * 60 * 60));
    check(&network)
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: 192,
        // `tests/convergence.regressions`: without a `lib.rs` above it the default has nowhere to write to.
        failure_persistence: Some(Box::new(FileFailurePersistence::WithSource("regressions"))),
        ..ProptestConfig::default()
    })]

    #[test]
    fn connected_routers_converge(
        seed: u64,
        room in prop_oneof![1..4_usize, Just(usize::MAX)],
        events in (2..8_usize).prop_flat_map(|n| (Just(n), prop::collection::vec(event(n), 1..60))),
    ) {
        let (routers, events) = events;
        run((routers, room), seed, &events)?;
    }
}

/// Histories that once ended in disagreement.
#[test]
fn known_histories_converge() {
    let history = vec![
        Event::Leave(1),
        Event::LinkUp(0, 1, 1),
        Event::Deliver(2),
        Event::Restart(1),
        Event::LinkUp(1, 0, 1),
        Event::Addresses(1, BTreeSet::from([0])),
    ];
    run((2, usize::MAX), 6_404_701_020_999_200_149, &history).unwrap();
    // Records of a boot that the controller has forgotten, sealed with another key.
    let history = vec![
        Event::Restart(0),
        Event::Restart(0),
        Event::LinkUp(1, 0, 1),
        Event::Addresses(0, BTreeSet::from([3])),
        Event::Deliver(6),
        Event::LinkDown(0),
        Event::LoseCount(0, 0),
        Event::HalfUp(0, 1, 1, false),
        Event::Addresses(0, BTreeSet::new()),
    ];
    run((2, 1), 0, &history).unwrap();
    // One of the same number.
    let history = vec![
        Event::Restart(1),
        Event::LinkUp(0, 1, 1),
        Event::Addresses(1, BTreeSet::from([0])),
        Event::Addresses(1, BTreeSet::from([1])),
        Event::Deliver(6),
        Event::LoseCount(1, 1),
        Event::LinkUp(0, 1, 1),
    ];
    run((2, 1), 0, &history).unwrap();
    // A boot outdone by a record of its own, whose process ends before its LSA is out.
    let twin = |nth| Event::Twin { known_to: 0, nth, told: 1, n: 0, other_key: false };
    let history = vec![
        Event::Restart(1),
        Event::Wait(101),
        Event::Addresses(1, BTreeSet::from([1, 2, 4, 7])),
        Event::LinkUp(0, 1, 1),
        Event::Deliver(5),
        twin(6),
        Event::LinkUp(0, 1, 1),
        Event::Wait(150),
        twin(14),
        Event::Crash(1),
        Event::LinkUp(1, 0, 1),
        Event::Deliver(1),
    ];
    run((2, 2), 7_259_230_954_984_305_628, &history).unwrap();
}
