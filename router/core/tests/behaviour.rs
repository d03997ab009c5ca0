//! Single rules of routing, each in the smallest network that shows it.

#![allow(clippy::unwrap_used, reason = "a test")]

mod common;

use common::{
    EPOCH_UNIX_S, Network, endorsement, entry, router_id, seal, seal_as, site_id, statement,
};
use skein_core::{
    AdjacencyState, AgedRecord, HOPS_MAX, Input, Label, LinkId, LinkUp, Membership, Message,
    Origin, Output, PINS_MAX, Pattern, Payload, RecordDraft, RecordKey, RecordKind, Revocation,
    Role, Scope, Settings,
};
use std::{sync::Arc, time::Duration};

const SECOND: Duration = Duration::from_secs(1);
const DAY: Duration = Duration::from_secs(86_400);

fn line(routers: usize) -> Network {
    let mut network = Network::new(routers, 1);
    for n in 1..routers {
        network.endorse(n - 1, n);
        network.connect(n - 1, n, 1);
    }
    network.run_for(SECOND);
    network
}

/// 0 and 3 joined by transits 1 and 2.
fn diamond() -> Network {
    let mut network = Network::new(4, 1);
    for (a, b, cost) in [(0, 1, 1), (1, 3, 1), (0, 2, 2), (2, 3, 2)] {
        network.endorse(a, b);
        network.connect(a, b, cost);
    }
    network.run_for(SECOND);
    network
}

#[test]
fn neighbours_become_full() {
    let network = line(3);
    for n in 0..3 {
        let links = network.routers[n].engine.view().links;
        assert!(links.values().all(|(_, state)| *state == AdjacencyState::Full), "{links:?}");
    }
}

#[test]
fn a_path_may_have_24_hops_and_no_more() {
    let network = line(HOPS_MAX + 2);
    let fib = &network.routers[0].fib;
    let longest = &fib.routes[&router_id(HOPS_MAX)].paths[0];
    assert_eq!((longest.hops.len(), longest.labels.len()), (24, 23));
    assert!(!fib.routes.contains_key(&router_id(HOPS_MAX + 1)));
    let view = network.routers[0].engine.view();
    let too_far = view.routers.iter().find(|r| r.lsa.router == router_id(HOPS_MAX + 1)).unwrap();
    assert_eq!(too_far.problem, Some("path too long"));
}

#[test]
fn a_router_beyond_24_hops_is_reached_by_a_dearer_path_that_is_shorter() {
    let mut network = line(HOPS_MAX + 5);
    for (to, cost) in [(4, 200), (10, 100)] {
        network.endorse(0, to);
        network.connect(0, to, cost);
    }
    network.run_for(SECOND);
    let path = |n| &network.routers[0].fib.routes[&router_id(n)].paths[0];
    assert_eq!(
        (path(24).hops.len(), path(24).metric_us),
        (24, 24_000),
        "the cheapest while it may"
    );
    // Over 10, as the way over 4 is dearer; 28 links would be cheapest.
    assert_eq!((path(28).hops.len(), path(28).metric_us), (19, 118_000));
    assert_eq!(network.forward(0, path(28)).last(), Some(&28));
}

#[test]
fn no_timer_keeps_a_ring_of_rings_from_converging_within_a_second() {
    let rings = (0..6).flat_map(|ring| {
        let first = 4 * ring;
        let around = (0..4).map(move |n| (first + n, first + (n + 1) % 4));
        around.chain([(first + 2, (first + 4) % 24)])
    });
    let mut network = Network::new(24, 1);
    for (a, b) in rings {
        network.endorse(a, b);
        network.connect(a, b, 1);
    }
    for n in 0..24 {
        network.set_addresses(n, vec![entry(&format!("svc-{n}"))]);
    }
    network.run_for(SECOND);
    for router in &network.routers {
        assert_eq!((router.fib.routes.len(), router.fib.addresses.len()), (23, 24));
    }
    let routes = &network.routers[0].fib.routes;
    assert!(routes.values().any(|route| route.paths[0].hops.len() > 8), "frames of the long kind");
}

