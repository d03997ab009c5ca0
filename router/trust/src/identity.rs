//! The identity key of a site, its chain of rotations, and the ids derived from keys and names.

use crate::hash::sha256;
use aws_lc_rs::{
    rand::SecureRandom,
    signature::{ED25519, Ed25519KeyPair, KeyPair, UnparsedPublicKey},
};
use skein_core::{Handle, RouterId, SiteId};
use skein_wire::proto::trust::{Inception, KeyRotation};
use std::fmt;
use zeroize::Zeroizing;

/// Length of Ed25519 public keys and seeds, in bytes.
pub const KEY_LEN: usize = 32;
/// Longest chain of rotations accepted; a key a month lasts five years.
pub const ROTATIONS_MAX: usize = 64;

const SITE_CONTEXT: &[u8] = b"skein-site/1";
const ROUTER_CONTEXT: &[u8] = b"skein-router/1";
const HANDLE_CONTEXT: &[u8] = b"skein-handle/1";
const ROTATION_CONTEXT: &[u8] = b"skein-rotation/1";
const STORED_MAGIC: &[u8] = b"skein-identity/1\n";

/// A public identity key.
pub type PublicKey = [u8; KEY_LEN];

/// Why keys could not be made, read or used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum IdentityError {
    /// The source of randomness failed.
    #[error("the system has no randomness to make a key from")]
    Randomness,
    /// Stored bytes are not an identity.
    #[error("the stored identity is damaged or of another version")]
    Damaged,
    /// The stored key chain contradicts itself.
    #[error("the stored identity's key chain is broken: {0}")]
    Chain(#[from] ChainError),
    /// No more rotations fit.
    #[error("the identity key has been rotated {ROTATIONS_MAX} times, the most there can be")]
    Exhausted,
}

/// Why a chain of identity keys is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ChainError {
    /// No inception, or a key or hash in it has the wrong length.
    #[error("it has no well-formed inception")]
    Inception,
    /// The inception hashes to another id.
    #[error("its inception belongs to another site id")]
    WrongSite,
    /// More than [`ROTATIONS_MAX`] steps.
    #[error("it has more than {ROTATIONS_MAX} rotations")]
    TooLong,
    /// A step is malformed.
    #[error("rotation {0} is malformed")]
    Malformed(usize),
    /// The key is not the one committed to before.
    #[error("rotation {0} uses a key nobody committed to")]
    NotCommitted(usize),
    /// The step is not signed by the key it introduces.
    #[error("rotation {0} is not signed by its own key")]
    Signature(usize),
    /// A known chain is not continued but contradicted.
    #[error("it contradicts the key history known of this site")]
    Fork,
}

/// An Ed25519 signing key. Its seed is wiped from memory when dropped and never shown.
pub(crate) struct IdentityKey {
    seed: Zeroizing<[u8; KEY_LEN]>,
    public: PublicKey,
}

impl IdentityKey {
    fn generate(random: &dyn SecureRandom) -> Result<Self, IdentityError> {
        let mut seed = Zeroizing::new([0; KEY_LEN]);
        random.fill(seed.as_mut()).map_err(|_| IdentityError::Randomness)?;
        Ok(Self::from_seed(seed))
    }

    fn from_seed(seed: Zeroizing<[u8; KEY_LEN]>) -> Self {
        let mut public = [0; KEY_LEN];
        public.copy_from_slice(key_pair(&seed).public_key().as_ref());
        Self { seed, public }
    }

    fn sign(&self, parts: &[&[u8]]) -> [u8; 64] {
        let mut signature = [0; 64];
        signature.copy_from_slice(key_pair(&self.seed).sign(&parts.concat()).as_ref());
        signature
    }

    fn commitment(&self) -> [u8; 32] {
        sha256(&[&self.public])
    }
}

impl fmt::Debug for IdentityKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("IdentityKey").finish_non_exhaustive()
    }
}

fn key_pair(seed: &[u8; KEY_LEN]) -> Ed25519KeyPair {
    Ed25519KeyPair::from_seed_unchecked(seed).expect("invariant: any 32 bytes are an Ed25519 seed")
}

/// Whether `signature` over `parts` in sequence is by `key`.
pub(crate) fn verify(key: &PublicKey, parts: &[&[u8]], signature: &[u8]) -> bool {
    UnparsedPublicKey::new(&ED25519, key).verify(&parts.concat(), signature).is_ok()
}

/// The private identity of a site: the key in use, the committed next key, and the history that leads to them.
///
/// Only the controller holds it. It signs statements, endorsements and revocations, nothing else.
#[derive(Debug)]
pub struct SiteIdentity {
    site: SiteId,
    key: IdentityKey,
    next: IdentityKey,
    inception: Inception,
    rotations: Vec<KeyRotation>,
}

