//! Answers claims. Everything before the proof of identity is bounded in time, bytes and number.

use std::{io, sync::Arc, time::Duration};

use parking_lot::Mutex;
use prost::Message as _;
use rustls::ServerConfig;
use skein_core::SiteId;
use skein_site_core::{Admission, Endorsed, Grant, GrantRefusal, Redemption};
use skein_trust::{
    CLAIM_EXPORTER_LABEL, CLAIM_RECORDS_MAX, CLAIM_REQUEST_LEN_MAX, CLAIM_RESPONSE_LEN_MAX,
    KeyRequest, VerifiedClaim, claim_server, verify_claim,
};
use skein_wire::proto::claim::{
    ClaimAccepted, ClaimRefused, ClaimResponse, claim_refused::Reason, claim_response::Outcome,
};
use tokio::{net::UnixStream, sync::Semaphore, time::Instant};
use tokio_rustls::TlsAcceptor;

use crate::{
    claim::{read_delimited, time, write_delimited},
    clock,
    controller::{Controller, State},
    net::Acceptor,
    record,
    store::{Change, StoreError},
};

/// For the claim itself, at most 64 KiB. Redeemers keep connections that lost the race open while another one is answered.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(3);
/// From the first byte to the answer.
const CLAIM_TIMEOUT: Duration = Duration::from_secs(10);
/// For the handshake: a redeemer has its token in hand and nothing to wait for, so whoever is silent holds no slot for long.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(3);
/// Claims at once: each is a handshake's worth of work, and the rest wait in the socket's backlog.
const CLAIMS_MAX: usize = 64;
/// The certificate lives three days; a daily one survives any clock a redeemer may have within reason.
const CERTIFICATE_RENEWED_S: u64 = 86_400;
/// A failing accept (out of descriptors) must not spin.
const ACCEPT_BACKOFF: Duration = Duration::from_millis(100);

/// Accepts claims until the controller ends.
///
/// # Cancel safety
/// Dropping it ends claims that are under way; what was consumed is persisted, and the redeemer asks again.
pub(crate) async fn serve(controller: Arc<Controller>, mut listener: Acceptor) {
    let permits = Arc::new(Semaphore::new(CLAIMS_MAX));
    let certificate = Arc::new(Certificate::default());
    loop {
        let permit = Arc::clone(&permits).acquire_owned().await.expect("invariant: never closed");
        let accepted = tokio::select! {
            () = controller.shutdown.cancelled() => return, // cancel-safe
            accepted = listener.accept() => accepted, // cancel-safe
        };
        match accepted {
            Ok(stream) => {
                let (controller, certificate) = (Arc::clone(&controller), Arc::clone(&certificate));
                let tasks = controller.tasks.clone();
                tasks.spawn(async move {
                    let answered = answer(&controller, &certificate, stream);
                    match tokio::time::timeout(CLAIM_TIMEOUT, answered).await {
                        Ok(Ok(())) => {}
                        // A redeemer tries several ways at once and drops all but one.
                        Ok(Err(error)) => tracing::debug!(%error, "a claim ended early"),
                        Err(_) => tracing::info!("a claim took too long"),
                    }
                    drop(permit);
                });
            }
            Err(error) => {
                tracing::warn!(%error, "cannot accept a claim");
                tokio::time::sleep(ACCEPT_BACKOFF).await;
            }
        }
    }
}

/// The certificate under which claims are answered, made when first needed.
#[derive(Debug, Default)]
struct Certificate(Mutex<Option<(Arc<ServerConfig>, Instant)>>);

impl Certificate {
    fn config(&self, controller: &Controller) -> io::Result<Arc<ServerConfig>> {
        let mut cached = self.0.lock();
        if let Some((config, made)) = cached.as_ref()
            && made.elapsed().as_secs() < CERTIFICATE_RENEWED_S
        {
            return Ok(Arc::clone(config));
        }
        let key = KeyRequest::generate().map_err(io::Error::other)?;
        let issued = controller
            .ca
            .issue_controller(key.csr(), &controller.random, clock::unix_s())
            .map_err(io::Error::other)?;
        let config =
            claim_server(issued.chain, key.private_key(), time()).map_err(io::Error::other)?;
        *cached = Some((Arc::clone(&config), clock::instant()));
        Ok(config)
    }
}

