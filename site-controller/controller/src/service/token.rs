//! Tokens: making them, and redeeming them until the link is up.

use std::{sync::Arc, time::Duration};

use skein_api::{
    AccessGrantSpec, Duration as ApiDuration, GuestScope, Manifest, Phase, Resource, Token,
};
use skein_site_core::{Grant, Terms, status};
use skein_trust::{CaPin, Code};
use skein_wire::proto::site::{CreateTokenReply, CreateTokenRequest, Progress, RedeemTokenRequest};
use tonic::Status;

use crate::{
    claim::client::{self, RedeemError, Redeemed, Wish},
    clock,
    controller::{Controller, State},
    service::{ProgressSender, failed},
    store::Change,
};

/// Grants kept at once; expired ones make room.
const GRANTS_MAX: usize = 1_000;
/// How long a link may take to come up unless the user says otherwise.
const DEFAULT_TIMEOUT: Duration = Duration::from_secs(60);
/// Longest wait a user can ask for.
const TIMEOUT_MAX: Duration = Duration::from_secs(86_400);

impl Controller {
    /// Makes a grant and its token. The code is in the token only; here stays its hash.
    pub(crate) fn create_token(
        &self,
        request: &CreateTokenRequest,
    ) -> Result<CreateTokenReply, Status> {
        let code = Code::generate(&self.random).map_err(|e| Status::internal(e.to_string()))?;
        let mut state = self.state();
        let endpoints = state.advertise();
        if endpoints.is_empty() {
            return Err(Status::failed_precondition(
                "this site listens nowhere, so nobody could redeem a token; make it at a site that listens, or run `skctl init --listen [::]:7443`",
            ));
        }
        self.forget_old_grants(&mut state, clock::unix_s());
        let spec = wanted(request, &state)?;
        if state.grants.len() >= GRANTS_MAX {
            return Err(Status::resource_exhausted(format!(
                "{GRANTS_MAX} tokens are valid already; delete some with `skctl token delete`"
            )));
        }
        let name = match (request.grant.as_str(), request.name.as_str()) {
            ("", "") => format!("token-{}", data_encoding::HEXLOWER.encode(&code.hash().0[..4])),
            ("", name) | (name, _) => name.to_owned(),
        };
        let manifest = Manifest::new(name.clone(), spec.clone());
        manifest.validate().map_err(|invalids| Status::invalid_argument(invalids.to_string()))?;
        if state.grants.contains_key(&name) {
            return Err(Status::already_exists(format!(
                "there is a token {name:?} already; delete it first, or make one of another name"
            )));
        }
        let now = clock::unix_s();
        let expires_s = i64::try_from(spec.expires.0.as_secs()).unwrap_or(i64::MAX);
        let grant = Grant {
            name: name.clone(),
            code_sha256: data_encoding::HEXLOWER.encode(&code.hash().0),
            created_unix_s: now,
            expires_unix_s: now.saturating_add(expires_s),
            uses: spec.uses,
            terms: Terms::of(&spec, state.network(self.site)),
            redemptions: Vec::new(),
        };
        let token = Token {
            endpoints: endpoints.clone(),
            issuer: self.site,
            issuer_name: state.site_name().to_owned(),
            ca_sha256: CaPin::of(self.ca.certificate()).0,
            code: skein_api::Code::new(code.as_bytes().to_vec())
                .ok_or_else(|| Status::internal("a code has another length"))?,
            network: state.network(self.site),
            expires_unix_s: grant.expires_unix_s,
            uses: spec.uses,
            cost: spec.cost,
            guest: spec.guest,
        };
        let resource = Resource::AccessGrant(manifest);
        let changes = [Change::put(resource.clone()), Change::PutGrant(Box::new(grant.clone()))];
        self.store.commit(&changes).map_err(failed)?;
        state.put(resource);
        state.grants.insert(name.clone(), grant);
        tracing::info!(grant = name, uses = spec.uses, "token created");
        self.touch();
        let warnings = warnings(&state, &endpoints, &spec);
        let (uses, expires_s) = (spec.uses, spec.expires.0.as_secs());
        Ok(CreateTokenReply { token: token.encode(), grant: name, warnings, uses, expires_s })
    }

    /// Grants expired a day ago say nothing any more. Returns whether there were any.
    pub(crate) fn forget_old_grants(&self, state: &mut State, now: i64) -> bool {
        const KEPT_S: i64 = 86_400;
        let before = state.grants.len();
        let old: Vec<String> = state
            .grants
            .values()
            .filter(|grant| now > grant.expires_unix_s.saturating_add(KEPT_S))
            .map(|grant| grant.name.clone())
            .collect();
        for name in old {
            let kind = skein_api::Kind::AccessGrant;
            let changes = [Change::RemoveGrant(name.clone()), Change::Remove(kind, name.clone())];
            let removed = self.store.commit(&changes);
            if let Err(error) = removed {
                tracing::warn!(%error, grant = name, "an old token is not removed");
                continue;
            }
            state.grants.remove(&name);
            state.resources.remove(skein_api::Kind::AccessGrant, &name);
        }
        state.grants.len() < before
    }
}

