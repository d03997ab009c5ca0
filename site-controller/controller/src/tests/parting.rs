//! How sites part: farewells, withdrawn trust, rebuilt sites; and what is applied instead of commanded.

use skein_api::{AccessGrantSpec, AccessTokenSpec, GuestScope, Kind};
use skein_trust::STATEMENT_VALIDITY_S;
use skein_wire::proto::control::{Applied, ConnectorStatus};

use super::*;
use crate::{
    archive,
    site::{CreateError, create_with},
};

fn apply(controller: &Controller, resource: &Resource) -> rpc::ApplyReply {
    let resource = rpc::Resource {
        kind: resource.kind().to_string(),
        name: resource.name().to_owned(),
        json: resource.to_json(),
        ..Default::default()
    };
    controller.apply(rpc::ApplyRequest { resources: vec![resource], ..Default::default() }).unwrap()
}

async fn until(controller: &Controller, holds: impl Fn() -> bool) {
    let mut changes = controller.changes();
    let waiting = async {
        while !holds() {
            changes.changed().await.unwrap();
        }
    };
    tokio::time::timeout(PATIENCE, waiting).await.unwrap();
}

#[tokio::test]
async fn a_site_that_left_is_forgotten() {
    let hub = issuer();
    let leaf = Site::start("leaf", None);
    client::redeem(&leaf.controller, &hub.token(1), &Wish::default()).await.unwrap();
    let (hub_id, leaf_id) = (hub.controller.site, leaf.controller.site);
    hub.controller.say_farewell().unwrap();
    // What the routers would bring.
    let last = crate::record::from_text(&hub.controller.state().site.statement.record).unwrap();
    let now = clock::unix_s();
    {
        let mut state = leaf.controller.state();
        assert!(state.learned.learn(vec![last], now));
        assert!(!leaf.controller.forget(&mut state, now), "until its last word has expired");
        assert!(leaf.controller.forget(&mut state, now + 60));
        assert!(state.endorsed.is_empty() && state.resources.links.is_empty());
    }
    let stored = Store::new(leaf.paths.clone()).load().unwrap();
    assert!(!stored.endorsed.contains_key(&hub_id) && stored.resources.links.is_empty());
    assert!(hub.controller.state().endorsed.contains_key(&leaf_id), "and nobody else");
    for site in [hub, leaf] {
        site.stop().await;
    }
}

#[tokio::test]
async fn what_a_site_says_after_its_claim_is_heard() {
    let hub = issuer();
    let leaf = Site::start("leaf", None);
    client::redeem(&leaf.controller, &hub.token(1), &Wish::default()).await.unwrap();
    let said = |site: &Site| {
        crate::record::from_text(&site.controller.state().site.statement.record).unwrap()
    };
    let learn = |record| hub.controller.state().learned.learn(vec![record], clock::unix_s());
    assert!(learn(said(&leaf)), "that it has joined");
    // Nothing changes at a site that is a member already; and the second has not passed.
    client::redeem(&leaf.controller, &hub.token(1), &Wish::default()).await.unwrap();
    leaf.controller.say_farewell().unwrap();
    assert!(learn(said(&leaf)), "its last word");
    for site in [hub, leaf] {
        site.stop().await;
    }
}

#[tokio::test]
async fn unlink_withdraws_trust_where_asked() {
    let hub = issuer();
    let leaf = Site::start("leaf", None);
    client::redeem(&leaf.controller, &hub.token(1), &Wish::default()).await.unwrap();
    let controllers = [&*hub.controller, &*leaf.controller];
    assert!(trust::view(&leaf.controller, &controllers).site(hub.controller.site).is_some());
    let delete = |withdraw| rpc::DeleteRequest {
        kind: "Link".into(),
        name: "hub".into(),
        withdraw,
        ..Default::default()
    };
    let notes = leaf.controller.delete(&delete(true)).unwrap();
    assert!(notes.iter().any(|note| note.contains("no longer endorses")), "{notes:?}");
    assert!(trust::view(&leaf.controller, &controllers).site(hub.controller.site).is_none());
    assert!(leaf.controller.state().resources.links.is_empty());
    {
        let mut state = leaf.controller.state();
        let now = clock::unix_s();
        assert!(!leaf.controller.forget_expired(&mut state, now), "it must reach everybody");
        let over = now + i64::from(STATEMENT_VALIDITY_S) + 1;
        assert!(leaf.controller.forget_expired(&mut state, over));
    }
    // A new token makes everything good again.
    client::redeem(&leaf.controller, &hub.token(1), &Wish::default()).await.unwrap();
    assert!(trust::view(&leaf.controller, &controllers).site(hub.controller.site).is_some());
    // Where the issuer withdrew its trust, the token that is not expired yet does not bring it back.
    let token = hub.token(1);
    client::redeem(&leaf.controller, &token, &Wish::default()).await.unwrap();
    {
        let mut state = hub.controller.state();
        assert!(hub.controller.withdraw(&mut state, leaf.controller.site).unwrap());
    }
    let again = client::redeem(&leaf.controller, &token, &Wish::default()).await.unwrap_err();
    assert!(again.to_string().contains("withdrawn its trust"), "{again}");
    // A token may outlive the withdrawal.
    {
        let mut state = hub.controller.state();
        let over = clock::unix_s() + i64::from(STATEMENT_VALIDITY_S) + 1;
        assert!(hub.controller.forget_expired(&mut state, over));
        assert!(!state.endorsed.contains_key(&leaf.controller.site));
        state.grants = Store::new(hub.paths.clone()).load().unwrap().grants;
    }
    let again = client::redeem(&leaf.controller, &token, &Wish::default()).await.unwrap_err();
    assert!(again.to_string().contains("withdrawn its trust"), "{again}");
    client::redeem(&leaf.controller, &hub.token(1), &Wish::default()).await.unwrap();
    client::redeem(&leaf.controller, &token, &Wish::default()).await.unwrap();
    for site in [hub, leaf] {
        site.stop().await;
    }
}

