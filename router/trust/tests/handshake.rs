//! Which certificate gets past which end of which connection: only the one it was made for.

#![allow(clippy::unwrap_used, reason = "a test stops at what it cannot unwrap")]

mod common;

use common::{
    Clock, DAY, NOW, Presented, Site, anonymous_client, both_usages, handshake, self_signed, uri,
    view,
};
use rcgen::{ExtendedKeyUsagePurpose, SanType};
use skein_core::{Payload, SiteId, TrustView};
use skein_trust::{
    ALPN_CLAIM, ALPN_LINK, ALPN_SESSION, Admitted, CaPin, Dial, IdentityCell, PeerError, RouterTls,
    StatementDraft, TrustCell, Usage, admit, claim_carrier_client, claim_client, claim_server,
    peer_identity,
};
use skein_wire::proto::routing::Record;
use std::sync::{Arc, atomic::Ordering};

struct World {
    a: Site,
    b: Site,
    stranger: Site,
    clock: Arc<Clock>,
    trust: Arc<TrustCell>,
    /// Of a router of site B, which trusts A.
    tls: RouterTls,
}

impl World {
    fn new() -> Self {
        let (a, b, stranger) = (Site::new(), Site::new(), Site::new());
        let clock = Clock::at(NOW);
        let trust = TrustCell::new(view(&b, &[&a]));
        let identity = IdentityCell::new(b.router("own").identity());
        let time = Arc::clone(&clock);
        let tls = RouterTls::new(Arc::clone(&trust), identity, time);
        Self { a, b, stranger, clock, trust, tls }
    }

    fn uri(&self, site: &Site, path: &str) -> SanType {
        uri(&format!("spiffe://{}{path}", site.id()))
    }

    /// Everything somebody may present, named.
    fn presented(&self) -> Vec<(&'static str, Presented)> {
        let (a, b) = (&self.a, &self.b);
        let own_name = self.uri(a, "/router/r1");
        let chained = |leaf: Presented, fillers: &[&Presented]| {
            let fillers = fillers.iter().flat_map(|f| f.chain.iter().cloned());
            Presented { chain: leaf.chain.iter().take(1).cloned().chain(fillers).collect(), ..leaf }
        };
        vec![
            ("router of A", a.router("r1")),
            ("other router of A", a.router("r2")),
            ("router of B", b.router("r1")),
            ("controller of A", a.controller()),
            ("CA of A as leaf", a.ca_as_leaf()),
            ("stranger's router", self.stranger.router("r1")),
            ("minted for A by B's CA", b.mint(vec![own_name.clone()], both_usages())),
            ("self-signed for A", self_signed(vec![own_name.clone()])),
            (
                "self-signed leaf, victim's chain behind it",
                chained(self_signed(vec![own_name.clone()]), &[&a.router("r1")]),
            ),
            ("stranger's leaf, A's chain", chained(self.stranger.router("r1"), &[&a.router("r1")])),
            ("expired router of A", a.router_at("r1", NOW - 4 * DAY)),
            ("future router of A", a.router_at("r1", NOW + DAY)),
            ("two names", a.mint(vec![own_name.clone(), self.uri(a, "/router/r2")], both_usages())),
            (
                "a DNS name beside",
                a.mint(
                    vec![own_name.clone(), SanType::DnsName("r1".try_into().unwrap())],
                    both_usages(),
                ),
            ),
            ("no name", a.mint(Vec::new(), both_usages())),
            ("path too deep", a.mint(vec![self.uri(a, "/router/r1/x")], both_usages())),
            ("no path", a.mint(vec![self.uri(a, "")], both_usages())),
            ("upper case", a.mint(vec![uri(&own_uri(a).to_uppercase())], both_usages())),
            (
                "server use only",
                a.mint(vec![own_name.clone()], vec![ExtendedKeyUsagePurpose::ServerAuth]),
            ),
            ("client use only", a.mint(vec![own_name], vec![ExtendedKeyUsagePurpose::ClientAuth])),
        ]
    }
}

fn own_uri(site: &Site) -> String {
    format!("spiffe://{}/router/r1", site.id())
}

fn router_of(site: &Site) -> skein_core::RouterId {
    skein_trust::router_id(site.id(), "r1")
}

