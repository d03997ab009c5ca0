//! When the site's own statement and its endorsements of others must be signed anew.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use skein_core::SiteId;

/// Statements live a week and are renewed after a day: a controller may be away for six.
pub const RENEW_AFTER_S: i64 = 86_400;
/// Daily renewals of what is from a back-up that a later word outranks: others remember that for seven days.
const RESTORED_RENEWALS: u64 = 15;

/// What the site stands for about another site.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Endorsed {
    /// Site id of the subject.
    pub site: String,
    /// Its name when it was endorsed, for people.
    pub site_name: String,
    /// A foreign site within a scope, or a member.
    pub guest: bool,
    /// Addresses a guest may reach.
    #[serde(default)]
    pub consume: Vec<String>,
    /// Addresses a guest may serve.
    #[serde(default)]
    pub provide: Vec<String>,
    /// Whether others' flows may pass through a guest.
    #[serde(default)]
    pub transit: bool,
    /// Whether the subject's endorsements count too.
    pub may_endorse: bool,
    /// No longer endorsed; kept until nothing older can be valid.
    #[serde(default)]
    pub withdrawn: bool,
    /// Of the signed record; the higher one wins.
    pub sequence: u64,
    /// When it was signed, Unix time.
    pub signed_unix_s: i64,
    /// The signed record: base64 of body and of signature.
    pub record: (String, String),
    /// What it came from: the name of a grant or of a link, for people.
    pub origin: String,
    /// It is from a back-up, or was heard from others because it was forgotten here, and may have been outranked since: it is renewed below
    /// anything said later, until that has been heard.
    #[serde(default)]
    pub restored: bool,
}

/// What the site last said of itself.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct IssuedStatement {
    /// Grows with every statement.
    pub counter: u64,
    /// When it was signed, Unix time.
    pub signed_unix_s: i64,
    /// Its name then.
    pub name: String,
    /// Its endpoints then.
    pub endpoints: Vec<String>,
    /// Its network then, a site id.
    pub network: String,
    /// SHA-256 of its CA certificates, hexadecimal.
    pub cas: Vec<String>,
    /// The signed record: base64 of body and of signature.
    pub record: (String, String),
}

/// Something to sign.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Due {
    /// The site's statement, with this counter.
    Statement {
        /// Above every earlier one.
        counter: u64,
    },
    /// An endorsement of this site, with this sequence.
    Endorsement {
        /// The subject.
        site: SiteId,
        /// Above every earlier one.
        sequence: u64,
    },
}

/// What must be signed now. `wanted` is what the statement would say, with whatever counter and record.
#[must_use]
pub fn due(
    issued: &IssuedStatement,
    wanted: &IssuedStatement,
    endorsed: &BTreeMap<SiteId, Endorsed>,
    now_unix_s: i64,
) -> Vec<Due> {
    let mut out = Vec::new();
    let says = |of: &IssuedStatement| {
        (of.name.clone(), of.endpoints.clone(), of.network.clone(), of.cas.clone())
    };
    if issued.counter == 0
        || says(issued) != says(wanted)
        || is_old(issued.signed_unix_s, now_unix_s)
    {
        out.push(Due::Statement { counter: next_counter(issued.counter, now_unix_s) });
    }
    for (site, endorsement) in endorsed {
        if !endorsement.withdrawn && is_old(endorsement.signed_unix_s, now_unix_s) {
            let sequence = match endorsement.restored {
                true => endorsement.sequence + 1,
                false => next_counter(endorsement.sequence, now_unix_s),
            };
            out.push(Due::Endorsement { site: *site, sequence });
        }
    }
    out
}

/// Signed in the future counts as old: the clock was wrong then, and so is the expiry.
fn is_old(signed_unix_s: i64, now_unix_s: i64) -> bool {
    !(signed_unix_s..signed_unix_s.saturating_add(RENEW_AFTER_S)).contains(&now_unix_s)
}

/// What follows `last` in the count of a site's statements or of what it says of another. At least the time, so that a site rebuilt from
/// an old back-up still counts on from above what it said before. The very next ones are left for what is renewed from a back-up, so that
/// nothing that was said since can be taken for it.
#[must_use]
pub fn next_counter(last: u64, now_unix_s: i64) -> u64 {
    last.saturating_add(1 + RESTORED_RENEWALS).max(u64::try_from(now_unix_s).unwrap_or(0))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn endorsed(signed_unix_s: i64) -> Endorsed {
        Endorsed {
            site: String::new(),
            site_name: String::new(),
            guest: false,
            consume: Vec::new(),
            provide: Vec::new(),
            transit: false,
            may_endorse: true,
            withdrawn: false,
            sequence: 9,
            signed_unix_s,
            record: Default::default(),
            origin: String::new(),
            restored: false,
        }
    }

    #[test]
    fn a_statement_is_signed_at_birth_on_change_and_daily() {
        let nobody = BTreeMap::new();
        let born = IssuedStatement::default();
        assert_eq!(due(&born, &born, &nobody, 100), [Due::Statement { counter: 100 }]);
        let signed = IssuedStatement { counter: 100, signed_unix_s: 100, ..born };
        assert_eq!(due(&signed, &signed, &nobody, 101), []);
        let renamed = IssuedStatement { name: "x".into(), ..signed.clone() };
        assert_eq!(due(&signed, &renamed, &nobody, 100), [Due::Statement { counter: 116 }]);
        let tomorrow = 100 + RENEW_AFTER_S;
        assert_eq!(due(&signed, &signed, &nobody, tomorrow).len(), 1);
        assert_eq!(due(&signed, &signed, &nobody, tomorrow - 1), []);
        assert_eq!(due(&signed, &signed, &nobody, 99).len(), 1, "the clock went back");
    }

    #[test]
    fn endorsements_are_renewed_daily() {
        let site = SiteId([1; 32]);
        let signed = IssuedStatement { counter: 1, signed_unix_s: 100, ..Default::default() };
        let peers = BTreeMap::from([(site, endorsed(50))]);
        assert_eq!(due(&signed, &signed, &peers, 100), []);
        let now = 50 + RENEW_AFTER_S;
        let sequence = u64::try_from(now).unwrap();
        assert_eq!(due(&signed, &signed, &peers, now), [Due::Endorsement { site, sequence }]);
        let restored = BTreeMap::from([(site, Endorsed { restored: true, ..endorsed(50) })]);
        assert_eq!(
            due(&signed, &signed, &restored, now),
            [Due::Endorsement { site, sequence: 10 }],
            "it may have been withdrawn since"
        );
        let withdrawn = Endorsed { withdrawn: true, ..endorsed(50) };
        assert_eq!(due(&signed, &signed, &BTreeMap::from([(site, withdrawn)]), now), []);
    }
}
