//! What a site may do after its token was redeemed, in the eyes of those who only hear of it.

use std::collections::BTreeMap;

use skein_core::{Address, Evidence, Payload, SiteId, TrustView, evaluate};
use skein_wire::{convert::parse_record, proto::routing::Record};

use super::*;

/// Everybody `local` trusts by what `controllers` say and know.
pub(super) fn view(local: &Controller, controllers: &[&Controller]) -> TrustView {
    let records: Vec<Record> =
        controllers.iter().flat_map(|controller| controller.records(&controller.state())).collect();
    // Of each key the highest sequence counts, as in a router.
    let mut newest: BTreeMap<_, skein_core::Record> = BTreeMap::new();
    for record in records {
        let record = parse_record(&record.body, &record.signature).unwrap();
        if newest.get(&record.key).is_none_or(|known| record.sequence >= known.sequence) {
            newest.insert(record.key, record);
        }
    }
    let mut statements = BTreeMap::new();
    let (mut endorsements, mut revocations) = (Vec::new(), Vec::new());
    for record in newest.values() {
        match &record.payload {
            Payload::SiteStatement(statement) => {
                statements.insert(statement.site, Arc::clone(statement));
            }
            Payload::Endorsement(endorsement) => endorsements.push(endorsement),
            Payload::Revocation(revocation) => revocations.push(revocation),
            _ => {}
        }
    }
    let evidence = Evidence {
        statements: &statements,
        endorsements: &endorsements,
        revocations: &revocations,
        authorities: &[],
    };
    evaluate(local.site, evidence, clock::unix_s()).0
}

/// Whether `site` may provide, consume, and carry transit.
fn rights(view: &TrustView, site: SiteId, address: &str) -> Option<[bool; 3]> {
    let address: Address = address.parse().unwrap();
    let site = view.site(site)?;
    Some([site.may_provide(&address), site.may_consume(&address), site.may_transit()])
}

fn guest_token(issuer: &Site, consume: &[&str], provide: &[&str]) -> rpc::CreateTokenReply {
    let owned = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect();
    let request = rpc::CreateTokenRequest {
        guest: true,
        consume: owned(consume),
        provide: owned(provide),
        ..Default::default()
    };
    issuer.controller.create_token(&request).unwrap()
}

fn refresh(site: &Site) {
    site.controller.refresh(&mut site.controller.state());
}

/// A member of `of`'s network.
async fn member(of: &Site, name: &str) -> Site {
    let site = Site::start(name, None);
    client::redeem(&site.controller, &of.token(1), &Wish::default()).await.unwrap();
    site
}

#[tokio::test]
async fn a_partner_may_do_in_our_network_what_was_named_and_nothing_else() {
    let (partner, ours) = (issuer(), issuer());
    let third = member(&ours, "third").await;
    let token = guest_token(&partner, &[], &[]);
    assert!(token.warnings.iter().any(|text| text.contains("--consume")), "{:?}", token.warnings);
    let token = token.token;
    let redeemed = client::redeem(&ours.controller, &token, &Wish::default()).await.unwrap();
    assert!(redeemed.notes.iter().any(|text| text.contains("serve nothing and reach nothing")));
    let network = [&*ours.controller, &*third.controller, &*partner.controller];
    for here in [&ours, &third] {
        let view = view(&here.controller, &network);
        let rights = rights(&view, partner.controller.site, "db");
        assert_eq!(rights, Some([false, false, false]), "default deny");
    }
    // The other way round it is the same.
    let seen = view(&partner.controller, &network);
    assert_eq!(rights(&seen, ours.controller.site, "db"), Some([false, false, false]));
    assert_eq!(rights(&seen, third.controller.site, "db"), None, "guests do not bring friends");

    let wish = Wish { consume: vec!["db".into()], provide: vec!["web".into()], ..Wish::default() };
    client::redeem(&ours.controller, &token, &wish).await.unwrap();
    let seen = view(&third.controller, &network);
    assert_eq!(rights(&seen, partner.controller.site, "db"), Some([true, false, false]));
    assert_eq!(rights(&seen, partner.controller.site, "web"), Some([false, true, false]));
    for site in [partner, ours, third] {
        site.stop().await;
    }
}