#[test]
fn pins_take_disjoint_paths() {
    let network = diamond();
    let route = &network.routers[0].fib.routes[&router_id(3)];
    assert_eq!(route.paths.len(), 2);
    assert_eq!(route.paths[0].hops, [router_id(1), router_id(3)]);
    assert_eq!(route.paths[1].hops, [router_id(2), router_id(3)]);
    assert!(route.paths.len() <= usize::from(PINS_MAX));
}

#[test]
fn parallel_links_are_paths_of_their_own() {
    let mut network = line(2);
    network.connect(0, 1, 1);
    network.run_for(SECOND);
    let route = &network.routers[0].fib.routes[&router_id(1)];
    assert_eq!(route.paths.len(), 2);
    assert_ne!(route.paths[0].first_link, route.paths[1].first_link);
}

#[test]
fn a_transit_detours_around_its_dead_link_before_anybody_was_told() {
    let mut network = diamond();
    // A second way from 1 to 3, over 2.
    network.endorse(1, 2);
    network.connect(1, 2, 1);
    network.run_for(SECOND);
    let path = network.routers[0].fib.routes[&router_id(3)].paths[0].clone();
    assert_eq!(path.hops, [router_id(1), router_id(3)]);
    let fib = &network.routers[1].fib;
    let dead = fib.labels[&path.labels[0]];
    let detour = fib.repair(path.labels[0], &[], |link| link != dead).unwrap();
    assert_eq!(network.forward(1, detour), [2, 3]);
    // And after it was told, by the label that has no link any more.
    network.disconnect(dead);
    let fib = &network.routers[1].fib;
    assert!(!fib.labels.contains_key(&path.labels[0]));
    let detour = fib.repair(path.labels[0], &[], |_| true).unwrap();
    assert_eq!(network.forward(1, detour), [2, 3]);
    assert_eq!(fib.repair(Label(9_999), &[], |_| true), None);
}

#[test]
fn a_dead_link_is_left_at_once() {
    let mut network = diamond();
    let link = network.routers[0].fib.routes[&router_id(3)].paths[0].first_link;
    network.input(0, Input::LinkDown { link });
    network.run_for(Duration::from_millis(10));
    assert_eq!(network.routers[0].fib.routes[&router_id(3)].paths[0].hops[0], router_id(2));
}

#[test]
fn a_purge_reaches_whoever_still_has_the_page() {
    // 0 - 1 - 2; 2 is cut off while 0 withdraws its address, and 1 has restarted meanwhile.
    let mut network = line(3);
    network.set_addresses(0, vec![entry("backend")]);
    network.run_for(SECOND);
    assert!(network.routers[2].fib.addresses.contains_key("backend"));
    for link in network.links_of(1) {
        network.disconnect(link);
    }
    network.set_addresses(0, Vec::new());
    network.run_for(SECOND);
    network.restart(1);
    network.connect(1, 2, 1);
    network.run_for(SECOND);
    network.connect(0, 1, 1);
    network.run_for(SECOND);
    for n in 0..3 {
        let pages = network.routers[n].engine.lsdb().of_kind(RecordKind::AddressPage);
        assert!(pages.filter(|page| !page.is_purge()).count() == 0, "at {n}");
        assert!(!network.routers[n].fib.addresses.contains_key("backend"));
    }
}

#[test]
fn a_router_that_went_silent_ages_out_within_an_hour() {
    let mut network = line(3);
    network.set_addresses(2, vec![entry("backend")]);
    network.run_for(SECOND);
    let link = network.links_of(2)[0];
    network.disconnect(link);
    network.run_for(SECOND);
    assert!(!network.routers[0].fib.addresses.contains_key("backend"), "not reachable");
    assert!(network.routers[0].engine.lsdb().lsa(router_id(2)).is_some(), "but remembered");
    network.run_for(Duration::from_secs(3_601));
    assert!(network.routers[0].engine.lsdb().lsa(router_id(2)).is_none());
    assert!(network.routers[0].fib.routes.contains_key(&router_id(1)), "the living go on");
}

