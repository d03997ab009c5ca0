//! Redeems a token: dial, prove, keep what came back.

use std::{io, sync::Arc, time::Duration};

use skein_api::{GuestScope, Invalids, LINK_ENDPOINTS_MAX, LinkSpec, Manifest, Resource, Token};
use skein_core::SiteId;
use skein_proxy::{Bypass, Proxy};
use skein_site_core::{Endorsed, next_counter};
use skein_trust::{
    AcceptedClaim, CLAIM_EXPORTER_LABEL, CLAIM_RESPONSE_LEN_MAX, CaPin, ClaimDraft, ClaimError,
    Code, STATEMENT_VALIDITY_S, StatementDraft, VerifiedAnswer, claim_request, verify_answer,
};
use skein_wire::proto::{
    claim::{ClaimRefused, claim_refused::Reason},
    routing::Record,
    trust::Scope,
};

use crate::{
    claim::{
        dial::{Connected, Race},
        read_delimited, write_delimited,
    },
    clock,
    controller::{Controller, State},
    record,
    store::{Change, StoreError},
};

/// Connections on which a claim is tried; the answer may be lost, and asking again burns nothing.
const EXCHANGES_MAX: usize = 4;

/// What the user wants of a token.
#[derive(Clone, Debug, Default)]
pub(crate) struct Wish {
    /// Name of the link; default after the issuer.
    pub(crate) name: Option<String>,
    /// Cost of the link; default the token's.
    pub(crate) cost: Option<u32>,
    /// Whether another network may be joined.
    pub(crate) merge: bool,
    /// With a guest's token: addresses this site will reach, so the issuer may serve them.
    pub(crate) consume: Vec<String>,
    /// With a guest's token: addresses this site serves, so the issuer may reach them.
    pub(crate) provide: Vec<String>,
    /// How long an endpoint may take to answer, so that whoever waits still learns what became of each.
    pub(crate) dial_timeout: Option<Duration>,
}

/// A token that was redeemed.
#[derive(Debug)]
pub(crate) struct Redeemed {
    /// Name of the link made.
    pub(crate) link: String,
    /// What the user should know.
    pub(crate) notes: Vec<String>,
}

/// Why a token was not redeemed. Nothing has changed at this site.
#[derive(Debug, thiserror::Error)]
pub(crate) enum RedeemError {
    #[error("{0}")]
    Token(#[from] skein_api::TokenError),
    #[error("the proxy of the site, spec.proxy.url, {0}")]
    Proxy(skein_proxy::UrlError),
    #[error("this token was made by this very site; redeem it at the site that shall link here")]
    OwnToken,
    #[error(
        "this site belongs to the network of {ours}, the token to the network of {theirs}; to join both, add --merge here and to `skctl token create`, or use a token made with --guest"
    )]
    OtherNetwork { ours: SiteId, theirs: SiteId },
    #[error(
        "the token makes this site a member, which needs no leave for single addresses: --consume and --provide are for tokens made with --guest"
    )]
    NotGuest,
    #[error("{0}")]
    Scope(Invalids),
    #[error("{0:?} cannot name a link; use 1 to 63 of a-z, 0-9 and '-'")]
    Name(String),
    #[error("a link named {0:?} to another site is there already; choose another --name")]
    NameTaken(String),
    #[error(
        "no endpoint of the token can be reached: {failures}; check the address with `skctl doctor` at the issuing site"
    )]
    Unreachable {
        failures: String,
        /// Some might have answered later than the user would wait.
        is_cut: bool,
    },
    #[error("the issuer refuses the token: {0}")]
    Refused(String),
    #[error("the issuer's answer does not hold: {0}")]
    Answer(#[from] ClaimError),
    #[error("this site cannot save its state: {0}; the token was not used, try again")]
    Unsaved(StoreError),
    #[error(
        "the token is redeemed, but this site cannot save that: {0}; run the same command again"
    )]
    Store(#[from] StoreError),
}

/// What is needed for one claim and kept when it is accepted.
struct Prepared {
    token: Token,
    code: Code,
    statement: Record,
    endorsement: Record,
    endorsed: Endorsed,
    merge: bool,
    /// Whether the issuer's network becomes ours.
    joins: bool,
}

