//! Identities, signed statements, certificates and the verifiers that enforce them.
//!
//! Pure: no I/O, no clock, no runtime. Time and randomness are arguments.

mod hash;
mod identity;
mod statement;

pub use identity::{
    ChainError, IdentityError, KEY_LEN, KeyChain, PublicKey, ROTATIONS_MAX, SiteIdentity, handle,
    router_id, site_id,
};
pub use statement::{
    CAS_MAX, CERTIFICATE_LEN_MAX, ENDPOINT_LEN_MAX, ENDPOINTS_MAX, EndorsementDraft,
    REASON_LEN_MAX, REVOCATION_LIFETIME_S, SCOPE_PATTERNS_MAX, SITE_NAME_LEN_MAX,
    STATEMENT_LEN_MAX, STATEMENT_VALIDITY_S, StatementDraft, StatementError, VerifiedStatement,
    record_digest, verify_endorsement, verify_revocation, verify_statement,
};