async fn answer(
    controller: &Controller,
    certificate: &Certificate,
    stream: UnixStream,
) -> io::Result<()> {
    let acceptor = TlsAcceptor::from(certificate.config(controller)?);
    let mut tls = tokio::time::timeout(HANDSHAKE_TIMEOUT, acceptor.accept(stream)).await??;
    let (_, connection) = tls.get_ref();
    let exporter = connection
        .export_keying_material([0; 32], CLAIM_EXPORTER_LABEL, None)
        .map_err(io::Error::other)?;
    let request =
        tokio::time::timeout(REQUEST_TIMEOUT, read_delimited(&mut tls, CLAIM_REQUEST_LEN_MAX))
            .await??;
    let outcome = match verify_claim(&request, controller.site, &exporter, clock::unix_s()) {
        Ok(claim) => controller.redeemed(&claim),
        Err(error) => {
            tracing::info!(%error, "a claim is refused");
            refused(error.reason(), error.to_string())
        }
    };
    let response = ClaimResponse { outcome: Some(outcome) };
    write_delimited(&mut tls, &response).await?;
    // Close properly, so that the last bytes are not lost in a reset.
    tokio::io::AsyncWriteExt::shutdown(&mut tls).await
}

fn refused(reason: Reason, detail: String) -> Outcome {
    Outcome::Refused(ClaimRefused { reason: reason.into(), detail, unix_s: clock::unix_s() })
}

impl Controller {
    /// Decides on a proven claim. What it consumes is on disk before it returns.
    pub(crate) fn redeemed(&self, claim: &VerifiedClaim) -> Outcome {
        let mut state = self.state();
        let outcome = self.admit(&mut state, claim);
        if matches!(outcome, Outcome::Accepted(_)) {
            self.refresh(&mut state);
        }
        drop(state);
        if let Outcome::Refused(refused) = &outcome {
            tracing::info!(
                redeemer = %claim.redeemer.site,
                reason = refused.reason().as_str_name(),
                detail = refused.detail,
                "a claim is refused"
            );
        }
        outcome
    }

    fn admit(&self, state: &mut State, claim: &VerifiedClaim) -> Outcome {
        let code = data_encoding::HEXLOWER;
        let known = |grant: &&Grant| {
            code.decode(grant.code_sha256.as_bytes())
                .ok()
                .and_then(|hash| <[u8; 32]>::try_from(hash).ok())
                .is_some_and(|hash| skein_trust::CodeHash(hash).matches(&claim.code))
        };
        let Some(grant) = state.grants.values().find(known).cloned() else {
            return refused(Reason::UnknownCode, "no such token, or it was deleted".to_owned());
        };
        let (terms, redeemer) = (&grant.terms, claim.redeemer.site);
        if state.is_revoked(self.site, redeemer) {
            return refused(Reason::Revoked, "this site is revoked in the network".to_owned());
        }
        let is_foreign =
            claim.merge || terms.is_foreign(claim.redeemer.network_id, state.network(self.site));
        if is_foreign && !terms.guest && !terms.merge {
            let detail = "the redeemer belongs to another network".to_owned();
            return refused(Reason::OtherNetwork, detail);
        }
        let redeemed = |used: &&Redemption| used.site == redeemer.to_string();
        let redeemed_at = grant.redemptions.iter().find(redeemed).map(|used| used.at_unix_s);
        let is_put_out = |known: &Endorsed| {
            known.withdrawn && redeemed_at.is_some_and(|at| at <= known.signed_unix_s)
        };
        let name = &claim.redeemer.statement.name;
        let admission = grant.admit(redeemer, name, clock::unix_s());
        let (consumed, endorsed) = match admission {
            Err(GrantRefusal::Expired) => {
                return refused(Reason::Expired, GrantRefusal::Expired.to_string());
            }
            Err(GrantRefusal::UsedUp) => {
                return refused(Reason::UsedUp, GrantRefusal::UsedUp.to_string());
            }
            // Whatever the grant says by now: a use gives once.
            Ok(Admission::Repeat) | Err(GrantRefusal::PutOut)
                if state.endorses(redeemer).is_some() =>
            {
                (None, None)
            }
            Ok(Admission::Repeat) if state.endorsed.get(&redeemer).is_some_and(is_put_out) => {
                return refused(Reason::Revoked, GrantRefusal::PutOut.to_string());
            }
            Err(GrantRefusal::PutOut) => {
                return refused(Reason::Revoked, GrantRefusal::PutOut.to_string());
            }
            Ok(Admission::Repeat) => (None, self.redeemer_endorsed(state, claim, &grant)),
            Ok(Admission::Consume(next)) => {
                (Some(next), self.redeemer_endorsed(state, claim, &grant))
            }
        };
        state.learned.learn(claim.records.to_vec(), clock::unix_s());
        // The redeemer takes the answer for lasting, so all it rests on is on disk first.
        let kept = self
            .keep_redemption(state, redeemer, consumed, endorsed)
            .and_then(|()| self.save_what_was_learned(state));
        if let Err(error) = kept {
            tracing::error!(%error, "a claim cannot be answered");
            return refused(Reason::Unavailable, "the issuer cannot save its state".to_owned());
        }
        self.accepted(state, redeemer)
    }

