//! Back-up of an identity: an `age` file (scrypt, passphrase) around keys and the few facts a rebuilt site needs.
//!
//! It opens with the `age` program too, so nobody depends on this one to see what is in it.

use std::{
    io::{Read as _, Write as _},
    iter,
};

use age::secrecy::SecretString;
use data_encoding::BASE64;
use prost::Message as _;
use serde::{Deserialize, Serialize};
use skein_api::{Kind, Resource};
use skein_core::SiteId;
use skein_site_core::Endorsed;
use skein_trust::{SiteCa, SiteIdentity};
use skein_wire::proto::control::Learned;
use zeroize::Zeroizing;

use crate::{
    controller::Controller,
    site::{Kept, Rebuilt},
    store::LEARNED_LEN_MAX,
};

/// Shortest passphrase taken: scrypt makes guessing slow, not impossible.
pub const PASSPHRASE_LEN_MIN: usize = 8;
/// Most work an archive may ask for (log2 N): about a minute and 1 GiB on a small machine; more is an attack.
const WORK_FACTOR_MAX: u8 = 20;
/// Longest content: two keys, a certificate, the resources, and what was heard of others.
const CONTENT_LEN_MAX: u64 = (LEARNED_LEN_MAX as u64) * 2;
/// Longest archive.
pub const ARCHIVE_LEN_MAX: usize = LEARNED_LEN_MAX * 2 + (1 << 16);
const FORMAT: &str = "skein-identity-1";