/// Dials somebody who presents `presented` and says who got through.
fn dial(dial: &Dial, presented: &Presented, alpn: &[u8]) -> bool {
    let outcome = handshake(Arc::clone(&dial.config), presented.server(alpn));
    assert_eq!(outcome.is_err(), dial.refusal().is_some(), "a refusal always has its reason");
    outcome.is_ok()
}

#[test]
fn every_certificate_against_every_end() {
    let world = World::new();
    let tls = &world.tls;
    let ca_pin = CaPin::of(world.a.ca.certificate());
    let routers_of_a = ["router of A", "other router of A"];
    let trusted = ["router of A", "other router of A", "router of B"];
    for (name, presented) in world.presented() {
        let server_use = name == "server use only";
        let client_use = name == "client use only";
        let expect = |ok: bool, got: bool, end: &str| assert_eq!(ok, got, "{name} at {end}");

        let got = dial(&tls.link_client(world.a.id()), &presented, ALPN_LINK);
        expect(routers_of_a.contains(&name) || server_use, got, "a link's dialling end");

        let got = dial(&tls.session_client(router_of(&world.a)), &presented, ALPN_SESSION);
        expect(name == "router of A" || server_use, got, "a session's dialling end");

        let time = Arc::clone(&world.clock);
        let got = dial(&claim_client(world.a.id(), ca_pin, time), &presented, ALPN_CLAIM);
        expect(name == "controller of A", got, "a claim's dialling end");

        let got = handshake(presented.client(ALPN_SESSION), tls.session_server()).is_ok();
        expect(trusted.contains(&name) || client_use, got, "a session's accepting end");

        let got = handshake(presented.client(ALPN_LINK), tls.link_server()).is_ok();
        expect(trusted.contains(&name) || client_use, got, "a link's accepting end");

        let got = handshake(presented.client(ALPN_LINK), tls.port_server()).is_ok();
        expect(trusted.contains(&name) || client_use, got, "the port");
    }
}

/// B has heard nothing of A for longer than A's statement holds.
fn lapsed(world: &World) {
    let known = statement(&world.a, &world.a, 1, NOW - DAY);
    let known = skein_wire::convert::parse_record(&known.body, &known.signature).unwrap();
    let Payload::SiteStatement(known) = known.payload else { panic!("a statement") };
    let lapsed = [(world.a.id(), known)].into();
    world.trust.publish(Arc::new(TrustView { lapsed, ..(*view(&world.b, &[])).clone() }));
}

/// What `site` says, under the CA of `authority`.
fn statement(site: &Site, authority: &Site, epoch: u64, expires_unix_s: i64) -> Record {
    site.identity.statement(&StatementDraft {
        epoch,
        ca_certificates: vec![authority.ca.certificate().to_vec()],
        expires_unix_s,
        ..StatementDraft::default()
    })
}

#[test]
fn a_router_of_a_site_that_lapsed_gets_as_far_as_its_introduction() {
    let world = World::new();
    lapsed(&world);
    let (tls, a) = (&world.tls, &world.a);
    let router = a.router("r1");
    assert!(dial(&tls.link_client(a.id()), &router, ALPN_LINK));
    assert!(handshake(router.client(ALPN_LINK), tls.port_server()).is_ok());
    assert!(!dial(&tls.session_client(router_of(a)), &router, ALPN_SESSION), "no session");
    assert!(handshake(router.client(ALPN_SESSION), tls.session_server()).is_err());
    assert!(!dial(&tls.link_client(a.id()), &a.router_at("r1", NOW - 4 * DAY), ALPN_LINK));
    let minted = world.stranger.mint(vec![world.uri(a, "/router/r1")], both_usages());
    assert!(!dial(&tls.link_client(a.id()), &minted, ALPN_LINK), "by another CA");

    let introduced = |said: &[Record]| tls.introduced(&router.chain, Usage::Server, said);
    let fresh = statement(a, a, 2, NOW + DAY);
    assert_eq!(introduced(std::slice::from_ref(&fresh)), Ok(()));
    let refused = Err(PeerError::Lapsed { site: a.id(), ago_s: DAY.unsigned_abs() });
    for (why, said) in [
        ("nothing", None),
        ("no newer", Some(statement(a, a, 1, NOW + DAY))),
        ("lapsed as well", Some(statement(a, a, 2, NOW - 1))),
        ("of another", Some(statement(&world.stranger, a, 2, NOW + DAY))),
        ("unsigned", Some(Record { signature: vec![0; 64].into(), ..fresh.clone() })),
    ] {
        assert_eq!(introduced(said.as_slice()), refused, "{why}");
    }
    // Whoever stole the CA that was replaced since can repeat what the site said, but is not of it.
    let replaced = introduced(&[statement(a, &world.stranger, 2, NOW + DAY)]);
    assert!(matches!(replaced, Err(PeerError::WrongIssuer { .. })), "{replaced:?}");

    let revoked = TrustView { revoked: [a.id()].into(), ..(*world.trust.view()).clone() };
    world.trust.publish(Arc::new(revoked));
    assert!(!dial(&tls.link_client(a.id()), &router, ALPN_LINK));
    assert_eq!(introduced(&[fresh]), Err(PeerError::Revoked(a.id())));
}

