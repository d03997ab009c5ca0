use super::*;
use proptest::prelude::*;

const NOW: i64 = 1_000;

fn site(n: u8) -> SiteId {
    SiteId([n; 32])
}

fn statement(n: u8, expires_unix_s: i64) -> Arc<SiteStatement> {
    Arc::new(SiteStatement {
        site: site(n),
        inception: Inception { identity_key: [n; 32], next_key_sha256: [0; 32] },
        rotations: Vec::new(),
        epoch: 1,
        name: format!("site-{n}").into(),
        ca_certificates: vec![Arc::from([n])],
        endpoints: Vec::new(),
        expires_unix_s,
        network: site(0),
    })
}

fn endorsement(issuer: u8, subject: u8, membership: Membership, may_endorse: bool) -> Endorsement {
    let scope =
        Scope { provide: [Pattern(format!("from-{issuer}*").into())].into(), ..Scope::default() };
    Endorsement {
        issuer: site(issuer),
        subject: site(subject),
        membership,
        scope: if membership == Membership::Guest { scope } else { Scope::default() },
        may_endorse,
        valid_until_unix_s: NOW + 10,
    }
}

fn revocation(issuer: u8, subject: u8) -> Revocation {
    Revocation {
        issuer: site(issuer),
        subject: site(subject),
        issued_unix_s: 0,
        reason: "test".into(),
    }
}

struct World {
    statements: BTreeMap<SiteId, Arc<SiteStatement>>,
    endorsements: Vec<Endorsement>,
    revocations: Vec<Revocation>,
    authorities: Vec<SiteId>,
}

impl World {
    fn new(sites: u8) -> Self {
        Self {
            statements: (0..sites).map(|n| (site(n), statement(n, NOW + 100))).collect(),
            endorsements: Vec::new(),
            revocations: Vec::new(),
            authorities: Vec::new(),
        }
    }

    fn members(mut self, pairs: &[(u8, u8)]) -> Self {
        let member = |&(a, b): &(u8, u8)| endorsement(a, b, Membership::Member, true);
        self.endorsements.extend(pairs.iter().map(member));
        self
    }

    fn evaluate(&self, local: u8, unix_s: i64) -> (TrustView, Option<i64>) {
        let endorsements: Vec<_> = self.endorsements.iter().collect();
        let revocations: Vec<_> = self.revocations.iter().collect();
        let evidence = Evidence {
            statements: &self.statements,
            endorsements: &endorsements,
            revocations: &revocations,
            authorities: &self.authorities,
        };
        evaluate(site(local), evidence, unix_s)
    }

    /// As numbers.
    fn trusted(&self, local: u8) -> Vec<u8> {
        self.evaluate(local, NOW).0.sites.keys().map(|site| site.0[0]).collect()
    }
}

#[test]
fn members_extend_trust_in_the_direction_of_endorsement() {
    let world = World::new(4).members(&[(0, 1), (1, 2), (3, 0)]);
    assert_eq!(world.trusted(0), [0, 1, 2]);
    assert_eq!(world.trusted(3), [0, 1, 2, 3]);
    assert_eq!(world.trusted(2), [2]);
}

#[test]
fn guests_and_members_without_the_right_do_not_extend_trust() {
    let mut world = World::new(5).members(&[(2, 3)]);
    world.endorsements.push(endorsement(0, 1, Membership::Guest, true));
    world.endorsements.push(endorsement(1, 3, Membership::Member, true));
    world.endorsements.push(endorsement(0, 2, Membership::Member, false));
    assert_eq!(world.trusted(0), [0, 1, 2]);
}

#[test]
fn a_guest_has_the_union_of_its_scopes_and_a_member_no_limits() {
    let mut world = World::new(3).members(&[(0, 1)]);
    world.endorsements.push(endorsement(0, 2, Membership::Guest, false));
    world.endorsements.push(endorsement(1, 2, Membership::Guest, false));
    let guest = Arc::clone(&world.evaluate(0, NOW).0.sites[&site(2)]);
    let may = |text: &str| guest.may_provide(&text.parse().unwrap());
    assert_eq!(guest.membership, Membership::Guest);
    assert_eq!(
        [may("from-0.x"), may("from-1"), may("from-2"), may("x")],
        [true, true, false, false]
    );
    assert!(!guest.may_transit());
    assert!(!guest.may_consume(&"from-0".parse().unwrap()));

    world.endorsements.push(endorsement(1, 2, Membership::Member, false));
    let member = Arc::clone(&world.evaluate(0, NOW).0.sites[&site(2)]);
    assert!(member.may_provide(&"x".parse().unwrap()) && member.may_transit());
}

