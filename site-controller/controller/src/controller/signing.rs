//! What the site says of itself and of others, signed again where it is due.

use skein_core::SiteId;
use skein_site_core::{Due, Endorsed, IssuedStatement, due, next_counter};
use skein_trust::{EndorsementDraft, STATEMENT_VALIDITY_S, StatementDraft};
use skein_wire::proto::{
    routing::Record,
    trust::{Membership, Scope},
};

use super::{Controller, State};
use crate::{clock, record, store::StoreError};

impl Controller {
    /// Statement and endorsements, signed anew where due. What cannot be saved is used all the same and signed again later.
    pub(super) fn renew(&self, state: &mut State, now: i64) {
        let wanted = self.wanted_statement(state);
        for what in due(&state.site.statement, &wanted, &state.endorsed, now) {
            let saved = match what {
                Due::Statement { counter } => {
                    let signed = self.sign_statement(state, &wanted, counter, now);
                    state.site.statement = signed;
                    self.store.save_site(&state.site)
                }
                Due::Endorsement { site, sequence } => {
                    let Some(endorsed) = state.endorsed.get_mut(&site) else { continue };
                    self.sign_endorsement(site, endorsed, sequence, now);
                    self.store.save_endorsed(endorsed)
                }
            };
            if let Err(error) = saved {
                tracing::error!(%error, "a renewed statement is not saved");
            }
        }
    }

    /// Counts a statement that is about to be signed and shown to others. What comes after it must outrank it, also when this process
    /// ends in between: of two statements with one number the second would be ignored.
    ///
    /// # Errors
    /// It cannot be saved; nothing has changed.
    pub(crate) fn count_statement(&self, state: &mut State, now: i64) -> Result<u64, StoreError> {
        let mut site = state.site.clone();
        site.statement.counter = next_counter(site.statement.counter, now);
        self.store.save_site(&site)?;
        state.site = site;
        Ok(state.site.statement.counter)
    }

    fn wanted_statement(&self, state: &State) -> IssuedStatement {
        let digest =
            aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, self.ca.certificate().as_ref());
        IssuedStatement {
            name: state.site_name().to_owned(),
            endpoints: state.advertise(),
            network: state.site.network.clone(),
            cas: vec![data_encoding::HEXLOWER.encode(digest.as_ref())],
            ..IssuedStatement::default()
        }
    }

    fn sign_statement(
        &self,
        state: &State,
        wanted: &IssuedStatement,
        counter: u64,
        now: i64,
    ) -> IssuedStatement {
        let record = self.identity.statement(&StatementDraft {
            epoch: counter,
            name: wanted.name.clone(),
            ca_certificates: vec![self.ca.certificate().to_vec()],
            endpoints: wanted.endpoints.clone(),
            network_id: Some(state.network(self.site)),
            expires_unix_s: now + i64::from(STATEMENT_VALIDITY_S),
        });
        let record = record::to_text(&record);
        IssuedStatement { counter, signed_unix_s: now, record, ..wanted.clone() }
    }

    /// Signs `endorsed` anew.
    pub(crate) fn sign_endorsement(
        &self,
        subject: SiteId,
        endorsed: &mut Endorsed,
        sequence: u64,
        now: i64,
    ) {
        let scope = endorsed.guest.then(|| Scope {
            consume: endorsed.consume.clone(),
            provide: endorsed.provide.clone(),
            transit: endorsed.transit,
        });
        let membership = if endorsed.guest { Membership::Guest } else { Membership::Member };
        let draft = EndorsementDraft {
            subject,
            membership,
            scope,
            may_endorse: endorsed.may_endorse && !endorsed.guest,
            sequence,
            valid_until_unix_s: if endorsed.withdrawn {
                now
            } else {
                now + i64::from(STATEMENT_VALIDITY_S)
            },
        };
        let record = if endorsed.withdrawn {
            self.identity.withdrawal(&draft)
        } else {
            self.identity.endorsement(&draft)
        };
        endorsed.sequence = sequence;
        endorsed.signed_unix_s = now;
        endorsed.record = record::to_text(&record);
    }

    /// Signs what this site says of another so that it outranks what it said before.
    pub(crate) fn sign_next(&self, state: &State, subject: SiteId, endorsed: &mut Endorsed) {
        let now = clock::unix_s();
        let last = state.endorsed.get(&subject).map_or(0, |known| known.sequence);
        endorsed.restored = false;
        self.sign_endorsement(subject, endorsed, next_counter(last, now), now);
    }

    /// Everything the site stands on: its own words and what it heard.
    pub(crate) fn records(&self, state: &State) -> Vec<Record> {
        let own = record::from_text(&state.site.statement.record);
        let endorsements =
            state.endorsed.values().filter_map(|endorsed| record::from_text(&endorsed.record));
        own.into_iter().chain(endorsements).chain(state.learned.iter().cloned()).collect()
    }
}
