//! Grants: who may still redeem a token, decided before anything is written or said.

use serde::{Deserialize, Serialize};
use skein_api::AccessGrantSpec;
use skein_core::SiteId;

/// What a site keeps of a token it made. Everything a redemption depends on is here, in one file: what is lost is lost as a whole, and
/// never turns a guest into a member.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Grant {
    /// Name of the grant.
    pub name: String,
    /// SHA-256 of the code, hexadecimal; the code itself is not kept.
    pub code_sha256: String,
    /// Unix time.
    pub created_unix_s: i64,
    /// Unix time.
    pub expires_unix_s: i64,
    /// How many sites may redeem it.
    pub uses: u32,
    /// As what redeemers are let in.
    pub terms: Terms,
    /// Who has redeemed it.
    pub redemptions: Vec<Redemption>,
}

/// As what redeemers of a grant are let in.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Terms {
    /// As guests, within the lists below; else as members.
    pub guest: bool,
    /// Addresses a guest may reach.
    pub consume: Vec<String>,
    /// Addresses a guest may serve.
    pub provide: Vec<String>,
    /// Whether others' flows may pass through a guest.
    pub transit: bool,
    /// Whether a site of another network may join both.
    pub merge: bool,
    /// The network the token names, a site id: this site may have joined another one since.
    pub network: String,
}

impl Terms {
    /// What a grant's specification says, in the network it is made in.
    #[must_use]
    pub fn of(spec: &AccessGrantSpec, network: SiteId) -> Self {
        let scope = spec.scope.clone().unwrap_or_default();
        Self {
            guest: spec.guest,
            consume: scope.consume,
            provide: scope.provide,
            transit: scope.transit,
            merge: spec.merge,
            network: network.to_string(),
        }
    }

    /// Whether a redeemer that says it belongs to `theirs` is of another network than the one the token names and than `ours`.
    #[must_use]
    pub fn is_foreign(&self, theirs: SiteId, ours: SiteId) -> bool {
        theirs != ours && SiteId::parse(&self.network) != Some(theirs)
    }
}

/// One use of a grant.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Redemption {
    /// Site id of the redeemer.
    pub site: String,
    /// Its name then.
    pub site_name: String,
    /// Unix time.
    pub at_unix_s: i64,
    /// The redeemer has been put out since: this token lets it in no more.
    #[serde(default)]
    pub put_out: bool,
}

/// Why a grant admits nobody more.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum GrantRefusal {
    /// Its time is over.
    #[error("the token has expired")]
    Expired,
    /// Others were first.
    #[error("the token has been used as often as it may be")]
    UsedUp,
    /// This very site was let in by it and put out.
    #[error("the issuer has withdrawn its trust since; ask for a new token")]
    PutOut,
}

/// How a redemption is to be treated.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Admission {
    /// New: persist this before answering.
    Consume(Grant),
    /// The same site redeemed it before, so its answer may have been lost: answer again, consume nothing.
    Repeat,
}

impl Grant {
    /// Decides on a redemption by `redeemer`.
    ///
    /// # Errors
    /// The grant is over. A redeemer that was admitted before is admitted again until expiry, also when the grant is used up.
    pub fn admit(
        &self,
        redeemer: SiteId,
        redeemer_name: &str,
        now_unix_s: i64,
    ) -> Result<Admission, GrantRefusal> {
        if now_unix_s >= self.expires_unix_s {
            return Err(GrantRefusal::Expired);
        }
        let site = redeemer.to_string();
        if let Some(redemption) = self.redemptions.iter().find(|used| used.site == site) {
            let outcome =
                if redemption.put_out { Err(GrantRefusal::PutOut) } else { Ok(Admission::Repeat) };
            return outcome;
        }
        if self.redemptions.len() >= usize::try_from(self.uses).unwrap_or(usize::MAX) {
            return Err(GrantRefusal::UsedUp);
        }
        let mut next = self.clone();
        next.redemptions.push(Redemption {
            site,
            site_name: redeemer_name.to_owned(),
            at_unix_s: now_unix_s,
            put_out: false,
        });
        Ok(Admission::Consume(next))
    }

    /// The same grant, by which `site` does not come back; `None` if it never came by it.
    #[must_use]
    pub fn without(&self, site: SiteId) -> Option<Self> {
        let mut next = self.clone();
        let site = site.to_string();
        let redemption = next.redemptions.iter_mut().find(|used| used.site == site)?;
        redemption.put_out = true;
        Some(next)
    }

    /// The same token under another specification; who redeemed it before is not affected.
    #[must_use]
    pub fn changed(&self, spec: &AccessGrantSpec, network: SiteId) -> Self {
        let expires_s = i64::try_from(spec.expires.0.as_secs()).unwrap_or(i64::MAX);
        Self {
            uses: spec.uses,
            expires_unix_s: self.created_unix_s.saturating_add(expires_s),
            terms: Terms::of(spec, network),
            ..self.clone()
        }
    }

    /// `valid`, `expired` or `used`.
    #[must_use]
    pub fn state(&self, now_unix_s: i64) -> &'static str {
        if self.redemptions.len() >= usize::try_from(self.uses).unwrap_or(usize::MAX) {
            "used"
        } else if now_unix_s >= self.expires_unix_s {
            "expired"
        } else {
            "valid"
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn grant(uses: u32) -> Grant {
        Grant {
            name: "g".into(),
            code_sha256: String::new(),
            created_unix_s: 0,
            expires_unix_s: 100,
            uses,
            terms: Terms::of(&AccessGrantSpec::default(), SiteId([9; 32])),
            redemptions: Vec::new(),
        }
    }

    #[test]
    fn the_same_redeemer_is_admitted_again_until_expiry() {
        let redeemer = SiteId([1; 32]);
        let Ok(Admission::Consume(used)) = grant(1).admit(redeemer, "a", 1) else {
            panic!("a fresh grant admits");
        };
        assert_eq!(used.admit(redeemer, "a", 99), Ok(Admission::Repeat));
        assert_eq!(used.admit(redeemer, "a", 100), Err(GrantRefusal::Expired));
        assert_eq!(used.admit(SiteId([2; 32]), "b", 1), Err(GrantRefusal::UsedUp));
        assert_eq!(
            (used.state(1), grant(1).state(1), grant(1).state(100)),
            ("used", "valid", "expired")
        );
    }

    #[test]
    fn the_network_the_token_names_stays_good() {
        let [named, joined, other] = [1, 2, 3].map(|n| SiteId([n; 32]));
        let terms = Terms::of(&AccessGrantSpec::default(), named);
        assert!(!terms.is_foreign(named, joined) && !terms.is_foreign(joined, joined));
        assert!(terms.is_foreign(other, joined));
    }

    proptest! {
        #[test]
        fn never_more_sites_than_uses(uses in 0_u32..5, redeemers in prop::collection::vec(0_u8..10, 0..40)) {
            let mut grant = grant(uses);
            for redeemer in redeemers {
                if let Ok(Admission::Consume(next)) = grant.admit(SiteId([redeemer; 32]), "x", 1) {
                    grant = next;
                }
            }
            prop_assert!(grant.redemptions.len() <= uses as usize);
        }
    }
}