#[test]
fn revocation_beats_endorsements_and_takes_along_what_hung_on_the_revoked() {
    let mut world =
        World::new(6).members(&[(0, 1), (1, 2), (2, 3), (1, 4), (0, 4), (5, 1), (5, 2)]);
    world.revocations.push(revocation(5, 1));
    assert_eq!(world.trusted(0), [0, 1, 2, 3, 4], "site 5 has no authority over site 0");
    assert_eq!(world.trusted(5), [2, 3, 5], "its own counts for itself");
    world.authorities.push(site(5));
    assert_eq!(world.trusted(0), [0, 4], "now it does");
    world.revocations = vec![revocation(0, 2)];
    assert_eq!(world.trusted(5), [1, 4, 5], "the founder's counts for everybody");
}

#[test]
fn an_authority_that_was_revoked_has_no_say_and_nobody_revokes_us() {
    let mut world = World::new(3).members(&[(1, 0), (1, 2), (2, 1)]);
    world.authorities = vec![site(2)];
    world.revocations = vec![revocation(2, 0), revocation(1, 2), revocation(2, 1)];
    // Site 1 goes by itself first, so site 2 is out before it can speak.
    assert_eq!(world.trusted(1), [0, 1]);
    assert_eq!(world.trusted(2), [2]);
}

#[test]
fn what_has_expired_or_is_unknown_does_not_count() {
    let mut world = World::new(4).members(&[(0, 1), (1, 2), (2, 3), (0, 9)]);
    let (_, next) = world.evaluate(0, NOW);
    assert_eq!(next, Some(NOW + 10));
    assert_eq!(world.evaluate(0, NOW + 10).0.sites.len(), 1, "endorsements are over");
    world.statements.insert(site(1), statement(1, NOW));
    assert_eq!(world.trusted(0), [0], "site 1 says nothing valid, so nothing it signed counts");
    assert_eq!(world.trusted(2), [2, 3]);
}

/// Trust by the definition: repeat until nothing changes.
fn oracle(world: &World, local: u8) -> BTreeSet<SiteId> {
    let judges = [site(local), site(0)];
    let mut revoked = BTreeSet::new();
    for judge in judges {
        if !revoked.contains(&judge) {
            let by_judge = world.revocations.iter().filter(|r| r.issuer == judge);
            revoked.extend(by_judge.map(|r| r.subject).filter(|s| *s != site(local)));
        }
    }
    let known = |s: &SiteId| world.statements.contains_key(s);
    let mut extends = BTreeSet::from([site(local)]);
    let mut trusted = BTreeSet::from([site(local)]);
    for _ in 0..=world.endorsements.len() {
        for e in &world.endorsements {
            if extends.contains(&e.issuer) && !revoked.contains(&e.subject) && known(&e.issuer) {
                trusted.insert(e.subject);
                if e.may_endorse && e.membership == Membership::Member {
                    extends.insert(e.subject);
                }
            }
        }
    }
    trusted.retain(known);
    trusted
}

proptest! {
    #[test]
    fn trust_is_reachability(
        endorsements in prop::collection::vec((0..8_u8, 0..8_u8, any::<bool>(), any::<bool>()), 0..24),
        revocations in prop::collection::vec((0..8_u8, 0..8_u8), 0..4),
        missing in prop::collection::btree_set(0..8_u8, 0..2),
        local in 0..8_u8,
    ) {
        let mut world = World::new(8);
        world.statements.retain(|site, _| !missing.contains(&site.0[0]));
        for (issuer, subject, guest, may_endorse) in endorsements {
            let membership = if guest { Membership::Guest } else { Membership::Member };
            world.endorsements.push(endorsement(issuer, subject, membership, may_endorse));
        }
        world.revocations.extend(revocations.iter().map(|&(a, b)| revocation(a, b)));
        if missing.contains(&local) {
            // Without its own statement the founder is unknown, and so is what it revoked.
            world.revocations.retain(|r| r.issuer != site(0) || local == 0);
        }
        let view = world.evaluate(local, NOW).0;
        let found: BTreeSet<SiteId> = view.sites.keys().copied().collect();
        prop_assert_eq!(found, oracle(&world, local));
    }
}

#[test]
fn of_whom_the_local_site_endorses_the_last_word_is_kept_when_it_lapses() {
    let mut world = World::new(4);
    world.endorsements = vec![
        endorsement(0, 1, Membership::Member, true),
        endorsement(1, 2, Membership::Member, true),
        endorsement(0, 3, Membership::Member, true),
    ];
    for n in [1, 2, 3] {
        world.statements.insert(site(n), statement(n, NOW));
    }
    world.revocations.push(revocation(0, 3));
    let lapsed = world.evaluate(0, NOW).0.lapsed;
    assert_eq!(
        lapsed.keys().collect::<Vec<_>>(),
        [&site(1)],
        "neither a friend's friend nor the revoked"
    );
    world.endorsements[0].valid_until_unix_s = NOW;
    assert!(world.evaluate(0, NOW).0.lapsed.is_empty(), "withdrawn");
}