impl SiteIdentity {
    /// A site is born.
    ///
    /// # Errors
    /// [`IdentityError::Randomness`].
    pub fn generate(random: &dyn SecureRandom) -> Result<Self, IdentityError> {
        let (key, next) = (IdentityKey::generate(random)?, IdentityKey::generate(random)?);
        let inception = Inception {
            identity_key: key.public.to_vec(),
            next_key_sha256: next.commitment().to_vec(),
        };
        let site = site_id(&key.public, &next.commitment());
        Ok(Self { site, key, next, inception, rotations: Vec::new() })
    }

    /// The site's id; rotations never change it.
    #[must_use]
    pub fn site_id(&self) -> SiteId {
        self.site
    }

    /// The public key in use.
    #[must_use]
    pub fn public_key(&self) -> PublicKey {
        self.key.public
    }

    /// Puts the committed next key in use and commits to a fresh one.
    ///
    /// # Errors
    /// [`IdentityError::Randomness`], [`IdentityError::Exhausted`]; the identity is unchanged then.
    pub fn rotate(&mut self, random: &dyn SecureRandom) -> Result<(), IdentityError> {
        if self.rotations.len() >= ROTATIONS_MAX {
            return Err(IdentityError::Exhausted);
        }
        let next = IdentityKey::generate(random)?;
        self.key = std::mem::replace(&mut self.next, next);
        let step = self.rotations.len();
        let commitment = self.next.commitment();
        let signature = self.key.sign(&rotation_parts(&self.site, &step_bytes(step), &commitment));
        self.rotations.push(KeyRotation {
            identity_key: self.key.public.to_vec(),
            next_key_sha256: commitment.to_vec(),
            signature: signature.to_vec(),
        });
        Ok(())
    }

    /// The public history, as statements carry it.
    #[must_use]
    pub fn chain(&self) -> (Inception, Vec<KeyRotation>) {
        (self.inception.clone(), self.rotations.clone())
    }

    /// How often the key was rotated.
    #[must_use]
    pub fn rotations(&self) -> usize {
        self.rotations.len()
    }

    pub(crate) fn sign(&self, parts: &[&[u8]]) -> [u8; 64] {
        self.key.sign(parts)
    }

    /// The secret form for storage in a file of mode 0600; wiped from memory when dropped.
    #[must_use]
    pub fn to_secret_bytes(&self) -> Zeroizing<Vec<u8>> {
        let mut out = Zeroizing::new(Vec::with_capacity(1024));
        out.extend_from_slice(STORED_MAGIC);
        out.extend_from_slice(self.key.seed.as_ref());
        out.extend_from_slice(self.next.seed.as_ref());
        out.extend_from_slice(&self.inception.identity_key);
        out.extend_from_slice(&self.inception.next_key_sha256);
        for rotation in &self.rotations {
            out.extend_from_slice(&rotation.identity_key);
            out.extend_from_slice(&rotation.next_key_sha256);
            out.extend_from_slice(&rotation.signature);
        }
        out
    }

    /// Reads what [`to_secret_bytes`](Self::to_secret_bytes) wrote.
    ///
    /// # Errors
    /// [`IdentityError::Damaged`], and [`IdentityError::Chain`] when keys and history disagree.
    pub fn from_secret_bytes(bytes: &[u8]) -> Result<Self, IdentityError> {
        const ROTATION_LEN: usize = 2 * KEY_LEN + 64;
        let rest = bytes.strip_prefix(STORED_MAGIC).ok_or(IdentityError::Damaged)?;
        let (seed, rest) = rest.split_first_chunk().ok_or(IdentityError::Damaged)?;
        let (next_seed, rest) = rest.split_first_chunk().ok_or(IdentityError::Damaged)?;
        let (inception_key, rest) = rest.split_at_checked(KEY_LEN).ok_or(IdentityError::Damaged)?;
        let (commitment, rest) = rest.split_at_checked(KEY_LEN).ok_or(IdentityError::Damaged)?;
        if !rest.len().is_multiple_of(ROTATION_LEN) {
            return Err(IdentityError::Damaged);
        }
        let inception = Inception {
            identity_key: inception_key.to_vec(),
            next_key_sha256: commitment.to_vec(),
        };
        let rotation = |bytes: &[u8]| KeyRotation {
            identity_key: bytes[..KEY_LEN].to_vec(),
            next_key_sha256: bytes[KEY_LEN..2 * KEY_LEN].to_vec(),
            signature: bytes[2 * KEY_LEN..].to_vec(),
        };
        let rotations: Vec<_> = rest.chunks_exact(ROTATION_LEN).map(rotation).collect();
        let chain = KeyChain::verify(None, &inception, &rotations)?;
        let key = IdentityKey::from_seed(Zeroizing::new(*seed));
        let next = IdentityKey::from_seed(Zeroizing::new(*next_seed));
        if key.public != chain.key || next.commitment() != chain.next_key_sha256 {
            return Err(IdentityError::Damaged);
        }
        Ok(Self { site: chain.site, key, next, inception, rotations })
    }
}

