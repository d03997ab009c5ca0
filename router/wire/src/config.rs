//! The router's configuration as a versioned document: canonical form, hash, delta and chunks.
//!
//! Controller and router use the same functions, so both name a configuration by the same hash. The controller sends a
//! [`Snapshot`] in chunks or a [`Delta`] between two versions; the router compares the hash of what it arrives at and asks for the whole
//! document when it differs.

use crate::proto::control::{Delta, RouterConfig, Snapshot};
use aws_lc_rs::digest;
use prost::Message;
use std::collections::{BTreeMap, BTreeSet};

/// Largest chunk of a snapshot in bytes: well under the 4 MiB gRPC allows by default, and small enough not to delay other messages.
pub const CHUNK_LEN_MAX: usize = 1 << 20;
/// Largest encoded configuration in bytes. 100,000 listeners take about 8 MiB; more is a mistake, not a network.
pub const CONFIG_LEN_MAX: usize = 64 << 20;
/// A delta above this is sent as a snapshot, in bytes: the same bound as a chunk, for the same reason.
const DELTA_LEN_MAX: usize = CHUNK_LEN_MAX;

/// Why a configuration could not be taken over.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    /// A delta starts at a version that is not in force here.
    #[error("the delta starts at version {from}, in force is {current}")]
    WrongVersion {
        /// Where the delta starts.
        from: u64,
        /// What is in force.
        current: u64,
    },
    /// The result is not what the sender has.
    #[error("the configuration's hash differs from the announced one")]
    HashMismatch,
    /// Chunks of two versions were mixed.
    #[error("a chunk of version {got} arrived while version {expected} was incomplete")]
    MixedVersions {
        /// The version begun.
        expected: u64,
        /// The version of the chunk.
        got: u64,
    },
    /// More than [`CONFIG_LEN_MAX`] bytes.
    #[error("the configuration exceeds {CONFIG_LEN_MAX} bytes")]
    TooLarge,
    /// Not a configuration at all.
    #[error("the configuration is malformed: {0}")]
    Invalid(String),
}

impl ConfigError {
    /// Whether asking for the full configuration helps; otherwise the same would come again.
    #[must_use]
    pub fn is_transient(&self) -> bool {
        !matches!(self, Self::TooLarge | Self::Invalid(_))
    }
}

/// Brings a configuration into its canonical order; items of the same name and equal records collapse to the last one given.
pub fn canonicalise(config: &mut RouterConfig) {
    sort_named(&mut config.links, |link| &link.name);
    sort_named(&mut config.listeners, |listener| &listener.name);
    sort_named(&mut config.connectors, |connector| &connector.name);
    config.records.sort_by(|a, b| (&a.body, &a.signature).cmp(&(&b.body, &b.signature)));
    config.records.dedup_by(|later, kept| later.body == kept.body);
}

/// The canonical encoding. `config` must be canonical.
#[must_use]
pub fn encode(config: &RouterConfig) -> Vec<u8> {
    config.encode_to_vec()
}

/// SHA-256 of the canonical encoding; it names a configuration across restarts and versions. `config` must be canonical.
#[must_use]
pub fn hash(config: &RouterConfig) -> [u8; 32] {
    sha256(&encode(config))
}

/// Splits a canonical configuration into chunks, the last of which carries the hash.
#[must_use]
pub fn snapshot(version: u64, config: &RouterConfig) -> Vec<Snapshot> {
    let encoded = encode(config);
    let sha256 = sha256(&encoded);
    let mut chunks: Vec<Snapshot> = encoded
        .chunks(CHUNK_LEN_MAX)
        .map(|chunk| Snapshot { version, chunk: chunk.to_vec(), last: false, sha256: Vec::new() })
        .collect();
    if chunks.is_empty() {
        chunks.push(Snapshot { version, ..Snapshot::default() });
    }
    if let Some(last) = chunks.last_mut() {
        last.last = true;
        last.sha256 = sha256.to_vec();
    }
    chunks
}

