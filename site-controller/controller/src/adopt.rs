//! What this site said and does not know any more: a site rebuilt from a back-up hears its own later words from the others.

use prost::Message as _;
use skein_core::SiteId;
use skein_site_core::Endorsed;
use skein_trust::{Issuer, STATEMENT_VALIDITY_S, verify_endorsement, verify_statement};
use skein_wire::proto::{
    routing::{Record, RecordBody, RecordKind},
    trust::{Endorsement, Membership},
};

use crate::{
    controller::{Controller, State},
    record,
};

/// The part of a sequence that counts; the rest are rotations.
const COUNTER_MASK: u64 = (1 << 48) - 1;

impl Controller {
    /// Takes over what this site has said later than it knows, before anything is renewed on top of it. Returns whether there was anything.
    pub(crate) fn adopt(&self, state: &mut State, records: &[Record]) -> bool {
        let mut adopted = false;
        for record in records {
            let Ok(body) = RecordBody::decode(record.body.as_ref()) else { continue };
            if body.origin == self.site.0 {
                adopted |= match RecordKind::try_from(body.kind) {
                    Ok(RecordKind::SiteStatement) => self.adopt_statement(state, record),
                    Ok(RecordKind::Endorsement) => self.adopt_endorsement(state, record),
                    _ => false,
                };
            }
        }
        adopted
    }

    /// A statement that outranks ours: the next one outranks it.
    fn adopt_statement(&self, state: &mut State, record: &Record) -> bool {
        let Ok(said) = verify_statement(record) else { return false };
        let counter = said.statement.epoch & COUNTER_MASK;
        let issued = &mut state.site.statement;
        if said.site != self.site || counter <= issued.counter {
            return false;
        }
        tracing::info!(counter, "a later statement of this site was heard");
        (issued.counter, issued.signed_unix_s) = (counter, 0);
        true
    }

    /// An endorsement that is later than the one we know. Of sites that were forgotten nothing is taken back.
    fn adopt_endorsement(&self, state: &mut State, record: &Record) -> bool {
        let Some(own) = record::from_text(&state.site.statement.record) else { return false };
        let Ok(own) = verify_statement(&own) else { return false };
        let Ok(said) = verify_endorsement(record, &Issuer::from(&own.chain)) else { return false };
        let subject = <[u8; 32]>::try_from(said.subject.as_slice()).map(SiteId);
        let Some(known) = subject.ok().and_then(|subject| state.endorsed.get_mut(&subject)) else {
            return false;
        };
        if said.sequence & COUNTER_MASK <= known.sequence {
            return false;
        }
        let later = outranked(known, &said, record);
        tracing::info!(
            site = later.site,
            withdrawn = later.withdrawn,
            "a later word of this site was heard"
        );
        if let Err(error) = self.store.save_endorsed(&later) {
            // It is heard again when a router starts; until then it counts all the same.
            tracing::error!(%error, "a later endorsement is not saved");
        }
        *known = later;
        true
    }
}

/// What is known, as it was said later.
fn outranked(known: &Endorsed, said: &Endorsement, record: &Record) -> Endorsed {
    let validity_s = if said.withdrawn { 0 } else { i64::from(STATEMENT_VALIDITY_S) };
    let scope = said.scope.clone().unwrap_or_default();
    Endorsed {
        guest: said.membership == i32::from(Membership::Guest),
        consume: scope.consume,
        provide: scope.provide,
        transit: scope.transit,
        may_endorse: said.may_endorse,
        withdrawn: said.withdrawn,
        sequence: said.sequence & COUNTER_MASK,
        signed_unix_s: said.valid_until_unix_s.saturating_sub(validity_s),
        record: record::to_text(record),
        // Whoever has forgotten this may have forgotten more, and the subject passes on what suits it.
        restored: !said.withdrawn,
        ..known.clone()
    }
}