/// A verified history of identity keys.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KeyChain {
    /// The site it belongs to.
    pub site: SiteId,
    /// The key now in use.
    pub key: PublicKey,
    /// The commitment to the key after it.
    pub next_key_sha256: [u8; 32],
    /// For each rotation, a hash over it: tells forks from continuations.
    steps: Vec<[u8; 32]>,
}

impl KeyChain {
    /// Checks a history from its inception; with `expected`, also that it is this site's.
    ///
    /// # Errors
    /// See [`ChainError`].
    pub fn verify(
        expected: Option<SiteId>,
        inception: &Inception,
        rotations: &[KeyRotation],
    ) -> Result<Self, ChainError> {
        let mut key = array(&inception.identity_key).ok_or(ChainError::Inception)?;
        let mut next_key_sha256 = array(&inception.next_key_sha256).ok_or(ChainError::Inception)?;
        let site = site_id(&key, &next_key_sha256);
        if expected.is_some_and(|expected| expected != site) {
            return Err(ChainError::WrongSite);
        }
        if rotations.len() > ROTATIONS_MAX {
            return Err(ChainError::TooLong);
        }
        let mut steps = Vec::with_capacity(rotations.len());
        for (step, rotation) in rotations.iter().enumerate() {
            let to = array(&rotation.identity_key).ok_or(ChainError::Malformed(step))?;
            let commitment = array(&rotation.next_key_sha256).ok_or(ChainError::Malformed(step))?;
            if sha256(&[&to]) != next_key_sha256 {
                return Err(ChainError::NotCommitted(step));
            }
            let number = step_bytes(step);
            if !verify(&to, &rotation_parts(&site, &number, &commitment), &rotation.signature) {
                return Err(ChainError::Signature(step));
            }
            (key, next_key_sha256) = (to, commitment);
            steps.push(sha256(&[&key, &next_key_sha256]));
        }
        Ok(Self { site, key, next_key_sha256, steps })
    }

    /// Number of rotations.
    #[must_use]
    pub fn rotations(&self) -> usize {
        self.steps.len()
    }

    /// Whether this chain is `known` or a continuation of it.
    #[must_use]
    pub fn continues(&self, known: &Self) -> bool {
        self.site == known.site && self.steps.starts_with(&known.steps)
    }
}

/// The id of the site born with these: SHA-256 over the context, the key and the commitment.
#[must_use]
pub fn site_id(identity_key: &PublicKey, next_key_sha256: &[u8; 32]) -> SiteId {
    SiteId(sha256(&[SITE_CONTEXT, identity_key, next_key_sha256]))
}

/// The id of the router of this name at this site.
#[must_use]
pub fn router_id(site: SiteId, name: &str) -> RouterId {
    let digest = sha256(&[ROUTER_CONTEXT, &site.0, name.as_bytes()]);
    let mut id = [0; 16];
    id.copy_from_slice(&digest[..16]);
    RouterId(id)
}

/// The handle of one boot of a router; on a collision the later router goes on to the next `attempt`.
#[must_use]
pub fn handle(router: RouterId, boot_epoch: u64, attempt: u32) -> Handle {
    let digest =
        sha256(&[HANDLE_CONTEXT, &router.0, &boot_epoch.to_be_bytes(), &attempt.to_be_bytes()]);
    let value = u32::from_be_bytes([digest[0], digest[1], digest[2], digest[3]]);
    // 0 means "none" in frame headers.
    Handle(value.max(1))
}

fn rotation_parts<'a>(
    site: &'a SiteId,
    step: &'a [u8; 4],
    commitment: &'a [u8; 32],
) -> [&'a [u8]; 4] {
    [ROTATION_CONTEXT, &site.0, step, commitment]
}

fn step_bytes(step: usize) -> [u8; 4] {
    u32::try_from(step).expect("invariant: at most ROTATIONS_MAX steps").to_be_bytes()
}

fn array(bytes: &[u8]) -> Option<[u8; 32]> {
    bytes.try_into().ok()
}