#[test]
fn a_lost_boot_epoch_is_outdone() {
    let mut network = line(2);
    network.set_addresses(1, vec![entry("old")]);
    for _ in 0..3 {
        network.restart(1);
    }
    network.connect(0, 1, 1);
    network.run_for(SECOND);
    assert!(network.routers[0].fib.addresses.contains_key("old"));
    // The controller lost count: the next boot has a smaller epoch.
    network.routers[1].boot_epoch = 0;
    network.routers[1].addresses = vec![entry("new")];
    network.restart(1);
    network.connect(0, 1, 1);
    network.run_for(Duration::from_secs(3));
    assert_eq!(network.live_headers(0), network.live_headers(1));
    let addresses = &network.routers[0].fib.addresses;
    assert!(addresses.contains_key("new") && !addresses.contains_key("old"), "{addresses:?}");
}

#[test]
fn addresses_that_overtake_the_lsa_of_a_router_that_came_back_wait_for_it() {
    let mut network = line(2);
    network.input(1, Input::Leave);
    network.run_for(SECOND);
    network.restart(1);
    network.connect(0, 1, 1);
    // Flooded right behind the summary, before 0 can ask for the LSA in it.
    network.set_addresses(1, vec![entry("backend")]);
    network.run_for(SECOND);
    assert!(network.routers[0].fib.addresses.contains_key("backend"));
}

#[test]
fn pages_that_became_void_are_not_awaited() {
    let mut network = line(2);
    network.set_addresses(0, vec![entry("backend")]);
    network.run_for(SECOND);
    // 0 has sent its summary over a second link, of which 1 learns only after the farewell.
    let link = network.begin(0, 1, 1);
    network.tell_up(link, 0);
    network.input(0, Input::Leave);
    network.run_for(SECOND);
    network.tell_up(link, 1);
    network.run_for(SECOND);
    let links = network.routers[1].engine.view().links;
    assert!(links.values().all(|(_, state)| *state == AdjacencyState::Full), "{links:?}");
}

#[test]
fn links_to_strangers_and_to_oneself_are_refused() {
    let mut network = Network::new(2, 1);
    for n in [0, 1] {
        let link = network.begin(0, 1, 1);
        network.tell_up(link, n);
        assert_eq!(network.routers[n].refused, [link]);
    }
    let up = LinkUp {
        link: LinkId(77),
        peer: router_id(0),
        peer_site: site_id(0),
        cost: 1,
        rtt_us: 0,
        mtu: 1_400,
        statements: Vec::new(),
    };
    network.input(0, Input::LinkUp(up));
    assert_eq!(network.routers[0].refused.last(), Some(&LinkId(77)));
}

#[test]
fn a_revoked_site_is_cut_off_everywhere_with_its_routes_and_addresses() {
    let mut network = line(4);
    network.set_addresses(3, vec![entry("backend")]);
    network.run_for(SECOND);
    assert!(network.routers[0].fib.addresses.contains_key("backend"));
    let key = RecordKey::revocation(site_id(0), site_id(3));
    let revocation = Revocation {
        issuer: site_id(0),
        subject: site_id(3),
        issued_unix_s: 0,
        reason: "stolen".into(),
    };
    let payload = Payload::Revocation(revocation);
    let record = seal(RecordDraft { key, sequence: 1, lifetime_s: u32::MAX, payload });
    network.give(0, vec![record]);
    network.run_for(SECOND);
    for n in 0..3 {
        let router = &network.routers[n];
        assert!(router.trust.site(site_id(3)).is_none(), "at {n}");
        assert!(!router.fib.addresses.contains_key("backend"), "at {n}");
        assert!(!router.fib.routes.contains_key(&router_id(3)), "at {n}");
    }
    assert_eq!(network.routers[2].refused.len(), 1, "the neighbour closes the link");
    let kept = network.routers[2].learned.iter().any(|record| record.key == key);
    assert!(kept, "controllers keep it");
}

