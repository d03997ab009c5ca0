//! Redeems tokens that were applied as resources. One whose issuer this site has a link to is redeemed.

use std::{sync::Arc, time::Duration};

use skein_api::{AccessTokenSpec, Phase, ResourceStatus, Token};
use tokio::time::Instant;

use crate::{
    claim::client::{self, RedeemError, Redeemed, Wish},
    clock,
    controller::{Controller, State},
};

/// How long after an attempt that may succeed later the next one is made.
const RETRY_AFTER: Duration = Duration::from_secs(10);

/// How far an applied token is.
#[derive(Clone, Debug)]
pub(crate) struct Redeeming {
    why: String,
    /// `None`: another attempt would end in the same way.
    retry_at: Option<Instant>,
}

/// Redeems one token after the other until the controller ends.
///
/// # Cancel safety
/// Dropping it loses nothing: a claim that was accepted is answered in the same way again.
pub(crate) async fn run(controller: Arc<Controller>) {
    let mut changes = controller.changes();
    loop {
        changes.mark_unchanged();
        let next = next(&controller.state());
        let waiting = async {
            match next {
                Some((name, spec)) => redeem(&controller, name, spec).await,
                None => {
                    // A deadline passes without a change.
                    let _ = tokio::time::timeout(RETRY_AFTER, changes.changed()).await;
                }
            }
        };
        tokio::select! {
            () = controller.shutdown.cancelled() => return, // cancel-safe
            () = waiting => {} // dropped only when the process ends
        }
    }
}

fn next(state: &State) -> Option<(String, AccessTokenSpec)> {
    let now = clock::instant();
    let is_due = |name: &str| {
        let tried = state.redeeming.get(name);
        tried.is_none_or(|tried| tried.retry_at.is_some_and(|at| at <= now))
    };
    let tokens = state.resources.tokens.values();
    let mut due = tokens
        .filter(|token| is_due(&token.metadata.name) && link_of(state, &token.spec).is_none());
    due.next().map(|token| (token.metadata.name.clone(), token.spec.clone()))
}

/// The link that redeeming the token made.
fn link_of<'a>(state: &'a State, spec: &AccessTokenSpec) -> Option<&'a str> {
    let issuer = spec.token.parse::<Token>().ok()?.issuer.to_string();
    let mut links = state.resources.links.values().filter(|link| link.spec.peer == issuer);
    links.next().map(|link| link.metadata.name.as_str())
}

async fn redeem(controller: &Controller, name: String, spec: AccessTokenSpec) {
    let (link_name, cost, merge) = (spec.link_name, spec.cost, spec.merge);
    let (consume, provide) = (spec.consume, spec.provide);
    let wish = Wish { name: link_name, cost, merge, consume, provide, dial_timeout: None };
    let redeemed = client::redeem(controller, &spec.token, &wish).await;
    let mut state = controller.state();
    match redeemed {
        Ok(Redeemed { link, notes }) => {
            tracing::info!(token = name, link, ?notes, "an applied token is redeemed");
            state.redeeming.remove(&name);
        }
        Err(error) => {
            tracing::warn!(token = name, %error, "an applied token is not redeemed");
            let may_succeed = matches!(
                error,
                RedeemError::Unreachable { .. } | RedeemError::Unsaved(_) | RedeemError::Store(_)
            );
            let retry_at = may_succeed.then(|| clock::instant() + RETRY_AFTER);
            // It may have been deleted meanwhile.
            if state.resources.tokens.contains_key(&name) {
                state.redeeming.insert(name, Redeeming { why: error.to_string(), retry_at });
            }
        }
    }
    drop(state);
    controller.touch();
}

/// The `status` of an AccessToken.
pub(crate) fn status(state: &State, name: &str) -> ResourceStatus {
    let token = state.resources.tokens.get(name);
    let link = token.and_then(|token| link_of(state, &token.spec));
    let (phase, message) = match (link, state.redeeming.get(name)) {
        (Some(link), _) => (Phase::Ready, format!("redeemed: see link {link}")),
        (None, Some(tried)) if tried.retry_at.is_none() => (Phase::Error, tried.why.clone()),
        (None, Some(tried)) => (Phase::Pending, tried.why.clone()),
        (None, None) => (Phase::Pending, "being redeemed".to_owned()),
    };
    ResourceStatus { phase, message, conditions: Vec::new() }
}