/// What leads from `old` to `new`, both canonical; `None` when a snapshot is the smaller or only way.
#[must_use]
pub fn diff(
    from_version: u64,
    old: &RouterConfig,
    version: u64,
    new: &RouterConfig,
) -> Option<Delta> {
    let (links, removed_links) = diff_named(&old.links, &new.links, |link| &link.name);
    let (listeners, removed_listeners) =
        diff_named(&old.listeners, &new.listeners, |listener| &listener.name);
    let (connectors, removed_connectors) =
        diff_named(&old.connectors, &new.connectors, |connector| &connector.name);
    let old_records: BTreeSet<_> = old.records.iter().map(|r| (&r.body, &r.signature)).collect();
    let new_records: BTreeSet<_> = new.records.iter().map(|r| (&r.body, &r.signature)).collect();
    let records = new
        .records
        .iter()
        .filter(|r| !old_records.contains(&(&r.body, &r.signature)))
        .cloned()
        .collect();
    let removed_records =
        old_records.difference(&new_records).map(|(body, _)| sha256(body).to_vec()).collect();
    let settings = if old.settings == new.settings { None } else { new.settings.clone() };
    if settings.is_none() && new.settings.is_none() && old.settings.is_some() {
        return None; // A delta cannot take the settings away.
    }
    let delta = Delta {
        from_version,
        version,
        changed: Some(RouterConfig { settings, links, listeners, connectors, records }),
        removed_listeners,
        removed_connectors,
        removed_links,
        sha256: hash(new).to_vec(),
        removed_records,
    };
    let len = delta.encoded_len();
    (len <= DELTA_LEN_MAX && len < new.encoded_len()).then_some(delta)
}

/// Applies a delta to the canonical configuration in force; the result is canonical and has the announced hash.
///
/// # Errors
/// The delta starts elsewhere, or the result hashes differently; the configuration in force stays as it was.
pub fn apply(
    current_version: u64,
    current: &RouterConfig,
    delta: &Delta,
) -> Result<RouterConfig, ConfigError> {
    if delta.from_version != current_version {
        return Err(ConfigError::WrongVersion {
            from: delta.from_version,
            current: current_version,
        });
    }
    let mut next = current.clone();
    retain_unlisted(&mut next.links, &delta.removed_links, |item| &item.name);
    retain_unlisted(&mut next.listeners, &delta.removed_listeners, |item| &item.name);
    retain_unlisted(&mut next.connectors, &delta.removed_connectors, |item| &item.name);
    if !delta.removed_records.is_empty() {
        let removed: BTreeSet<&[u8]> = delta.removed_records.iter().map(Vec::as_slice).collect();
        next.records.retain(|record| !removed.contains(sha256(&record.body).as_slice()));
    }
    if let Some(changed) = &delta.changed {
        if changed.settings.is_some() {
            next.settings.clone_from(&changed.settings);
        }
        next.links.extend(changed.links.iter().cloned());
        next.listeners.extend(changed.listeners.iter().cloned());
        next.connectors.extend(changed.connectors.iter().cloned());
        next.records.extend(changed.records.iter().cloned());
    }
    canonicalise(&mut next);
    if hash(&next).as_slice() != delta.sha256 {
        return Err(ConfigError::HashMismatch);
    }
    Ok(next)
}

/// Puts the chunks of a snapshot together.
#[derive(Debug, Default)]
pub struct Assembler {
    version: u64,
    bytes: Vec<u8>,
    /// The rest of this one is passed over.
    too_large: Option<u64>,
}

impl Assembler {
    /// Takes one chunk; returns the version and the canonical configuration with the last one.
    ///
    /// # Errors
    /// Too large, mixed, damaged or malformed; what was collected is thrown away.
    pub fn push(&mut self, chunk: &Snapshot) -> Result<Option<(u64, RouterConfig)>, ConfigError> {
        if self.too_large.take() == Some(chunk.version) {
            self.too_large = (!chunk.last).then_some(chunk.version);
            return Ok(None);
        }
        if self.bytes.is_empty() {
            self.version = chunk.version;
        }
        let expected = self.version;
        if chunk.version != expected {
            self.bytes.clear();
            return Err(ConfigError::MixedVersions { expected, got: chunk.version });
        }
        if self.bytes.len() + chunk.chunk.len() > CONFIG_LEN_MAX {
            self.bytes = Vec::new();
            self.too_large = (!chunk.last).then_some(chunk.version);
            return Err(ConfigError::TooLarge);
        }
        self.bytes.extend_from_slice(&chunk.chunk);
        if !chunk.last {
            return Ok(None);
        }
        let bytes = std::mem::take(&mut self.bytes);
        if sha256(&bytes).as_slice() != chunk.sha256 {
            return Err(ConfigError::HashMismatch);
        }
        let mut config = RouterConfig::decode(bytes.as_slice())
            .map_err(|error| ConfigError::Invalid(error.to_string()))?;
        canonicalise(&mut config);
        Ok(Some((expected, config)))
    }
}