/// What the grant shall say: what was applied under its name, or what the request says.
fn wanted(request: &CreateTokenRequest, state: &State) -> Result<AccessGrantSpec, Status> {
    if !request.grant.is_empty() {
        let applied = state.resources.grants.get(&request.grant);
        return applied.map(|grant| grant.spec.clone()).ok_or_else(|| {
            Status::not_found(format!(
                "there is no AccessGrant {:?}; see `skctl get accessgrant`",
                request.grant
            ))
        });
    }
    if state.resources.grants.contains_key(&request.name) {
        return Err(Status::already_exists(format!(
            "there is an AccessGrant {0:?} already; for its token use --grant {0}",
            request.name
        )));
    }
    let defaults = AccessGrantSpec::default();
    let scope = GuestScope {
        consume: request.consume.clone(),
        provide: request.provide.clone(),
        transit: request.transit,
    };
    Ok(AccessGrantSpec {
        uses: if request.uses == 0 { defaults.uses } else { request.uses },
        expires: match request.expires_s {
            0 => defaults.expires,
            seconds => ApiDuration::from_secs(seconds),
        },
        cost: if request.cost == 0 { defaults.cost } else { request.cost },
        guest: request.guest,
        merge: request.merge,
        scope: Some(scope).filter(|scope| !scope.is_empty()),
    })
}

/// What may keep others from redeeming a token.
fn warnings(state: &State, endpoints: &[String], spec: &AccessGrantSpec) -> Vec<String> {
    let mut out = Vec::new();
    if spec.guest && spec.scope.as_ref().is_none_or(GuestScope::is_empty) {
        out.push(
            "a guest may do nothing that is not named: with --consume ADDRESS it may reach an address, with --provide ADDRESS serve one"
                .to_owned(),
        );
    }
    let only_private = endpoints.iter().all(|endpoint| {
        endpoint.parse::<std::net::SocketAddr>().is_ok_and(|addr| match addr.ip() {
            std::net::IpAddr::V4(ip) => ip.is_private() || ip.is_loopback(),
            std::net::IpAddr::V6(ip) => ip.is_unique_local() || ip.is_loopback(),
        })
    });
    if only_private {
        out.push(format!(
            "the token names private addresses only ({}); sites elsewhere need `skctl init --advertise HOST`",
            endpoints.join(", ")
        ));
    }
    if !state.routers.values().any(|router| router.session.is_some()) {
        out.push(
            "no router is running, so nobody can redeem it yet; see `skctl status`".to_owned(),
        );
    }
    out
}

/// Share of the user's patience for the endpoints of a token: what became of each is to be told before it ends.
const DIAL_SHARE: f64 = 0.8;

/// Redeems and waits until the router says that the link is up.
pub(super) async fn redeem(
    controller: Arc<Controller>,
    request: RedeemTokenRequest,
    progress: ProgressSender,
) {
    let timeout = match request.timeout_ms {
        0 => DEFAULT_TIMEOUT,
        ms => Duration::from_millis(ms).min(TIMEOUT_MAX),
    };
    let wish = Wish {
        name: Some(request.name.clone()).filter(|name| !name.is_empty()),
        cost: Some(request.cost).filter(|cost| *cost > 0),
        merge: request.merge,
        consume: request.consume.clone(),
        provide: request.provide.clone(),
        dial_timeout: Some(timeout.mul_f64(DIAL_SHARE)),
    };
    let mut last = "redeeming the token".to_owned();
    let work = async {
        step(&progress, &last).await;
        let Redeemed { link: name, notes } =
            match client::redeem(&controller, &request.token, &wish).await {
                Ok(redeemed) => redeemed,
                Err(error) => {
                    return Progress {
                        done: true,
                        // With more patience they might have answered.
                        timed_out: matches!(error, RedeemError::Unreachable { is_cut: true, .. }),
                        error: error.to_string(),
                        ..Progress::default()
                    };
                }
            };
        last = format!("token redeemed; waiting for link {name}");
        step(&progress, &last).await;
        let version = controller.config().borrow().version;
        wait_until_up(&controller, &name, version, &progress, &mut last).await;
        let step = format!("link {name} is up");
        Progress { done: true, step, name, notes, ..Progress::default() }
    };
    let end = match tokio::time::timeout(timeout, work).await {
        Ok(end) => end,
        Err(_) => Progress {
            done: true,
            timed_out: true,
            error: format!("the link is not up in time: {last}"),
            ..Progress::default()
        },
    };
    // Whoever asked may have gone; what was done stays.
    let _ = progress.send(Ok(end)).await;
}

/// What a router said before it had the configuration of this `version` is of another link, or of another peer.
async fn wait_until_up(
    controller: &Controller,
    name: &str,
    version: u64,
    progress: &ProgressSender,
    last: &mut String,
) {
    let mut changes = controller.changes();
    loop {
        changes.mark_unchanged();
        let (status, has_router) = {
            let state = controller.state();
            let attached = state.routers.values().any(|router| router.session.is_some());
            (status::link_status(name, state.statuses_since(version)), attached)
        };
        let now = match status.phase {
            Phase::Ready => return,
            _ if !has_router => "waiting for the router to start".to_owned(),
            _ => status.message,
        };
        if now != *last {
            last.clone_from(&now);
            step(progress, &now).await;
        }
        if changes.changed().await.is_err() {
            return;
        }
    }
}

async fn step(progress: &ProgressSender, text: &str) {
    let message = Progress { step: text.to_owned(), ..Progress::default() };
    // Whoever asked may have gone; the work goes on.
    let _ = progress.send(Ok(message)).await;
}