/// Redeems `text`.
///
/// # Errors
/// See [`RedeemError`].
///
/// # Cancel safety
/// The claim may have been accepted without being kept; redeeming again gets the same answer.
pub(crate) async fn redeem(
    controller: &Controller,
    text: &str,
    wish: &Wish,
) -> Result<Redeemed, RedeemError> {
    let prepared = controller.prepare_claim(text, wish)?;
    let pin = CaPin(prepared.token.ca_sha256);
    let proxy = controller.proxy()?;
    let (endpoints, issuer) = (&prepared.token.endpoints, prepared.token.issuer);
    let mut race = Race::start(endpoints, issuer, pin, proxy, wish.dial_timeout);
    for _ in 0..EXCHANGES_MAX {
        let Some(connected) = race.next().await else { break };
        let endpoint = connected.endpoint.clone();
        match exchange(controller, &prepared, connected).await {
            Ok(VerifiedAnswer::Accepted(accepted)) => {
                return controller.keep_claim(prepared, *accepted, wish);
            }
            Ok(VerifiedAnswer::Refused(refused)) => {
                return Err(RedeemError::Refused(explain(&refused)));
            }
            Err(ExchangeError::Claim(error)) => return Err(error.into()),
            Err(ExchangeError::Io(error)) => {
                race.failures.add(&endpoint, format!("the claim broke: {error}"));
            }
        }
    }
    Err(RedeemError::Unreachable { failures: race.failures.to_string(), is_cut: race.is_cut })
}