#[tokio::test]
async fn a_rebuilt_site_trusts_and_links_as_before() {
    let (hub, leaf) = (issuer(), Site::start("leaf", None));
    client::redeem(&leaf.controller, &hub.token(1), &Wish::default()).await.unwrap();
    leaf.controller.apply(connector("db")).unwrap();
    let exported = leaf.controller.export_identity("correct horse").unwrap();
    let id = leaf.controller.site;
    leaf.stop().await;
    let dir = tempfile::tempdir().unwrap();
    let paths = Paths::new(dir.path().join("state"), dir.path().join("run"));
    let rebuilt = || archive::open(&exported, "correct horse").unwrap();
    let made = create_with(&paths, &InitOptions::default(), Some(rebuilt())).unwrap();
    assert_eq!((made.site_id, made.site.metadata.name.as_str()), (id, "leaf"));
    let leaf = Site::of(paths, dir);
    let controllers = [&*hub.controller, &*leaf.controller];
    assert!(trust::view(&leaf.controller, &controllers).site(hub.controller.site).is_some());
    assert!(trust::view(&hub.controller, &controllers).site(id).is_some());
    let links = leaf.controller.state().resources.links.len();
    assert_eq!((links, leaf.controller.state().resources.connectors.len()), (1, 1));
    leaf.stop().await;
    let (hub, _dir) = hub.stop().await;
    let again = create_with(&hub, &InitOptions::default(), Some(rebuilt()));
    assert!(matches!(again, Err(CreateError::OtherIdentity(_))));
}

#[tokio::test]
async fn trust_withdrawn_after_the_export_stays_withdrawn() {
    let (hub, leaf) = (issuer(), Site::start("leaf", None));
    client::redeem(&leaf.controller, &hub.token(1), &Wish::default()).await.unwrap();
    let exported = leaf.controller.export_identity("correct horse").unwrap();
    let hub_id = hub.controller.site;
    let said = |controller: &Controller| {
        let state = controller.state();
        let endorsed = &state.endorsed[&hub_id];
        (endorsed.sequence, crate::record::from_text(&endorsed.record).unwrap())
    };
    assert!(leaf.controller.withdraw(&mut leaf.controller.state(), hub_id).unwrap());
    let (withdrawn, record) = said(&leaf.controller);
    leaf.stop().await;

    let dir = tempfile::tempdir().unwrap();
    let paths = Paths::new(dir.path().join("state"), dir.path().join("run"));
    let mut rebuilt = archive::open(&exported, "correct horse").unwrap();
    // The back-up is days old.
    for endorsed in &mut rebuilt.kept.endorsed {
        endorsed.signed_unix_s -= 2 * 86_400;
    }
    create_with(&paths, &InitOptions::default(), Some(rebuilt)).unwrap();
    let leaf = silent(&paths, None);
    leaf.refresh(&mut leaf.state());
    assert!(said(&leaf).0 <= withdrawn, "what was said since stands");
    assert!(leaf.state().endorses(hub_id).is_some(), "it has not heard of it");
    assert!(leaf.adopt(&mut leaf.state(), std::slice::from_ref(&record)), "from the others");
    leaf.refresh(&mut leaf.state());
    assert_eq!(said(&leaf), (withdrawn, record));
    assert!(leaf.state().endorses(hub_id).is_none());
    assert!(silent(&paths, None).state().endorses(hub_id).is_none(), "it is on disk");
    hub.stop().await;
}

