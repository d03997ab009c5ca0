//! Tokens: who redeems them gets in, once.

use super::*;

#[tokio::test]
async fn a_token_links_two_sites() {
    let hub = issuer();
    let branch = Site::start("branch", None);
    let token = hub.token(1);
    let own = client::redeem(&hub.controller, &token, &Wish::default()).await;
    assert!(matches!(own, Err(RedeemError::OwnToken)));
    let redeemed = client::redeem(&branch.controller, &token, &Wish::default()).await.unwrap();
    assert_eq!(redeemed.link, "hub");
    // The answer may have been lost: the same again is fine.
    client::redeem(&branch.controller, &token, &Wish::default()).await.unwrap();
    {
        let (hub, branch) = (hub.controller.site, branch.controller.state());
        assert_eq!(branch.site.network, hub.to_string());
        assert!(branch.endorsed.contains_key(&hub) && branch.resources.links.len() == 1);
        assert!(branch.learned.iter().count() >= 2, "statement and endorsement of the hub");
    }
    assert!(hub.controller.state().endorsed.contains_key(&branch.controller.site));
    for (site, peer) in [(&hub, "branch"), (&branch, "hub")] {
        let stored = Store::new(site.paths.clone()).load().unwrap();
        let learned = LearnedRecords::new(site.controller.site, stored.learned);
        assert!(learned.statements().any(|of| of.name == peer), "power may be cut from now on");
    }

    let third = Site::start("third", None);
    let used = client::redeem(&third.controller, &token, &Wish::default()).await.unwrap_err();
    assert!(used.to_string().contains("used by another site"), "{used}");
    // The branch belongs to the hub's network now; a third one's token needs --merge.
    let other = issuer();
    let foreign = client::redeem(&branch.controller, &other.token(1), &Wish::default()).await;
    assert!(matches!(foreign, Err(RedeemError::OtherNetwork { .. })));
    for site in [hub, branch, third, other] {
        site.stop().await;
    }
}

#[tokio::test]
async fn what_is_no_skein_endpoint_is_named() {
    let web = listener();
    let addr = web.local_addr().unwrap();
    let mut tasks = JoinSet::new();
    tasks.spawn(async move {
        while let Ok((mut stream, _)) = web.accept().await {
            // The client may be gone already.
            let _ = stream.write_all(b"HTTP/1.1 400 Bad Request\r\n\r\n").await;
        }
    });
    let hub = Site::start("hub", Some(addr));
    let branch = Site::start("branch", None);
    let error =
        client::redeem(&branch.controller, &hub.token(1), &Wish::default()).await.unwrap_err();
    let text = error.to_string();
    assert!(text.contains(&addr.to_string()) && text.contains("not a Skein endpoint"), "{text}");
    assert!(branch.controller.state().resources.links.is_empty());

    let closed = listener().local_addr().unwrap();
    let gone = Site::start("gone", Some(closed));
    let error =
        client::redeem(&branch.controller, &gone.token(1), &Wish::default()).await.unwrap_err();
    assert!(error.to_string().contains("TCP refused"), "{error}");
    for site in [hub, branch, gone] {
        site.stop().await;
    }
}

#[tokio::test]
async fn an_endpoint_that_may_yet_answer_is_told_from_one_that_does_not() {
    // Accepts, and never says a word.
    let silent = listener();
    let hub = Site::start("hub", Some(silent.local_addr().unwrap()));
    let branch = Site::start("branch", None);
    let wish = Wish { dial_timeout: Some(Duration::from_millis(200)), ..Wish::default() };
    let error = client::redeem(&branch.controller, &hub.token(1), &wish).await.unwrap_err();
    assert!(matches!(error, RedeemError::Unreachable { is_cut: true, .. }), "{error}");
    for site in [hub, branch] {
        site.stop().await;
    }
}

