//! Random networks and histories: whatever happened, connected routers come to know the same and route the same.

mod common;

use common::{Network, entry, router_id};
use proptest::{prelude::*, test_runner::FileFailurePersistence};
use skein_core::{Input, Role, Settings};
use std::{collections::BTreeSet, time::Duration};

#[derive(Clone, Debug)]
enum Event {
    LinkUp(usize, usize, u16),
    LinkDown(usize),
    Restart(usize),
    Leave(usize),
    Role(usize, bool),
    Addresses(usize, BTreeSet<u8>),
    Deliver(usize),
    Wait(u64),
}

fn event(routers: usize) -> impl Strategy<Value = Event> {
    let router = 0..routers;
    let addresses = prop::collection::btree_set(0..12_u8, 0..6);
    prop_oneof![
        8 => (router.clone(), router.clone(), 1..5_u16).prop_map(|(a, b, c)| Event::LinkUp(a, b, c)),
        3 => (0..20_usize).prop_map(Event::LinkDown),
        1 => router.clone().prop_map(Event::Restart),
        1 => router.clone().prop_map(Event::Leave),
        1 => (router.clone(), any::<bool>()).prop_map(|(n, edge)| Event::Role(n, edge)),
        4 => (router, addresses).prop_map(|(n, a)| Event::Addresses(n, a)),
        6 => (0..30_usize).prop_map(Event::Deliver),
        3 => (0..300_u64).prop_map(Event::Wait),
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
            let links: Vec<_> = network.links.keys().copied().collect();
            if !links.is_empty() {
                network.disconnect(links[nth % links.len()]);
            }
        }
        Event::Restart(n) => network.restart(*n),
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
        Event::Deliver(count) => {
            for _ in 0..*count {
                network.deliver_one();
            }
        }
        Event::Wait(ms) => network.run_for(Duration::from_millis(*ms)),
    }
}

fn check(network: &Network) -> Result<(), TestCaseError> {
    prop_assert!(network.is_quiet());
    for n in 0..network.routers.len() {
        for &other in &network.component(n) {
            prop_assert_eq!(
                network.live_headers(n),
                network.live_headers(other),
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
fn run(routers: usize, seed: u64, events: &[Event]) -> Result<(), TestCaseError> {
    let mut network = Network::new(routers, seed);
    for event in events {
        apply(&mut network, event);
    }
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
        events in (2..8_usize).prop_flat_map(|n| (Just(n), prop::collection::vec(event(n), 1..60))),
    ) {
        let (routers, events) = events;
        run(routers, seed, &events)?;
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
    run(2, 6_404_701_020_999_200_149, &history).unwrap();
}