#[test]
fn a_guest_sees_and_serves_within_its_scope_only() {
    // 0 and 1 are members; 2 is a guest of 1.
    let mut network = line(3);
    let scope = Scope { provide: [Pattern("guest.*".into())].into(), ..Scope::default() };
    let mut guest = Network::new(3, 1);
    std::mem::swap(&mut network, &mut guest);
    network.endorse(0, 1);
    network.connect(0, 1, 1);
    for n in [1, 2] {
        let both = vec![
            statement(site_id(1), site_id(0), 1),
            statement(site_id(2), site_id(2), 1),
            endorsement(site_id(1), site_id(2), Membership::Guest, scope.clone()),
            endorsement(site_id(2), site_id(1), Membership::Guest, scope.clone()),
        ];
        network.give(n, both);
    }
    network.connect(1, 2, 1);
    network.set_addresses(0, vec![entry("inner")]);
    network.set_addresses(2, vec![entry("guest.shop"), entry("backend")]);
    network.run_for(SECOND);
    let fib = &network.routers[0].fib;
    assert!(fib.addresses.contains_key("guest.shop"));
    assert!(!fib.addresses.contains_key("backend"), "outside its scope");
    let seen: Vec<Origin> = network.live_headers(2).into_iter().map(|(_, o, _)| o).collect();
    assert!(!seen.contains(&Origin::Router(router_id(0))), "a guest learns nothing of others");
    assert!(!seen.contains(&Origin::Site(site_id(0))));
    assert!(seen.contains(&Origin::Router(router_id(1))));
}

#[test]
fn routers_with_the_same_handle_draw_again() {
    let mut network = Network::with_handle_bits(12, 1, 5);
    for n in 1..12 {
        network.endorse(n - 1, n);
        network.connect(n - 1, n, 1);
    }
    network.run_for(Duration::from_secs(5));
    let mut handles: Vec<u32> =
        network.routers.iter().map(|router| router.engine.handle().0).collect();
    handles.sort_unstable();
    handles.dedup();
    assert_eq!(handles.len(), 12);
    let fib = &network.routers[0].fib;
    assert_eq!((fib.routes.len(), fib.handles.len()), (11, 11));
    assert!(fib.routes.values().all(|route| fib.handles[&route.handle] == route.router));
}

#[test]
fn rtt_is_told_when_it_changed_enough_and_seldom() {
    let mut network = line(3);
    let link = network.links_of(0)[0];
    let metric =
        |network: &Network| network.routers[2].fib.routes[&router_id(0)].paths[0].metric_us;
    let measure = |network: &mut Network, rtt_us| {
        network.input(0, Input::LinkChanged { link, cost: 1, rtt_us, mtu: 1_400 });
        network.run_for(SECOND);
    };
    measure(&mut network, 40_000);
    assert_eq!(metric(&network), 42_000, "at once, and the worse end counts");
    measure(&mut network, 80_000);
    assert_eq!(metric(&network), 42_000, "not again within ten seconds");
    network.run_for(Duration::from_secs(10));
    assert_eq!(metric(&network), 82_000);
    network.run_for(Duration::from_secs(10));
    measure(&mut network, 90_000);
    assert_eq!(metric(&network), 82_000, "not for an eighth");
}

#[test]
fn addresses_stay_where_they_are_until_one_changes() {
    let mut network = line(3);
    network.set_addresses(2, vec![entry("backend")]);
    network.run_for(SECOND);
    let fib = |network: &Network| Arc::clone(&network.routers[0].fib);
    let before = fib(&network);
    // Something else changes.
    let link = network.connect(0, 1, 7);
    network.run_for(SECOND);
    let after = fib(&network);
    assert!(after.version > before.version && Arc::ptr_eq(&after.addresses, &before.addresses));
    network.disconnect(link);
    network.run_for(SECOND);
    // The way there is longer: that is news to those who choose, and none to those who listen.
    let link = network.routers[0].fib.routes[&router_id(2)].paths[0].first_link;
    for n in [0, 1] {
        network.input(n, Input::LinkChanged { link, cost: 9, rtt_us: 0, mtu: 1_400 });
    }
    network.run_for(SECOND);
    let after = fib(&network);
    assert!(after.addresses["backend"][0].metric_us > before.addresses["backend"][0].metric_us);
    assert_eq!(after.services_version, before.services_version);
    network.set_addresses(2, vec![entry("backend"), entry("more")]);
    network.run_for(SECOND);
    assert!(fib(&network).services_version > before.services_version);
}

