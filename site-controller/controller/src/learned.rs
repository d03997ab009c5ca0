//! Statements of other sites that routers accepted, kept so that a restarted router knows whom to trust.

use std::collections::{BTreeMap, BTreeSet};

use prost::Message as _;
use skein_core::{Edition, SiteId};
use skein_trust::STATEMENT_VALIDITY_S;
use skein_wire::{
    convert::body_digest,
    proto::{
        routing::{Record, RecordBody, RecordKind},
        trust::{Endorsement, SiteStatement},
    },
};

use crate::store::{LEARNED_LEN_MAX, LEARNED_MAX};

/// Kind, origin and subkey: what the greater edition replaces.
type Key = (i32, Vec<u8>, Vec<u8>);

/// The newest record for each key. Routers have checked the signatures; whoever uses the records checks them again.
#[derive(Debug)]
pub(crate) struct LearnedRecords {
    site: SiteId,
    records: BTreeMap<Key, (Edition, Record)>,
    /// Of all records, encoded.
    len: usize,
    dirty: bool,
}

impl LearnedRecords {
    /// Takes what was stored, however old it is: [`expire`](Self::expire) knows what may go.
    pub(crate) fn new(site: SiteId, stored: Vec<Record>) -> Self {
        let mut out = Self { site, records: BTreeMap::new(), len: 0, dirty: false };
        out.learn(stored, i64::MIN);
        out.dirty = false;
        out
    }

    /// Keeps what is newer; returns whether anything was. What the site says itself is kept elsewhere. What is newer and no longer valid
    /// withdraws what was: it is kept until nothing older can be valid.
    pub(crate) fn learn(&mut self, records: Vec<Record>, now_unix_s: i64) -> bool {
        let mut changed = false;
        for record in records {
            let Ok(body) = RecordBody::decode(record.body.as_ref()) else { continue };
            let key = (body.kind, body.origin.clone(), body.subkey.clone());
            if body.origin == self.site.0 {
                continue;
            }
            // What follows on something known is taken whatever it says, or an old statement could stand against a withdrawal.
            if !self.records.contains_key(&key) && is_forgotten(&body, now_unix_s) {
                continue;
            }
            let known = self.records.get(&key);
            let known_len = known.map_or(0, |(_, known)| stored_len(known));
            let len = self.len - known_len + stored_len(&record);
            let edition = Edition { sequence: body.sequence, digest: body_digest(&record.body) };
            let is_newer = known.is_none_or(|(known, _)| *known < edition);
            let has_room = known.is_some() || self.records.len() < LEARNED_MAX;
            if is_newer && has_room && len <= LEARNED_LEN_MAX {
                self.len = len;
                self.records.insert(key, (edition, record));
                changed = true;
            }
        }
        self.dirty |= changed;
        changed
    }

    /// Drops what says nothing any more; returns whether anything was. Statements of sites that are `known`, be it by an endorsement or a
    /// link, stay however old they are: by the keys and CAs in them such a site is known again when it comes back.
    pub(crate) fn expire(&mut self, now_unix_s: i64, known: impl Fn(SiteId) -> bool) -> bool {
        let before = self.records.len();
        self.records.retain(|(kind, origin, _), (_, record)| {
            let is_statement = *kind == i32::from(RecordKind::SiteStatement);
            let origin = origin[..].try_into().ok().map(SiteId);
            (is_statement && origin.is_some_and(&known))
                || RecordBody::decode(record.body.as_ref())
                    .is_ok_and(|body| !is_forgotten(&body, now_unix_s))
        });
        self.len = self.records.values().map(|(_, record)| stored_len(record)).sum();
        let changed = before != self.records.len();
        self.dirty |= changed;
        changed
    }

    /// All records, in a stable order.
    pub(crate) fn iter(&self) -> impl Iterator<Item = &Record> {
        self.records.values().map(|(_, record)| record)
    }

    pub(crate) fn to_vec(&self) -> Vec<Record> {
        self.iter().cloned().collect()
    }

    /// Whether there is something to save; it counts as saved from now on.
    pub(crate) fn take_dirty(&mut self) -> bool {
        std::mem::take(&mut self.dirty)
    }

    pub(crate) fn set_dirty(&mut self) {
        self.dirty = true;
    }

    /// Who revoked `subject`.
    pub(crate) fn revokers(&self, subject: SiteId) -> impl Iterator<Item = SiteId> {
        let kind = i32::from(RecordKind::Revocation);
        self.records
            .range((kind, Vec::new(), Vec::new())..(kind + 1, Vec::new(), Vec::new()))
            .filter(move |((_, _, of), _)| of[..] == subject.0)
            .filter_map(|((_, issuer, _), _)| issuer[..].try_into().ok().map(SiteId))
    }

    /// Sites whose last word has expired.
    pub(crate) fn departed(&self, now_unix_s: i64) -> BTreeSet<SiteId> {
        self.statements()
            .filter(|statement| statement.leaving && statement.expires_unix_s <= now_unix_s)
            .filter_map(|statement| statement.site_id[..].try_into().ok().map(SiteId))
            .collect()
    }