#[test]
fn a_token_is_forgotten_a_day_after_it_expired() {
    let (_dir, paths) = listening();
    let controller = silent(&paths, None);
    controller.create_token(&rpc::CreateTokenRequest::default()).unwrap();
    let mut state = controller.state();
    let over = state.grants.values().next().unwrap().expires_unix_s + 86_400;
    assert!(!controller.forget_old_grants(&mut state, over));
    assert!(controller.forget_old_grants(&mut state, over + 1));
    assert!(state.grants.is_empty() && state.resources.grants.is_empty());
    assert!(Store::new(paths).load().unwrap().grants.is_empty());
}

#[test]
fn of_a_thousand_redemptions_at_once_one_succeeds() {
    let (_dir, paths) = listening();
    let controller = silent(&paths, None);
    let token = controller.create_token(&rpc::CreateTokenRequest::default()).unwrap().token;
    let claims: Vec<VerifiedClaim> =
        (0..1_000).map(|_| claim(&controller, &identity(), &token)).collect();
    let accepted = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        for claims in claims.chunks(125) {
            let (controller, accepted) = (&controller, &accepted);
            scope.spawn(move || {
                for claim in claims {
                    match reason(&controller.redeemed(claim)) {
                        None => drop(accepted.fetch_add(1, Ordering::SeqCst)),
                        Some(reason) => assert_eq!(reason, Reason::UsedUp),
                    }
                }
            });
        }
    });
    assert_eq!(accepted.load(Ordering::SeqCst), 1);
    assert_eq!(Store::new(paths).load().unwrap().endorsed.len(), 1);
}

#[test]
fn what_was_answered_was_on_disk_wherever_it_fills_up() {
    let (first, second) = (identity(), identity());
    let mut outcomes = BTreeSet::new();
    for writes in 0..6 {
        let (_dir, paths) = listening();
        let token =
            silent(&paths, None).create_token(&rpc::CreateTokenRequest::default()).unwrap().token;
        let full = silent(&paths, Some(FullAfter(AtomicUsize::new(writes))));
        let answer = full.redeemed(&claim(&full, &first, &token));
        // The machine stops here. What is on disk decides.
        let restarted = silent(&paths, None);
        let consumed = restarted.state().grants.values().any(|grant| !grant.redemptions.is_empty());
        match reason(&answer) {
            None => assert!(consumed && restarted.state().endorsed.contains_key(&first.site_id())),
            Some(reason) => assert_eq!(reason, Reason::Unavailable),
        }
        outcomes.insert(reason(&answer).is_none());
        let again = restarted.redeemed(&claim(&restarted, &first, &token));
        assert_eq!(reason(&again), None, "a lost answer burns nothing ({writes} writes)");
        let other = restarted.redeemed(&claim(&restarted, &second, &token));
        assert_eq!(reason(&other), Some(Reason::UsedUp));
    }
    assert_eq!(outcomes.len(), 2, "both ends of the race were seen");
}

#[test]
fn a_redemption_outlives_a_change_that_was_not_finished() {
    let (_dir, paths) = listening();
    // The journal of the new token and the first of its files find room, the second does not.
    let disk = Arc::new(FullAfter(AtomicUsize::new(2)));
    let loaded = Store::new(paths.clone()).load().unwrap();
    let hub = Controller::new(Store::with_disk(paths.clone(), Arc::clone(&disk) as _), loaded);
    let token = hub.create_token(&rpc::CreateTokenRequest::default()).unwrap().token;
    assert!(paths.state().join("apply.journal").exists());
    // Somebody frees some space.
    disk.0.store(usize::MAX, Ordering::SeqCst);
    assert_eq!(reason(&hub.redeemed(&claim(&hub, &identity(), &token))), None);
    let restarted = silent(&paths, None);
    let other = restarted.redeemed(&claim(&restarted, &identity(), &token));
    assert_eq!(reason(&other), Some(Reason::UsedUp));
    assert_eq!(restarted.state().endorsed.len(), 1);
}
