//! `AccessGrant` and `AccessToken`: letting a site in, and getting in.

use std::fmt;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::{
    invalid::Invalids,
    link::{check_cost, default_cost},
    manifest::Spec,
    resource::Kind,
    token::Token,
    value::{Duration, valid_name},
};

/// Most redemptions of one grant: enough for a fleet, few enough to keep every answer until expiry.
pub const TOKEN_USES_MAX: u32 = 1_000;
/// Longest life of a grant. Codes travel by mail and chat: a forgotten one must die.
pub const TOKEN_EXPIRES_MAX: Duration = Duration::from_secs(30 * 86_400);
/// Patterns in one list of a scope; a scope is flooded to the whole network.
const PATTERNS_MAX: usize = 64;

/// Permission for others to link to this site.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct AccessGrantSpec {
    /// How many sites may redeem it.
    #[schemars(range(min = 1, max = 1000))]
    pub uses: u32,
    /// How long it lives, from its creation.
    pub expires: Duration,
    /// Cost of the links it makes, unless the redeemer says otherwise.
    #[schemars(range(min = 1, max = 65535))]
    pub cost: u32,
    /// Whether redeemers become guests: foreign sites that may do what `scope` lists and nothing else.
    pub guest: bool,
    /// Whether a site that belongs to another network may redeem it and so join both networks.
    pub merge: bool,
    /// What guests may do.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub scope: Option<GuestScope>,
}

impl Default for AccessGrantSpec {
    fn default() -> Self {
        Self {
            uses: 1,
            expires: Duration::from_secs(15 * 60),
            cost: default_cost(),
            guest: false,
            merge: false,
            scope: None,
        }
    }
}

/// What a guest may do here. Absent lists allow nothing.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct GuestScope {
    /// Addresses or `prefix*` the guest may reach.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub consume: Vec<String>,
    /// Addresses or `prefix*` the guest may serve.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub provide: Vec<String>,
    /// Whether others' flows may pass through the guest.
    pub transit: bool,
}

impl Spec for AccessGrantSpec {
    const KIND: Kind = Kind::AccessGrant;

    fn validate(&self, invalids: &mut Invalids) {
        let holds = (1..=TOKEN_USES_MAX).contains(&self.uses);
        invalids.check(holds, "spec.uses", format!("must be 1 to {TOKEN_USES_MAX}"));
        let holds = self.expires >= Duration::from_secs(1) && self.expires <= TOKEN_EXPIRES_MAX;
        invalids.check(holds, "spec.expires", format!("must be 1s to {TOKEN_EXPIRES_MAX}"));
        check_cost(self.cost, "spec.cost", invalids);
        invalids.check(self.guest || self.scope.is_none(), "spec.scope", "is for guests only");
        invalids.check(!(self.guest && self.merge), "spec.merge", "is for members only");
        if let Some(scope) = &self.scope {
            scope.validate(invalids);
        }
    }
}

impl GuestScope {
    /// Whether it allows nothing.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    /// Records every broken rule.
    pub fn validate(&self, invalids: &mut Invalids) {
        for (field, patterns) in
            [("spec.scope.consume", &self.consume), ("spec.scope.provide", &self.provide)]
        {
            let rule = format!("must have at most {PATTERNS_MAX} entries");
            invalids.check(patterns.len() <= PATTERNS_MAX, field, rule);
            for (index, pattern) in patterns.iter().enumerate().take(PATTERNS_MAX) {
                let legal =
                    |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b"-.".contains(&b);
                let stem = pattern.strip_suffix('*').unwrap_or(pattern);
                let holds = !pattern.is_empty()
                    && pattern.len() <= skein_core::ADDRESS_LEN_MAX
                    && stem.bytes().all(legal);
                let rule = "must be an address, or the beginning of addresses followed by '*'";
                invalids.check(holds, format!("{field}[{index}]"), rule);
            }
        }
    }
}

/// A token to be redeemed by this site.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct AccessTokenSpec {
    /// Content of the token file.
    pub token: String,
    /// Name of the link it makes. Absent: after the issuing site.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub link_name: Option<String>,
    /// Cost of the link. Absent: the token's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 65535))]
    pub cost: Option<u32>,
    /// Whether to join another network with this one.
    #[serde(default)]
    pub merge: bool,
    /// With a guest's token: addresses or `prefix*` this site will reach there.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub consume: Vec<String>,
    /// With a guest's token: addresses or `prefix*` the other site may reach here.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub provide: Vec<String>,
}

// The token is a secret: only its presence is shown.
impl fmt::Debug for AccessTokenSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("AccessTokenSpec")
            .field("token", &"…")
            .field("link_name", &self.link_name)
            .field("cost", &self.cost)
            .field("merge", &self.merge)
            .field("consume", &self.consume)
            .field("provide", &self.provide)
            .finish()
    }
}

impl Spec for AccessTokenSpec {
    const KIND: Kind = Kind::AccessToken;

    fn validate(&self, invalids: &mut Invalids) {
        if let Err(why) = self.token.parse::<Token>() {
            invalids.add("spec.token", format!("is not usable: {why}"));
        }
        if let Some(name) = &self.link_name {
            invalids.check(valid_name(name), "spec.linkName", "must be a DNS label");
        }
        if let Some(cost) = self.cost {
            check_cost(cost, "spec.cost", invalids);
        }
    }
}