#[derive(Debug, thiserror::Error)]
enum ExchangeError {
    #[error(transparent)]
    Io(#[from] io::Error),
    #[error(transparent)]
    Claim(#[from] ClaimError),
}

async fn exchange(
    controller: &Controller,
    prepared: &Prepared,
    mut connected: Connected,
) -> Result<VerifiedAnswer, ExchangeError> {
    let (_, connection) = connected.stream.get_ref();
    let exporter = connection
        .export_keying_material([0; 32], CLAIM_EXPORTER_LABEL, None)
        .map_err(io::Error::other)?;
    let draft = ClaimDraft {
        code: &prepared.code,
        issuer: prepared.token.issuer,
        statement: prepared.statement.clone(),
        endorsement: prepared.endorsement.clone(),
        merge: prepared.merge,
        unix_s: clock::unix_s(),
    };
    let request = claim_request(&controller.identity, draft, &exporter);
    write_delimited(&mut connected.stream, &request).await?;
    let answer = read_delimited(&mut connected.stream, CLAIM_RESPONSE_LEN_MAX).await?;
    Ok(verify_answer(&answer, prepared.token.issuer, controller.site, clock::unix_s())?)
}

/// The issuer's reason with the next step.
fn explain(refused: &ClaimRefused) -> String {
    let detail = &refused.detail;
    match refused.reason() {
        Reason::UnknownCode => {
            "it does not know it (deleted, or its state was lost); make a new one".to_owned()
        }
        Reason::Expired => "it has expired; make a new one with `skctl token create`".to_owned(),
        Reason::UsedUp => {
            "it has been used by another site; make a new one, or one with --uses N".to_owned()
        }
        Reason::OtherNetwork => format!(
            "{detail}; to join both networks, add --merge to `skctl token create` and to `skctl link`, or use --guest"
        ),
        Reason::OwnToken => "it was made by this very site".to_owned(),
        Reason::Version => format!("{detail}; upgrade the older site"),
        Reason::Unavailable => format!("{detail}; nothing was used up, try again"),
        Reason::Clock => {
            let ours = clock::rfc3339(clock::unix_s());
            let theirs = clock::rfc3339(refused.unix_s);
            format!("{detail}: the clock here says {ours}, there {theirs}; set the wrong one")
        }
        Reason::Revoked | Reason::BadProof | Reason::Unspecified => detail.clone(),
    }
}

impl Controller {
    /// The site's proxy.
    fn proxy(&self) -> Result<Option<Arc<Proxy>>, RedeemError> {
        let state = self.state();
        let site = state.resources.site.as_ref();
        let Some(spec) = site.and_then(|site| site.spec.proxy.as_ref()) else { return Ok(None) };
        let proxy = Proxy {
            url: spec.url.parse().map_err(RedeemError::Proxy)?,
            bypass: Bypass::new(spec.no_proxy.iter().map(String::as_str)),
            credentials_file: spec.credentials_file.as_ref().map(Into::into),
        };
        Ok(Some(Arc::new(proxy)))
    }

    fn prepare_claim(&self, text: &str, wish: &Wish) -> Result<Prepared, RedeemError> {
        let token: Token = text.parse()?;
        let now = clock::unix_s();
        token.check_expiry(now, &clock::rfc3339(token.expires_unix_s))?;
        if token.issuer == self.site {
            return Err(RedeemError::OwnToken);
        }
        let code = Code::from_bytes(token.code.expose())
            .ok_or(skein_api::TokenError::Garbled("its code has another length"))?;
        let mut state = self.state();
        if let Some(name) = &wish.name {
            link_name(&state, &token, Some(name))?;
        }
        check_scope(&token, wish)?;
        let known = state.endorses(token.issuer).cloned();
        let is_joined = known.as_ref().is_some_and(|known| !known.guest);
        let ours = state.network(self.site);
        // Whoever vouches for nobody is alone, and joins whatever it is invited to.
        let is_grown = ours != self.site || state.vouches_for_members();
        let is_other = ours != token.network && !token.guest && !is_joined;
        if is_other && is_grown && !wish.merge {
            return Err(RedeemError::OtherNetwork { ours, theirs: token.network });
        }
        let network = if token.guest || is_joined { ours } else { token.network };
        let counter = self.count_statement(&mut state, now).map_err(RedeemError::Unsaved)?;
        let statement = self.identity.statement(&StatementDraft {
            epoch: counter,
            name: state.site_name().to_owned(),
            ca_certificates: vec![self.ca.certificate().to_vec()],
            endpoints: state.advertise(),
            network_id: Some(network),
            expires_unix_s: now + i64::from(STATEMENT_VALIDITY_S),
        });
        // A member that issued a guest's token stays a member; a guest keeps its scope unless another one is named.
        let mut endorsed = match known {
            Some(known) if is_joined => known,
            Some(known) if token.guest && wish.consume.is_empty() && wish.provide.is_empty() => {
                known
            }
            _ => issuer_endorsed(&token, wish),
        };
        let last = state.endorsed.get(&token.issuer).map_or(0, |known| known.sequence);
        // An earlier claim may have been accepted and its answer lost: what this one says comes after what that one said.
        let sequence = next_counter(last, now).max(counter);
        endorsed.restored = false;
        self.sign_endorsement(token.issuer, &mut endorsed, sequence, now);
        let endorsement =
            record::from_text(&endorsed.record).expect("invariant: it was written just now");
        let merge = is_other && is_grown;
        let joins = !token.guest && (!is_grown || merge);
        Ok(Prepared { token, code, statement, endorsement, endorsed, merge, joins })
    }

    /// Makes the answer last: trust first, then the link that needs it.
    fn keep_claim(
        &self,
        prepared: Prepared,
        accepted: AcceptedClaim,
        wish: &Wish,
    ) -> Result<Redeemed, RedeemError> {
        let Prepared { token, mut endorsed, joins, .. } = prepared;
        let mut state = self.state();
        let name = link_name(&state, &token, wish.name.as_deref())?;
        accepted.issuer.statement.name.clone_into(&mut endorsed.site_name);
        self.store.save_endorsed(&endorsed)?;
        let notes = match &accepted.endorsement.scope {
            Some(scope) if endorsed.guest => guest_notes(&endorsed, scope),
            _ => Vec::new(),
        };
        state.endorsed.insert(token.issuer, endorsed);
        if joins {
            let mut site = state.site.clone();
            site.network = accepted.network_id.to_string();
            for authority in &accepted.authorities {
                let authority = authority.to_string();
                if !site.authorities.contains(&authority) {
                    site.authorities.push(authority);
                }
            }
            self.store.save_site(&site)?;
            state.site = site;
        }
        // Saved before the link is: a link whose peer's statement was lost could never come up again.
        state.learned.learn(accepted.records, clock::unix_s());
        self.save_what_was_learned(&mut state)?;
        let mut endpoints = token.endpoints.clone();
        for endpoint in accepted.endpoints {
            if !endpoints.contains(&endpoint) && endpoints.len() < LINK_ENDPOINTS_MAX {
                endpoints.push(endpoint);
            }
        }
        let cost = wish.cost.unwrap_or(token.cost);
        let spec = LinkSpec { peer: token.issuer.to_string(), endpoints, cost };
        let link = Resource::Link(Manifest::new(name.clone(), spec));
        self.store.commit(&[Change::put(link.clone())])?;
        state.put(link);
        self.refresh(&mut state);
        tracing::info!(link = name, peer = %token.issuer, "token redeemed");
        Ok(Redeemed { link: name, notes })
    }
}

/// Scopes are for guests, and a scope that breaks a rule would be refused by every verifier.
fn check_scope(token: &Token, wish: &Wish) -> Result<(), RedeemError> {
    let (consume, provide) = (wish.consume.clone(), wish.provide.clone());
    let scope = GuestScope { consume, provide, transit: false };
    if !token.guest && !scope.is_empty() {
        return Err(RedeemError::NotGuest);
    }
    let mut invalids = Invalids::default();
    scope.validate(&mut invalids);
    invalids.into_result().map_err(RedeemError::Scope)
}

/// What this site says of the issuer before it knows it. The endorsement floods to the whole of this site's network, so whatever is not
/// named stays closed: a partner serves what this site wants to reach, reaches what this site serves, and carries nothing.
fn issuer_endorsed(token: &Token, wish: &Wish) -> Endorsed {
    Endorsed {
        site: token.issuer.to_string(),
        site_name: token.issuer_name.clone(),
        guest: token.guest,
        consume: wish.provide.clone(),
        provide: wish.consume.clone(),
        transit: false,
        may_endorse: !token.guest,
        withdrawn: false,
        sequence: 0,
        signed_unix_s: 0,
        record: Default::default(),
        origin: "link".to_owned(),
        restored: false,
    }
}

/// What both sides opened to each other, as far as this site is concerned.
fn guest_notes(endorsed: &Endorsed, scope: &Scope) -> Vec<String> {
    let peer = &endorsed.site_name;
    let list = |patterns: &[String]| match patterns {
        [] => "nothing".to_owned(),
        patterns => patterns.join(", "),
    };
    let mut notes = vec![
        format!(
            "this site is a guest of {peer}, which lets it reach {} and serve {}",
            list(&scope.consume),
            list(&scope.provide)
        ),
        format!(
            "{peer} is a guest of this site, which lets it serve {} and reach {}",
            list(&endorsed.provide),
            list(&endorsed.consume)
        ),
    ];
    if endorsed.provide.is_empty() && endorsed.consume.is_empty() {
        notes.push(
            "to open something, run `skctl link` again with --consume ADDRESS for what you want to reach there, and --provide ADDRESS for what may be reached here"
                .to_owned(),
        );
    }
    notes
}

/// The name asked for, or one made of the issuer's. A link to the same site is replaced, another one is not.
fn link_name(state: &State, token: &Token, wanted: Option<&str>) -> Result<String, RedeemError> {
    let peer = token.issuer.to_string();
    let is_free =
        |name: &str| state.resources.links.get(name).is_none_or(|link| link.spec.peer == peer);
    if let Some(name) = wanted {
        if !skein_api::valid_name(name) {
            return Err(RedeemError::Name(name.to_owned()));
        }
        return if is_free(name) {
            Ok(name.to_owned())
        } else {
            Err(RedeemError::NameTaken(name.to_owned()))
        };
    }
    let base = if skein_api::valid_name(&token.issuer_name) { &token.issuer_name } else { "link" };
    if is_free(base) {
        return Ok(base.to_owned());
    }
    // Two sites may have the same name; their ids differ.
    let stem: String = base.chars().take(50).collect();
    Ok(format!("{stem}-{}", token.issuer.short()))
}