/// Why an identity was not exported or read.
#[derive(Debug, thiserror::Error)]
pub enum ArchiveError {
    /// Too easy to guess.
    #[error("the passphrase is too short; use at least {PASSPHRASE_LEN_MIN} characters")]
    ShortPassphrase,
    /// Not an age file, or cut short.
    #[error("this is not an exported identity, or it is damaged ({0})")]
    Damaged(String),
    /// The passphrase does not fit.
    #[error("the passphrase is wrong")]
    Passphrase,
    /// Encryption failed.
    #[error("cannot encrypt: {0}")]
    Encrypt(String),
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Content {
    format: String,
    identity: Zeroizing<String>,
    ca_key: Zeroizing<String>,
    ca_certificate: String,
    network: String,
    authorities: Vec<String>,
    /// Site, links, listeners and connectors, as YAML.
    #[serde(default)]
    resources: String,
    #[serde(default)]
    endorsed: Vec<Endorsed>,
    /// What was heard of others, encoded.
    #[serde(default)]
    learned: String,
}

impl Controller {
    /// The identity of this site, encrypted.
    pub(crate) fn export_identity(&self, passphrase: &str) -> Result<Vec<u8>, ArchiveError> {
        let (site, resources, endorsed, learned) = {
            let state = self.state();
            // Tokens are secrets of somebody else, and grants end with the site that made them.
            let is_kept = |resource: &Resource| {
                !matches!(resource.kind(), Kind::AccessGrant | Kind::AccessToken)
            };
            let resources: Vec<Resource> = state.resources.iter().filter(is_kept).collect();
            let endorsed: Vec<Endorsed> = state.endorsed.values().cloned().collect();
            (state.site.clone(), resources, endorsed, state.learned.to_vec())
        };
        let (network, authorities) = (site.network, site.authorities);
        let learned = Learned { records: learned }.encode_to_vec();
        let content = Content {
            format: FORMAT.to_owned(),
            resources: skein_api::to_yaml(&resources),
            endorsed,
            learned: BASE64.encode(&learned),
            identity: Zeroizing::new(BASE64.encode(&self.identity.to_secret_bytes())),
            ca_key: Zeroizing::new(BASE64.encode(self.ca.key_pkcs8())),
            ca_certificate: BASE64.encode(self.ca.certificate()),
            network,
            authorities,
        };
        seal(&content, passphrase)
    }
}

fn seal(content: &Content, passphrase: &str) -> Result<Vec<u8>, ArchiveError> {
    if passphrase.chars().count() < PASSPHRASE_LEN_MIN {
        return Err(ArchiveError::ShortPassphrase);
    }
    let failed = |error: &dyn std::fmt::Display| ArchiveError::Encrypt(error.to_string());
    let json = Zeroizing::new(serde_json::to_vec(content).map_err(|error| failed(&error))?);
    let encryptor = age::Encryptor::with_user_passphrase(SecretString::from(passphrase.to_owned()));
    let mut out = Vec::new();
    let mut writer = encryptor.wrap_output(&mut out).map_err(|error| failed(&error))?;
    writer.write_all(&json).map_err(|error| failed(&error))?;
    writer.finish().map_err(|error| failed(&error))?;
    Ok(out)
}

/// Reads an exported identity. Takes a second or more of computing.
///
/// # Errors
/// See [`ArchiveError`].
pub fn open(archive: &[u8], passphrase: &str) -> Result<Rebuilt, ArchiveError> {
    let damaged = |error: &dyn std::fmt::Display| ArchiveError::Damaged(error.to_string());
    let decryptor = age::Decryptor::new(archive).map_err(|error| damaged(&error))?;
    let mut identity = age::scrypt::Identity::new(SecretString::from(passphrase.to_owned()));
    identity.set_max_work_factor(WORK_FACTOR_MAX);
    let reader = decryptor.decrypt(iter::once(&identity as &dyn age::Identity)).map_err(
        |error| match error {
            age::DecryptError::NoMatchingKeys
            | age::DecryptError::KeyDecryptionFailed
            | age::DecryptError::DecryptionFailed => ArchiveError::Passphrase,
            other => damaged(&other),
        },
    )?;
    let mut json = Zeroizing::new(Vec::new());
    reader.take(CONTENT_LEN_MAX).read_to_end(&mut json).map_err(|error| damaged(&error))?;
    let content: Content = serde_json::from_slice(&json).map_err(|error| damaged(&error))?;
    if content.format != FORMAT {
        return Err(ArchiveError::Damaged(format!("it has the format {:?}", content.format)));
    }
    let bytes = |text: &str| BASE64.decode(text.as_bytes()).map(Zeroizing::new);
    let keys = bytes(&content.identity).map_err(|error| damaged(&error))?;
    let identity = SiteIdentity::from_secret_bytes(&keys).map_err(|error| damaged(&error))?;
    let ca_key = bytes(&content.ca_key).map_err(|error| damaged(&error))?;
    let certificate = bytes(&content.ca_certificate).map_err(|error| damaged(&error))?;
    let ca =
        SiteCa::load(identity.site_id(), &ca_key, &certificate).map_err(|error| damaged(&error))?;
    let network =
        SiteId::parse(&content.network).ok_or_else(|| damaged(&"its network is no site id"))?;
    let authorities = content.authorities.iter().filter_map(|text| SiteId::parse(text)).collect();
    let mut kept = Kept { endorsed: content.endorsed, ..Kept::default() };
    let learned = BASE64.decode(content.learned.as_bytes()).map_err(|error| damaged(&error))?;
    kept.learned = Learned::decode(learned.as_slice()).map_err(|error| damaged(&error))?.records;
    if !content.resources.is_empty() {
        let resources = skein_api::parse_stored(content.resources.as_bytes());
        for resource in resources.map_err(|error| damaged(&error))? {
            match resource {
                Resource::Site(site) => kept.site = Some(site),
                other => kept.resources.push(other),
            }
        }
    }
    Ok(Rebuilt { identity, ca, network, authorities, kept })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::{Store, tests::site};

    #[test]
    fn what_is_exported_can_be_rebuilt() {
        let (_dir, paths) = site();
        let store = Store::new(paths);
        let controller = Controller::new(store.clone(), store.load().unwrap());
        assert!(matches!(controller.export_identity("short"), Err(ArchiveError::ShortPassphrase)));
        let archive = controller.export_identity("correct horse").unwrap();
        assert!(archive.starts_with(b"age-encryption.org/v1"));
        let rebuilt = open(&archive, "correct horse").unwrap();
        assert_eq!(rebuilt.identity.site_id(), controller.site);
        assert!(matches!(open(&archive, "wrong horse"), Err(ArchiveError::Passphrase)));
        assert!(matches!(open(b"garbage", "correct horse"), Err(ArchiveError::Damaged(_))));
        assert!(matches!(
            open(&archive[..archive.len() - 9], "correct horse"),
            Err(ArchiveError::Damaged(_))
        ));
    }
}