fn sha256(bytes: &[u8]) -> [u8; 32] {
    let mut out = [0; 32];
    out.copy_from_slice(digest::digest(&digest::SHA256, bytes).as_ref());
    out
}

/// Sorts by name; of equal names the last one stays, which is what lets a delta replace by appending.
fn sort_named<T>(items: &mut Vec<T>, name: impl Fn(&T) -> &String) {
    items.sort_by(|a, b| name(a).cmp(name(b)));
    items.reverse();
    items.dedup_by(|earlier, kept| name(earlier) == name(kept));
    items.reverse();
}

fn retain_unlisted<T>(items: &mut Vec<T>, removed: &[String], name: impl Fn(&T) -> &String) {
    if !removed.is_empty() {
        let removed: BTreeSet<&String> = removed.iter().collect();
        items.retain(|item| !removed.contains(name(item)));
    }
}

fn diff_named<T: Clone + PartialEq>(
    old: &[T],
    new: &[T],
    name: impl Fn(&T) -> &String,
) -> (Vec<T>, Vec<String>) {
    let before: BTreeMap<&String, &T> = old.iter().map(|item| (name(item), item)).collect();
    let after: BTreeSet<&String> = new.iter().map(&name).collect();
    let changed = new.iter().filter(|item| before.get(name(item)) != Some(item)).cloned().collect();
    let removed = before.keys().filter(|n| !after.contains(**n)).map(|n| (*n).clone()).collect();
    (changed, removed)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::proto::{
        control::{ConnectorConfig, LinkConfig, ListenerConfig, RouterSettings},
        routing::Record,
    };
    use proptest::prelude::*;

    prop_compose! {
        fn any_config()(
            site_name in prop::option::of("[a-c]"),
            links in prop::collection::vec(("[a-f]", 0_u32..3), 0..6),
            listeners in prop::collection::vec(("[a-f]", "[a-c]"), 0..6),
            connectors in prop::collection::vec(("[a-f]", 0_u32..3), 0..6),
            records in prop::collection::vec((0_u8..6, 0_u8..2), 0..6),
        ) -> RouterConfig {
            let mut config = RouterConfig {
                settings: Some(RouterSettings {
                    site_name: site_name.unwrap_or_default(),
                    ..RouterSettings::default()
                }),
                links: links.into_iter()
                    .map(|(name, cost)| LinkConfig { name, cost, ..LinkConfig::default() })
                    .collect(),
                listeners: listeners.into_iter()
                    .map(|(name, address)| ListenerConfig { name, address, ..ListenerConfig::default() })
                    .collect(),
                connectors: connectors.into_iter()
                    .map(|(name, weight)| ConnectorConfig { name, weight, ..ConnectorConfig::default() })
                    .collect(),
                records: records.into_iter()
                    .map(|(body, signature)| Record {
                        body: vec![body].into(),
                        signature: vec![signature].into(),
                    })
                    .collect(),
            };
            canonicalise(&mut config);
            config
        }
    }

    /// A delta is only offered when it is smaller than the document; padding makes it so.
    fn padded(mut config: RouterConfig) -> RouterConfig {
        config.connectors.push(ConnectorConfig {
            name: "zz-padding".into(),
            address: "x".repeat(2_000),
            ..ConnectorConfig::default()
        });
        canonicalise(&mut config);
        config
    }

    proptest! {
        #[test]
        fn the_delta_between_two_configurations_leads_from_one_to_the_other(
            old in any_config(), new in any_config(),
        ) {
            let (old, new) = (padded(old), padded(new));
            let delta = diff(4, &old, 5, &new).expect("a delta is smaller here");
            prop_assert_eq!(apply(4, &old, &delta).unwrap(), new);
        }

        #[test]
        fn the_hash_does_not_depend_on_the_order_of_items(config in any_config()) {
            let mut shuffled = config.clone();
            shuffled.links.reverse();
            shuffled.listeners.reverse();
            shuffled.connectors.reverse();
            shuffled.records.reverse();
            canonicalise(&mut shuffled);
            prop_assert_eq!(hash(&shuffled), hash(&config));
        }

        #[test]
        fn arbitrary_chunks_never_panic(
            chunks in prop::collection::vec((0_u64..2, prop::collection::vec(any::<u8>(), 0..64), any::<bool>()), 0..8),
        ) {
            let mut assembler = Assembler::default();
            for (version, chunk, last) in chunks {
                let sha256 = sha256(&chunk).to_vec();
                // Whatever comes out, it must come out without a panic.
                drop(assembler.push(&Snapshot { version, chunk, last, sha256 }));
            }
        }
    }

    #[test]
    fn a_snapshot_travels_in_chunks() {
        let mut config = RouterConfig {
            connectors: (0..40_000)
                .map(|n| ConnectorConfig {
                    name: format!("connector-{n:05}"),
                    address: "service.with.a.rather.long.name".into(),
                    ..ConnectorConfig::default()
                })
                .collect(),
            ..RouterConfig::default()
        };
        canonicalise(&mut config);
        let chunks = snapshot(7, &config);
        assert!(chunks.len() > 1 && chunks.iter().all(|c| c.chunk.len() <= CHUNK_LEN_MAX));
        let mut assembler = Assembler::default();
        let (last, head) = chunks.split_last().unwrap();
        for chunk in head {
            assert_eq!(assembler.push(chunk), Ok(None));
        }
        assert_eq!(assembler.push(last), Ok(Some((7, config))));
    }

    #[test]
    fn what_is_too_large_is_refused_once() {
        let chunk = |version, last| {
            let chunk = vec![0; CHUNK_LEN_MAX];
            Snapshot { version, chunk, last, sha256: Vec::new() }
        };
        let mut assembler = Assembler::default();
        for _ in 0..CONFIG_LEN_MAX / CHUNK_LEN_MAX {
            assert_eq!(assembler.push(&chunk(1, false)), Ok(None));
        }
        assert_eq!(assembler.push(&chunk(1, false)), Err(ConfigError::TooLarge));
        assert_eq!(assembler.push(&chunk(1, false)), Ok(None));
        assert_eq!(assembler.push(&chunk(1, true)), Ok(None));
        let config = padded(RouterConfig::default());
        let again = assembler.push(&snapshot(1, &config)[0]);
        assert_eq!(again, Ok(Some((1, config))));
    }

    #[test]
    fn the_empty_configuration_is_one_chunk() {
        let chunks = snapshot(1, &RouterConfig::default());
        assert_eq!(chunks.len(), 1);
        assert_eq!(Assembler::default().push(&chunks[0]), Ok(Some((1, RouterConfig::default()))));
    }

    #[test]
    fn damage_is_noticed() {
        let config = padded(RouterConfig::default());
        let mut chunk = snapshot(1, &config).remove(0);
        chunk.chunk[3] ^= 1;
        assert_eq!(Assembler::default().push(&chunk), Err(ConfigError::HashMismatch));

        let mut other = config.clone();
        other.connectors[0].weight = 9;
        let mut delta = diff(1, &padded(config.clone()), 2, &other).unwrap_or_default();
        delta.from_version = 1;
        assert_eq!(
            apply(3, &config, &delta),
            Err(ConfigError::WrongVersion { from: 1, current: 3 })
        );
        delta.sha256 = vec![0; 32];
        assert_eq!(apply(1, &config, &delta), Err(ConfigError::HashMismatch));
    }

    #[test]
    fn chunks_of_two_versions_do_not_mix() {
        let mut assembler = Assembler::default();
        let begun = Snapshot { version: 1, chunk: vec![1], ..Snapshot::default() };
        assert_eq!(assembler.push(&begun), Ok(None));
        let other = Snapshot { version: 2, chunk: vec![1], ..Snapshot::default() };
        assert_eq!(assembler.push(&other), Err(ConfigError::MixedVersions { expected: 1, got: 2 }));
    }
}