/// The back-up knows the first endorsement; the subject passes on the renewal that followed and keeps back the withdrawal.
#[tokio::test]
async fn a_renewal_heard_from_others_is_not_believed_to_be_the_last_word() {
    let (hub, leaf) = (issuer(), Site::start("leaf", None));
    client::redeem(&leaf.controller, &hub.token(1), &Wish::default()).await.unwrap();
    let exported = leaf.controller.export_identity("correct horse").unwrap();
    let hub_id = hub.controller.site;
    // A clock that was ahead has left the sequence ahead of the time: nothing of it may be taken for a withdrawal.
    let now = clock::unix_s();
    let said = |sequence: u64, signed_unix_s: i64, withdrawn: bool| {
        let mut endorsed = leaf.controller.state().endorsed[&hub_id].clone();
        endorsed.withdrawn = withdrawn;
        leaf.controller.sign_endorsement(hub_id, &mut endorsed, sequence, signed_unix_s);
        (sequence, crate::record::from_text(&endorsed.record).unwrap())
    };
    let ahead = u64::try_from(now).unwrap() + 10 * 86_400;
    let (renewed, renewal) = said(ahead, now - 2 * 86_400, false);
    let (withdrawn, withdrawal) =
        said(skein_site_core::next_counter(renewed, now), now - 86_400, true);
    leaf.stop().await;

    let dir = tempfile::tempdir().unwrap();
    let paths = Paths::new(dir.path().join("state"), dir.path().join("run"));
    let rebuilt = archive::open(&exported, "correct horse").unwrap();
    create_with(&paths, &InitOptions::default(), Some(rebuilt)).unwrap();
    let leaf = silent(&paths, None);
    leaf.refresh(&mut leaf.state());
    assert!(leaf.adopt(&mut leaf.state(), std::slice::from_ref(&renewal)));
    assert!(leaf.state().endorses(hub_id).is_some(), "a renewal is none");
    for day in 0..7 {
        leaf.state().endorsed.get_mut(&hub_id).unwrap().signed_unix_s = 0;
        leaf.refresh(&mut leaf.state());
        let sequence = leaf.state().endorsed[&hub_id].sequence;
        assert_eq!(sequence, renewed + 1 + day, "renewed below what may have been said since");
        assert!(sequence < withdrawn);
    }
    assert!(leaf.adopt(&mut leaf.state(), std::slice::from_ref(&withdrawal)));
    leaf.refresh(&mut leaf.state());
    assert!(leaf.state().endorses(hub_id).is_none());
    hub.stop().await;
}

#[tokio::test]
async fn grants_and_tokens_can_be_applied() {
    let (hub, leaf) = (issuer(), Site::start("leaf", None));
    let scope = GuestScope { consume: vec!["db".into()], ..GuestScope::default() };
    let spec = AccessGrantSpec { uses: 3, guest: true, scope: Some(scope), ..Default::default() };
    apply(&hub.controller, &Resource::AccessGrant(Manifest::new("fleet", spec.clone())));
    assert!(hub.controller.state().grants.is_empty(), "no token, no way in");
    let request = rpc::CreateTokenRequest { grant: "fleet".into(), ..Default::default() };
    let made = hub.controller.create_token(&request).unwrap();
    assert_eq!((made.grant.as_str(), made.uses, made.expires_s), ("fleet", 3, 900));
    assert!(hub.controller.create_token(&request).is_err(), "one token each");
    let spec = AccessGrantSpec { uses: 1, ..spec };
    apply(&hub.controller, &Resource::AccessGrant(Manifest::new("fleet", spec)));
    assert_eq!(hub.controller.state().grants["fleet"].uses, 1);

    let spec = AccessTokenSpec {
        token: made.token,
        link_name: Some("up".into()),
        cost: None,
        merge: false,
        consume: vec!["db".into()],
        provide: Vec::new(),
    };
    let token = Resource::AccessToken(Manifest::new("to-hub", spec));
    apply(&leaf.controller, &token);
    let controller = &leaf.controller;
    until(controller, || controller.state().resources.links.contains_key("up")).await;
    let applied = controller.get_resources("accesstoken", "to-hub").unwrap();
    assert!(applied[0].json.contains("redeemed"), "{}", applied[0].json.len());
    assert_eq!(apply(controller, &token).changes[0].action, "unchanged");
    let delete = |kind: Kind, name: &str| rpc::DeleteRequest {
        kind: kind.to_string(),
        name: name.into(),
        ..Default::default()
    };
    controller.delete(&delete(Kind::Link, "up")).unwrap();
    assert!(controller.state().resources.tokens.is_empty(), "or it would link again");
    hub.controller.delete(&delete(Kind::AccessGrant, "fleet")).unwrap();
    assert!(Store::new(hub.paths.clone()).load().unwrap().grants.is_empty());
    for site in [hub, leaf] {
        site.stop().await;
    }
}