#[test]
fn identity_is_that_of_the_leaf() {
    let world = World::new();
    let connected =
        handshake(world.a.router("r1").client(ALPN_LINK), world.tls.port_server()).unwrap();
    let chain = connected.server.peer_certificates();
    let Ok(Admitted::Link(peer)) = admit(connected.server.alpn_protocol(), chain) else {
        panic!("a link was expected");
    };
    assert_eq!(peer.site, world.a.id());
    assert_eq!(peer.router, Some(router_of(&world.a)));
    assert_eq!(peer.router_name(), Some("r1"));
    assert_eq!(peer_identity(chain.unwrap()), Ok(peer));
}

#[test]
fn nobody_gets_past_the_port_as_a_link_without_certificate() {
    let world = World::new();
    let connected = handshake(anonymous_client(ALPN_LINK), world.tls.port_server()).unwrap();
    let admitted = admit(connected.server.alpn_protocol(), connected.server.peer_certificates());
    assert_eq!(admitted, Err(PeerError::Missing));

    let connected = handshake(anonymous_client(ALPN_CLAIM), world.tls.port_server()).unwrap();
    let admitted = admit(connected.server.alpn_protocol(), connected.server.peer_certificates());
    assert_eq!(admitted, Ok(Admitted::Claim));

    assert!(handshake(anonymous_client(ALPN_LINK), world.tls.link_server()).is_err());
    assert!(handshake(anonymous_client(ALPN_SESSION), world.tls.session_server()).is_err());
    assert!(handshake(anonymous_client(b"h2"), world.tls.port_server()).is_err());
    assert!(matches!(admit(None, None), Err(PeerError::Protocol(_))));
}

#[test]
fn refusals_say_what_is_wrong() {
    let world = World::new();
    let refusal = |presented: &Presented| {
        let dialled = world.tls.link_client(world.a.id());
        assert!(!dial(&dialled, presented, ALPN_LINK));
        dialled.refusal().cloned().unwrap()
    };
    assert_eq!(
        refusal(&world.b.router("r1")),
        PeerError::WrongSite { expected: world.a.id(), presented: world.b.id() }
    );
    // The leaf lives 72 h, so four days after its issue it has been dead for one.
    let ago_s = u64::try_from(DAY).unwrap();
    assert_eq!(refusal(&world.a.router_at("r1", NOW - 4 * DAY)), PeerError::Expired { ago_s });
    assert_eq!(
        refusal(&world.a.router_at("r1", NOW + 2 * 3600)),
        PeerError::NotYetValid { in_s: 3600 }
    );
    let web_server = self_signed(vec![SanType::DnsName("example.org".try_into().unwrap())]);
    assert!(matches!(refusal(&web_server), PeerError::NotSkein { .. }));
    let minted = world.b.mint(vec![uri(&own_uri(&world.a))], both_usages());
    let PeerError::WrongIssuer { issuer, .. } = refusal(&minted) else { panic!("wrong issuer") };
    assert!(issuer.contains(&world.b.id().short()), "{issuer}");

    world.trust.publish(Arc::new(TrustView::empty(world.b.id())));
    assert_eq!(refusal(&world.a.router("r1")), PeerError::UnknownSite(world.a.id()));
    let mut revoked = TrustView::clone(&view(&world.b, &[&world.a]));
    revoked.revoked.insert(world.a.id());
    world.trust.publish(Arc::new(revoked));
    assert_eq!(refusal(&world.a.router("r1")), PeerError::Revoked(world.a.id()));
}

