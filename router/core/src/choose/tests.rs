use super::*;
use crate::{AddressEntry, Handle, LocalRouter, Protocol, SiteId};
use std::sync::Arc;

const TCP_80: Port = Port { port: 80, protocol: Protocol::Tcp };

fn router(n: u8) -> RouterId {
    RouterId([n; 16])
}

/// Providers as (router, metric in ms, priority, weight); this router is number 0.
fn fib(strategy: Strategy, providers: &[(u8, u64, u32, u32)]) -> Fib {
    let provider = |&(n, metric_ms, priority, weight): &(u8, u64, u32, u32)| Provider {
        router: router(n),
        site: SiteId([n; 32]),
        entry: Arc::new(AddressEntry {
            address: "backend".parse().unwrap(),
            ports: vec![TCP_80],
            strategy,
            cost: 0,
            priority,
            weight,
            at_least_once: false,
        }),
        cost: metric_ms,
        metric_us: metric_ms * 1_000,
    };
    let local = LocalRouter { router: router(0), site: SiteId([0; 32]), handle: Handle(1) };
    Fib {
        local: Some(local),
        addresses: Arc::new(
            [("backend".parse().unwrap(), providers.iter().map(provider).collect())].into(),
        ),
        ..Fib::default()
    }
}

fn chosen(fib: &Fib, excluded: &[u8], flows: &dyn Fn(u8) -> u64, draw: u64) -> Option<u8> {
    let excluded: Vec<RouterId> = excluded.iter().map(|&n| router(n)).collect();
    let address = "backend".parse().unwrap();
    let wanted = Wanted { address: &address, port: Some(TCP_80), excluded: &excluded };
    let choice = choose(fib, wanted, &|router| flows(router.0[0]), draw);
    let count = choice.candidates.iter().filter(|(_, v)| *v == Verdict::Chosen).count();
    assert!(count <= 1);
    choice.chosen().map(|provider| provider.router.0[0])
}

#[test]
fn a_local_provider_comes_first_unless_it_failed() {
    for strategy in [Strategy::Closest, Strategy::Balanced, Strategy::Priority, Strategy::Weighted]
    {
        let fib = fib(strategy, &[(0, 0, 9, 1), (1, 1, 1, 9)]);
        assert_eq!(chosen(&fib, &[], &|_| 0, 1), Some(0), "{strategy:?}");
        assert_eq!(chosen(&fib, &[0], &|_| 0, 1), Some(1), "{strategy:?}");
        assert_eq!(chosen(&fib, &[0, 1], &|_| 0, 1), None, "{strategy:?}");
    }
}

#[test]
fn closest_is_by_metric_and_equals_share() {
    let fib = fib(Strategy::Closest, &[(1, 2, 0, 1), (2, 2, 0, 1), (3, 3, 0, 1)]);
    assert_eq!(chosen(&fib, &[], &|_| 0, 0), Some(1));
    assert_eq!(chosen(&fib, &[], &|_| 0, 1), Some(2));
    assert_eq!(chosen(&fib, &[1, 2], &|_| 0, 1), Some(3));
}

#[test]
fn balanced_evens_out_flows_and_prefers_the_near() {
    let fib = fib(Strategy::Balanced, &[(1, 2, 0, 1), (2, 2, 0, 1), (3, 12, 0, 1)]);
    let mut flows = [0_u64; 4];
    for draw in 0..200 {
        let to = chosen(&fib, &[], &|n| flows[usize::from(n)], draw).unwrap();
        flows[usize::from(to)] += 1;
    }
    assert!(flows[1].abs_diff(flows[2]) <= 1, "{flows:?}");
    assert!(flows[3] > 50 && flows[1] - flows[3] >= 9, "farther by ten flows: {flows:?}");
}

#[test]
fn balanced_takes_turns_when_flows_come_one_at_a_time() {
    let fib = fib(Strategy::Balanced, &[(1, 2, 0, 1), (2, 2, 0, 1)]);
    let to_first = (0..200).filter(|&draw| chosen(&fib, &[], &|_| 0, draw) == Some(1)).count();
    assert_eq!(to_first, 100);
}

#[test]
fn priority_goes_to_the_lowest_number_that_is_left() {
    let fib = fib(Strategy::Priority, &[(1, 1, 2, 1), (2, 9, 1, 1), (3, 9, 1, 1)]);
    assert_eq!(chosen(&fib, &[], &|n| u64::from(n == 2), 0), Some(3));
    assert_eq!(chosen(&fib, &[2, 3], &|_| 0, 0), Some(1));
}

#[test]
fn weighted_draws_in_proportion() {
    let fib = fib(Strategy::Weighted, &[(1, 1, 0, 3), (2, 1, 0, 1), (3, 1, 0, 0)]);
    let mut counts = [0; 4];
    for draw in 0..400 {
        counts[usize::from(chosen(&fib, &[], &|_| 0, draw).unwrap())] += 1;
    }
    assert_eq!(counts, [0, 300, 100, 0]);
}

#[test]
fn a_port_goes_only_to_those_who_serve_it() {
    let fib = fib(Strategy::Closest, &[(1, 1, 0, 1)]);
    let address = "backend".parse().unwrap();
    let port = Port { port: 81, protocol: Protocol::Tcp };
    for (port, expected) in [
        (Some(port), Verdict::PortNotServed),
        (Some(Port { protocol: Protocol::Udp, ..TCP_80 }), Verdict::PortNotServed),
        (None, Verdict::Chosen),
    ] {
        let wanted = Wanted { address: &address, port, excluded: &[] };
        assert_eq!(choose(&fib, wanted, &|_| 0, 0).candidates[0].1, expected);
    }
}

#[test]
fn every_candidate_is_explained() {
    let fib = fib(Strategy::Closest, &[(1, 1, 0, 1), (2, 1, 0, 1), (3, 5, 0, 1)]);
    let address = "backend".parse().unwrap();
    let wanted = Wanted { address: &address, port: None, excluded: &[router(1)] };
    let verdicts: Vec<Verdict> =
        choose(&fib, wanted, &|_| 0, 0).candidates.into_iter().map(|(_, v)| v).collect();
    assert_eq!(verdicts, [Verdict::Excluded, Verdict::Chosen, Verdict::Farther]);
}