#[test]
fn a_token_is_made_whole_or_not_at_all() {
    for writes in 0..6 {
        let (_dir, paths) = listening();
        let full = silent(&paths, Some(FullAfter(AtomicUsize::new(writes))));
        let made = full.create_token(&rpc::CreateTokenRequest::default()).is_ok();
        let stored = Store::new(paths).load().unwrap();
        let found = (stored.grants.len(), stored.resources.grants.len());
        assert_eq!(found, if made { (1, 1) } else { (0, 0) }, "{writes} writes");
    }
}

#[tokio::test]
async fn a_dead_router_says_nothing() {
    let site = Site::start("hub", None);
    let mut router = Router::attach(&site.paths, Attach::default()).await;
    router.welcome().await;
    router.tell(from_router::Message::Status(seen("web"))).await;
    router.configured(|config| config.listeners.len() == 1).await;
    assert_eq!(site.controller.state().statuses().count(), 1);
    drop(router);
    let controller = &site.controller;
    until(controller, || controller.state().routers.values().all(|r| r.session.is_none())).await;
    assert_eq!(controller.state().statuses().count(), 0);
    assert_eq!(
        controller.state().known_services(controller.site).len(),
        1,
        "its listeners must not flap"
    );
    site.stop().await;
}

#[tokio::test]
async fn what_drains_is_kept_until_the_router_has_been_told() {
    let site = Site::start("hub", None);
    let controller = &site.controller;
    let mut router = Router::attach(&site.paths, Attach::default()).await;
    router.welcome().await;
    controller.apply(connector("db")).unwrap();
    router.configured(|config| config.connectors.len() == 1).await;
    let status = |config_version, flows_active| {
        let connector = ConnectorStatus { name: "db".into(), flows_active, ..Default::default() };
        let connectors = vec![connector];
        from_router::Message::Status(RouterStatus { config_version, connectors, ..seen("web") })
    };
    let applied =
        |version| from_router::Message::Applied(Applied { version, ..Applied::default() });
    let before = router.version;
    router.tell(applied(before)).await;
    router.tell(status(before, 0)).await;
    until(controller, || controller.state().statuses().count() == 1).await;
    let now = rpc::DeleteRequest {
        kind: "connector".into(),
        name: "db".into(),
        now: true,
        ..Default::default()
    };
    controller.delete(&now).unwrap();
    controller.tick(1);
    assert_eq!(controller.state().draining.len(), 1, "a flow may have begun since that status");
    router.configured(|config| config.connectors.iter().any(|connector| connector.reset)).await;
    // What it saw before it has the new configuration arrives after it said that it has.
    router.tell(applied(router.version)).await;
    router.tell(status(before, 0)).await;
    router.tell(status(router.version, 1)).await;
    let flows = || controller.state().statuses().any(|s| s.connectors[0].flows_active == 1);
    until(controller, flows).await;
    assert_eq!(controller.state().draining.len(), 1, "it still resets them");
    router.tell(status(router.version, 0)).await;
    until(controller, || !flows()).await;
    controller.tick(1);
    assert_eq!(controller.state().draining.len(), 0);
    site.stop().await;
}

#[tokio::test]
async fn a_configuration_that_is_refused_is_a_problem_and_not_sent_again_at_once() {
    let site = Site::start("hub", None);
    let controller = &site.controller;
    let mut router = Router::attach(&site.paths, Attach::default()).await;
    router.welcome().await;
    router.configured(|_| true).await;
    let problems = vec!["too large".to_owned()];
    let refused = Applied { refused: true, problems, ..Applied::default() };
    router.tell(from_router::Message::Applied(refused)).await;
    let is_told = || controller.document("status").unwrap().contains("too large");
    until(controller, is_told).await;
    controller.apply(connector("db")).unwrap();
    let request = CertificateRequest { csr: KeyRequest::generate().unwrap().csr().to_vec() };
    router.tell(from_router::Message::CertificateRequest(request)).await;
    assert!(matches!(router.next().await, to_router::Message::Certificate(_)));
    router.tell(from_router::Message::Applied(Applied { version: 1, ..Applied::default() })).await;
    until(controller, || !is_told()).await;
    site.stop().await;
}