#[test]
fn a_flapping_link_does_not_storm() {
    let mut network = line(3);
    let link = network.links_of(0)[0];
    let before = network.messages;
    for i in 0..1_000_u32 {
        let mtu = if i % 2 == 0 { 1_300 } else { 1_400 };
        network.input(0, Input::LinkChanged { link, cost: 1, rtt_us: 0, mtu });
        network.run_for(Duration::from_millis(1));
    }
    let lsas = network.messages - before;
    assert!(lsas < 30, "{lsas} messages for 1,000 changes in a second");
}

#[test]
fn an_edge_carries_nothing_for_others() {
    let mut network = line(3);
    network.routers[1].role = Role::Edge;
    let settings = Settings { role: Role::Edge, ..Settings::default() };
    network.input(1, Input::Settings(settings));
    network.run_for(SECOND);
    assert!(!network.routers[0].fib.routes.contains_key(&router_id(2)));
    assert!(network.routers[1].fib.routes.contains_key(&router_id(2)));
}

#[test]
fn the_last_word_of_an_endorsed_site_outlives_its_lifetime() {
    let mut network = Network::new(3, 1);
    for subject in [1, 2] {
        network.endorse(0, subject);
    }
    network.run_for(6 * DAY);
    let renewed = endorsement(site_id(0), site_id(1), Membership::Member, Scope::default());
    network.give(
        0,
        vec![seal(RecordDraft {
            key: renewed.key,
            sequence: 2,
            lifetime_s: renewed.lifetime_s,
            payload: renewed.payload,
        })],
    );
    network.run_for(3 * DAY);
    let lsdb = network.routers[0].engine.lsdb();
    assert!(lsdb.statement(site_id(1)).is_some(), "endorsed anew");
    assert!(lsdb.statement(site_id(2)).is_none(), "no longer endorsed");
    network.run_for(6 * DAY);
    let lsdb = network.routers[0].engine.lsdb();
    assert!(lsdb.statement(site_id(1)).is_none(), "no longer endorsed");
}

#[test]
fn a_neighbour_whose_records_are_forged_is_left() {
    for (forged, is_left) in [(32, false), (1_024, true)] {
        let mut network = line(2);
        let link = network.links_of(0)[0];
        let known = network.routers[0].engine.lsdb().get(&RecordKey::lsa(router_id(1))).unwrap();
        let lsa = Arc::clone(&known.record);
        let forge = |n| {
            let draft = RecordDraft {
                key: lsa.key,
                sequence: lsa.sequence + n,
                lifetime_s: lsa.lifetime_s,
                payload: lsa.payload.clone(),
            };
            seal_as(draft, Arc::from(&b"forged"[..]))
        };
        let last = statement(site_id(9), site_id(0), 1);
        let records = (1..=forged)
            .map(forge)
            .chain([last])
            .map(|record| AgedRecord { record: Arc::new(record), remaining_s: 60 });
        let message = Message::Records { records: records.collect() };
        network.input(0, Input::Message { link, message });
        assert_eq!(network.routers[0].refused.contains(&link), is_left, "{forged}");
        let engine = &network.routers[0].engine;
        assert_eq!(engine.lsdb().statement(site_id(9)).is_none(), is_left, "the rest is not read");
        assert_eq!(engine.view().links.is_empty(), is_left);
    }
}

#[test]
fn a_link_ends_when_the_other_end_can_sign_nothing_any_more() {
    let mut network = line(2);
    let link = network.links_of(0)[0];
    network.run_for(Duration::from_secs(2 * 3_600));
    assert!(network.routers[0].refused.is_empty(), "it has issued its LSA anew");
    // Its certificate lapses: whatever it sends from now on is not accepted.
    let (start, mut now) = (network.now, network.now);
    let engine = &mut network.routers[0].engine;
    let mut refused = None;
    while refused.is_none() && now < start + DAY {
        now += Duration::from_secs(60);
        engine.handle_timeout(now, EPOCH_UNIX_S);
        while let Some(output) = engine.poll_output() {
            if let Output::LinkRefused { link, .. } = output {
                refused = Some(link);
            }
        }
    }
    assert_eq!(refused, Some(link));
    assert!(now - start < Duration::from_secs(3_600 + 300 + 120), "{:?}", now - start);
}