#[test]
fn a_certificate_is_judged_by_the_clock_of_the_moment() {
    let world = World::new();
    let router = world.a.router("r1");
    assert!(dial(&world.tls.link_client(world.a.id()), &router, ALPN_LINK));
    world.clock.0.store(NOW + 4 * DAY, Ordering::Relaxed);
    assert!(!dial(&world.tls.link_client(world.a.id()), &router, ALPN_LINK));
}

#[test]
fn both_cas_of_a_rotation_are_good() {
    let world = World::new();
    let new_ca = Site { ca: rotated(world.a.id()), identity: Site::new().identity };
    let mut both = TrustView::clone(&view(&world.b, &[&world.a]));
    let mut site = (*both.sites[&world.a.id()]).clone();
    site.anchors.push(new_ca.ca.certificate().as_ref().into());
    both.sites.insert(world.a.id(), Arc::new(site));
    world.trust.publish(Arc::new(both));
    for ca in [&world.a, &new_ca] {
        assert!(dial(&world.tls.link_client(world.a.id()), &ca.router("r1"), ALPN_LINK));
    }
}

fn rotated(site: SiteId) -> skein_trust::SiteCa {
    skein_trust::SiteCa::generate(site, &aws_lc_rs::rand::SystemRandom::new(), NOW).unwrap()
}

#[test]
fn a_renewed_certificate_needs_no_new_configuration() {
    let world = World::new();
    let cell = IdentityCell::empty();
    let time = Arc::clone(&world.clock);
    let tls = RouterTls::new(TrustCell::new(view(&world.a, &[&world.b])), Arc::clone(&cell), time);
    let server = tls.session_server();
    let dial_it = || {
        let dialled = world.tls.session_client(router_of(&world.a));
        handshake(dialled.config, Arc::clone(&server))
    };
    assert!(dial_it().is_err(), "no certificate yet");
    for _ in 0..2 {
        let fresh = world.a.router("r1");
        cell.replace(fresh.identity());
        let connected = dial_it().unwrap();
        assert_eq!(connected.client.peer_certificates().unwrap()[0], fresh.chain[0]);
    }
}

#[test]
fn nothing_is_resumed_and_the_key_exchange_is_hybrid() {
    let world = World::new();
    let time = Arc::clone(&world.clock);
    let identity = IdentityCell::new(world.a.router("r1").identity());
    let server = RouterTls::new(TrustCell::new(view(&world.a, &[&world.b])), identity, time)
        .session_server();
    let dialled = world.tls.session_client(router_of(&world.a));
    for _ in 0..2 {
        let connected = handshake(Arc::clone(&dialled.config), Arc::clone(&server)).unwrap();
        assert_eq!(connected.client.handshake_kind(), Some(rustls::HandshakeKind::Full));
        assert_eq!(connected.server.received_resumption_data(), None);
        let group = connected.client.negotiated_key_exchange_group().unwrap();
        assert_eq!(group.name(), rustls::NamedGroup::X25519MLKEM768);
    }
}

#[test]
fn claims_run_over_tls_to_the_pinned_ca_whatever_carries_them() {
    let world = World::new();
    let controller = world.a.controller();
    let time = Arc::clone(&world.clock);
    let server = claim_server(controller.chain.clone(), controller.key.clone_key(), time).unwrap();
    let claim = |issuer, pin| {
        let time = Arc::clone(&world.clock);
        handshake(claim_client(issuer, pin, time).config, Arc::clone(&server))
    };
    let pin = CaPin::of(world.a.ca.certificate());
    assert!(claim(world.a.id(), pin).is_ok());
    assert!(claim(world.b.id(), pin).is_err(), "another issuer");
    assert!(claim(world.a.id(), CaPin::of(world.b.ca.certificate())).is_err(), "another pin");
    // A pin of the leaf does not make the leaf an anchor.
    assert!(claim(world.a.id(), CaPin::of(&controller.chain[0])).is_err());

    let carrier = claim_carrier_client(Arc::clone(&world.clock) as _);
    assert!(dial(&carrier, &world.stranger.router("r1"), ALPN_CLAIM));
}

#[test]
fn a_key_that_does_not_fit_its_certificate_is_no_identity() {
    let world = World::new();
    let (one, other) = (world.a.router("r1"), world.a.router("r1"));
    let swapped = skein_trust::RouterIdentity::new(one.chain, other.key);
    assert!(matches!(swapped, Err(skein_trust::RouterIdentityError::Key(_))));
}