#[tokio::test]
async fn a_guest_gets_the_scope_of_its_token_and_no_word_of_the_others() {
    let hub = issuer();
    let third = member(&hub, "third").await;
    let guest = Site::start("guest", None);
    let token = guest_token(&hub, &["db"], &["orders.*"]).token;
    let wish = Wish { consume: vec!["db".into()], ..Wish::default() };
    client::redeem(&guest.controller, &token, &wish).await.unwrap();
    let known: Vec<String> =
        guest.controller.state().learned.statements().map(|site| site.name).collect();
    assert_eq!(known, ["hub"], "the guest knows who invited it");
    assert_eq!(guest.controller.state().network(guest.controller.site), guest.controller.site);
    let network = [&*hub.controller, &*third.controller, &*guest.controller];
    let seen = view(&third.controller, &network);
    assert_eq!(rights(&seen, guest.controller.site, "db"), Some([false, true, false]));
    assert_eq!(rights(&seen, guest.controller.site, "orders.eu"), Some([true, false, false]));
    let seen = view(&guest.controller, &network);
    assert_eq!(rights(&seen, hub.controller.site, "db"), Some([true, false, false]));

    let wish = Wish { consume: vec!["db".into()], ..Wish::default() };
    let other = client::redeem(&guest.controller, &hub.token(1), &wish).await;
    assert!(matches!(other, Err(RedeemError::NotGuest)), "scopes are for guests");
    for site in [hub, third, guest] {
        site.stop().await;
    }
}

#[test]
fn a_grant_without_its_resource_still_lets_in_guests_only() {
    let (_dir, paths) = listening();
    let request =
        rpc::CreateTokenRequest { guest: true, name: "partner".into(), ..Default::default() };
    let token = silent(&paths, None).create_token(&request).unwrap().token;
    std::fs::remove_file(paths.resources_dir().join("accessgrant.partner.yaml")).unwrap();
    let restarted = silent(&paths, None);
    let leaf = identity();
    let answer = restarted.redeemed(&claim(&restarted, &leaf, &token));
    assert_eq!(reason(&answer), None);
    let endorsed = restarted.state().endorsed[&leaf.site_id()].clone();
    assert!(endorsed.guest && !endorsed.may_endorse, "{endorsed:?}");
}

#[test]
fn a_use_of_a_grant_gives_once_whatever_the_grant_says_later() {
    let (_dir, paths) = listening();
    let hub = silent(&paths, None);
    let request =
        rpc::CreateTokenRequest { guest: true, name: "partner".into(), ..Default::default() };
    let token = hub.create_token(&request).unwrap().token;
    let leaf = identity();
    assert_eq!(reason(&hub.redeemed(&claim(&hub, &leaf, &token))), None);
    hub.state().grants.get_mut("partner").unwrap().terms.guest = false;
    assert_eq!(reason(&hub.redeemed(&claim(&hub, &leaf, &token))), None, "the same answer");
    assert!(hub.state().endorsed[&leaf.site_id()].guest, "a guest has not made itself a member");
}

#[tokio::test]
async fn a_token_outlives_its_issuer_joining_another_network() {
    let (founder, hub) = (issuer(), issuer());
    let token = hub.token(2);
    client::redeem(&hub.controller, &founder.token(1), &Wish::default()).await.unwrap();
    let alone = Site::start("alone", None);
    for _ in 0..2 {
        client::redeem(&alone.controller, &token, &Wish::default()).await.unwrap();
        let network = alone.controller.state().network(alone.controller.site);
        assert_eq!(network, founder.controller.site, "it joins the network its issuer is in now");
    }
    refresh(&alone);
    for site in [founder, hub, alone] {
        site.stop().await;
    }
}

#[test]
fn a_revoked_site_is_told_so() {
    let (_dir, paths) = listening();
    let controller = silent(&paths, None);
    let token = controller.create_token(&rpc::CreateTokenRequest::default()).unwrap().token;
    let (founder, leaf) = (identity(), identity());
    let now = clock::unix_s();
    {
        let mut state = controller.state();
        state.site.network = founder.site_id().to_string();
        state.learned.learn(vec![founder.revocation(leaf.site_id(), 1, now, "stolen")], now);
    }
    let answer = controller.redeemed(&claim(&controller, &leaf, &token));
    assert_eq!(reason(&answer), Some(Reason::Revoked));
    assert!(controller.state().endorsed.is_empty());
}