    /// Uses a grant up and endorses, both or neither.
    fn keep_redemption(
        &self,
        state: &mut State,
        redeemer: SiteId,
        consumed: Option<Grant>,
        endorsed: Option<Endorsed>,
    ) -> Result<(), StoreError> {
        let put_grant = consumed.iter().map(|grant| Change::PutGrant(Box::new(grant.clone())));
        let put_endorsed = endorsed.iter().map(|said| Change::PutEndorsed(Box::new(said.clone())));
        self.store.commit(&put_grant.chain(put_endorsed).collect::<Vec<_>>())?;
        if let Some(grant) = consumed {
            tracing::info!(grant = grant.name, %redeemer, "token redeemed");
            state.grants.insert(grant.name.clone(), grant);
        }
        if let Some(endorsed) = endorsed {
            state.endorsed.insert(redeemer, endorsed);
        }
        Ok(())
    }

    /// What is to be said of a redeemer, signed; `None` where what was said stands.
    fn redeemer_endorsed(
        &self,
        state: &State,
        claim: &VerifiedClaim,
        grant: &Grant,
    ) -> Option<Endorsed> {
        let (terms, redeemer) = (&grant.terms, claim.redeemer.site);
        let known = state.endorses(redeemer);
        // A member that redeems a guest's token stays a member.
        if known.is_some_and(|known| !known.guest || (terms.guest && known.origin == grant.name)) {
            return None;
        }
        let mut endorsed = Endorsed {
            site: redeemer.to_string(),
            site_name: claim.redeemer.statement.name.clone(),
            guest: terms.guest,
            consume: terms.consume.clone(),
            provide: terms.provide.clone(),
            transit: terms.transit,
            may_endorse: !terms.guest,
            withdrawn: false,
            sequence: 0,
            signed_unix_s: 0,
            record: Default::default(),
            origin: grant.name.clone(),
            restored: false,
        };
        self.sign_next(state, redeemer, &mut endorsed);
        Some(endorsed)
    }

    fn accepted(&self, state: &State, redeemer: SiteId) -> Outcome {
        let statement = record::from_text(&state.site.statement.record);
        let endorsed = state.endorsed.get(&redeemer);
        let endorsement = endorsed.and_then(|endorsed| record::from_text(&endorsed.record));
        let mut accepted = ClaimAccepted {
            statement,
            endorsement,
            records: Vec::new(),
            endpoints: state.advertise(),
            network_id: state.network(self.site).0.to_vec(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            authorities: state
                .site
                .authorities
                .iter()
                .filter_map(|text| SiteId::parse(text))
                .map(|site| site.0.to_vec())
                .collect(),
        };
        // A head start only: the link brings the rest, so what does not fit is left out.
        // A guest has no business with the other sites.
        if endorsed.is_none_or(|endorsed| endorsed.guest) {
            return Outcome::Accepted(accepted);
        }
        let mut len = accepted.encoded_len();
        for record in self.records(state).into_iter().take(CLAIM_RECORDS_MAX) {
            len += record.encoded_len() + 8;
            if len > CLAIM_RESPONSE_LEN_MAX / 2 {
                break;
            }
            accepted.records.push(record);
        }
        Outcome::Accepted(accepted)
    }
}
