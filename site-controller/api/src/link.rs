//! `Link`: a peer site this site dials.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use skein_core::SiteId;

use crate::{invalid::Invalids, manifest::Spec, resource::Kind, value::HostPort};

/// Highest cost of a link: one path of the longest length still fits the metric.
pub const LINK_COST_MAX: u32 = 65_535;
/// Endpoints of one link; all are dialled in parallel.
pub const LINK_ENDPOINTS_MAX: usize = 16;

/// The wanted state of a link.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct LinkSpec {
    /// Site id of the peer; a router of another site is refused.
    pub peer: String,
    /// `HOST:PORT`, tried in parallel; what the peer announces is added while the link lives.
    pub endpoints: Vec<String>,
    /// Added to the metric of paths over the link, in milliseconds of delay.
    #[serde(default = "default_cost")]
    #[schemars(range(min = 1, max = 65535))]
    pub cost: u32,
}

pub(crate) const fn default_cost() -> u32 {
    1
}

pub(crate) fn check_cost(cost: u32, field: &str, invalids: &mut Invalids) {
    let holds = (1..=LINK_COST_MAX).contains(&cost);
    invalids.check(holds, field, format!("must be 1 to {LINK_COST_MAX}"));
}

impl Spec for LinkSpec {
    const KIND: Kind = Kind::Link;

    fn validate(&self, invalids: &mut Invalids) {
        let rule = "must be a site id (52 characters of a-z and 2-7)";
        invalids.check(SiteId::parse(&self.peer).is_some(), "spec.peer", rule);
        let holds = (1..=LINK_ENDPOINTS_MAX).contains(&self.endpoints.len());
        let rule = format!("must have 1 to {LINK_ENDPOINTS_MAX} entries");
        invalids.check(holds, "spec.endpoints", rule);
        for (index, text) in self.endpoints.iter().enumerate().take(LINK_ENDPOINTS_MAX) {
            let field = format!("spec.endpoints[{index}]");
            match text.parse::<HostPort>() {
                Ok(endpoint) => invalids.check(endpoint.port.is_some(), field, "must have a port"),
                Err(why) => invalids.add(field, why.to_string()),
            }
        }
        check_cost(self.cost, "spec.cost", invalids);
    }
}