    /// Who else endorses `subject` now.
    pub(crate) fn endorsers(
        &self,
        subject: SiteId,
        now_unix_s: i64,
    ) -> impl Iterator<Item = SiteId> {
        let kind = i32::from(RecordKind::Endorsement);
        self.records
            .range((kind, Vec::new(), Vec::new())..(kind + 1, Vec::new(), Vec::new()))
            .filter(move |((_, issuer, of), (_, record))| {
                let body = RecordBody::decode(record.body.as_ref()).ok();
                let said = body.and_then(|b| Endorsement::decode(b.payload.as_slice()).ok());
                of[..] == subject.0
                    && issuer[..] != subject.0
                    && said
                        .is_some_and(|said| !said.withdrawn && said.valid_until_unix_s > now_unix_s)
            })
            .filter_map(|((_, issuer, _), _)| issuer[..].try_into().ok().map(SiteId))
    }

    /// The newest statement of each other site.
    pub(crate) fn statements(&self) -> impl Iterator<Item = SiteStatement> {
        let kind = i32::from(RecordKind::SiteStatement);
        self.records
            .range((kind, Vec::new(), Vec::new())..(kind + 1, Vec::new(), Vec::new()))
            .filter_map(|(_, (_, record))| {
                let body = RecordBody::decode(record.body.as_ref()).ok()?;
                SiteStatement::decode(body.payload.as_slice()).ok()
            })
    }
}

/// What a record takes in the file, at most: its tags and lengths included.
fn stored_len(record: &Record) -> usize {
    record.encoded_len() + 8
}

/// Whether neither the record nor an older one in its place can be valid.
fn is_forgotten(body: &RecordBody, now_unix_s: i64) -> bool {
    let until = match RecordKind::try_from(body.kind) {
        Ok(RecordKind::SiteStatement) => {
            SiteStatement::decode(body.payload.as_slice()).map(|s| s.expires_unix_s)
        }
        Ok(RecordKind::Endorsement) => {
            Endorsement::decode(body.payload.as_slice()).map(|e| e.valid_until_unix_s)
        }
        // Revocations stay.
        _ => return false,
    };
    until.is_ok_and(|until| until.saturating_add(i64::from(STATEMENT_VALIDITY_S)) <= now_unix_s)
}

#[cfg(test)]
mod tests {
    use super::*;
    use aws_lc_rs::rand::SystemRandom;
    use skein_trust::{SiteIdentity, StatementDraft};

    fn statement(identity: &SiteIdentity, counter: u64, expires_unix_s: i64) -> Record {
        identity.statement(&StatementDraft {
            epoch: counter,
            expires_unix_s,
            ..StatementDraft::default()
        })
    }

    #[test]
    fn the_newest_valid_statement_is_kept() {
        let other = SiteIdentity::generate(&SystemRandom::new()).unwrap();
        let mut learned = LearnedRecords::new(SiteId([0; 32]), Vec::new());
        assert!(learned.learn(vec![statement(&other, 2, 100)], 0));
        assert!(!learned.learn(vec![statement(&other, 1, 100)], 0));
        assert_eq!(learned.statements().count(), 1);
        assert!(learned.take_dirty() && !learned.take_dirty());
        assert!(learned.learn(vec![statement(&other, 3, 50)], 60), "a farewell");
        let week = i64::from(STATEMENT_VALIDITY_S);
        assert!(!learned.expire(49 + week, |_| false), "an older one could be valid");
        assert!(!learned.learn(vec![statement(&other, 2, 100)], 60));
        assert!(!learned.expire(i64::MAX, |site| site == other.site_id()), "it is ours to know");
        assert!(learned.expire(50 + week, |_| false));
        assert_eq!((learned.iter().count(), learned.len), (0, 0));
        assert!(!learned.learn(vec![statement(&other, 4, 50)], 50 + week), "long over");
    }

    #[test]
    fn what_is_kept_can_be_read_back() {
        let mut learned = LearnedRecords::new(SiteId([0; 32]), Vec::new());
        let large = |n: u32| {
            let body = RecordBody {
                kind: RecordKind::Revocation.into(),
                origin: n.to_be_bytes().to_vec(),
                payload: vec![0; 1 << 20],
                ..RecordBody::default()
            };
            Record { body: body.encode_to_vec().into(), signature: Vec::new().into() }
        };
        for n in 0..40 {
            learned.learn(vec![large(n), large(n)], 0);
        }
        assert!((20..=32).contains(&learned.iter().count()));
        let file = skein_wire::proto::control::Learned { records: learned.to_vec() };
        assert!(file.encoded_len() <= LEARNED_LEN_MAX);
    }

    #[test]
    fn own_words_and_garbage_are_not_learned() {
        let own = SiteIdentity::generate(&SystemRandom::new()).unwrap();
        let mut learned = LearnedRecords::new(own.site_id(), Vec::new());
        let garbage = Record { body: vec![0xff; 40].into(), signature: Vec::new().into() };
        assert!(!learned.learn(vec![statement(&own, 9, 100), garbage], 0));
    }
}
