//! Identities, signed statements, certificates and the verifiers that enforce them.
//!
//! Pure: no I/O, no clock, no runtime. Time and randomness are arguments.

mod ca;
mod certificate;
mod claim;
mod hash;
mod identity;
mod memo;
mod notary;
mod statement;
mod tls;
mod verifier;

pub use ca::{
    CA_VALIDITY_S, CSR_LEN_MAX, CaError, CertificateRole, Issued, KeyRequest, LEAF_VALIDITY_S,
    NOT_BEFORE_SLACK_S, ROUTER_NAME_LEN_MAX, SiteCa, SpiffeId, router_name_is_valid,
};
pub use certificate::{
    CHAIN_LEN_MAX, CaPin, Expected, PeerError, PeerIdentity, Usage, peer_identity,
    verify_controller, verify_introduction, verify_neighbour, verify_router,
};
pub use claim::{
    ALPN_CLAIM, AcceptedClaim, CLAIM_EXPORTER_LABEL, CLAIM_PROTOCOL, CLAIM_RECORDS_MAX,
    CLAIM_REQUEST_LEN_MAX, CLAIM_RESPONSE_LEN_MAX, CLOCK_DIFFERENCE_MAX_S, ClaimDraft, ClaimError,
    Code, CodeHash, Exporter, VerifiedAnswer, VerifiedClaim, claim_request, verify_answer,
    verify_claim,
};
pub use identity::{
    ChainError, IdentityError, KEY_LEN, KeyChain, PublicKey, ROTATIONS_MAX, SiteIdentity, handle,
    router_id, site_id,
};
pub use notary::RouterNotary;
pub use statement::{
    CAS_MAX, CERTIFICATE_LEN_MAX, ENDPOINT_LEN_MAX, ENDPOINTS_MAX, EndorsementDraft, Issuer,
    REASON_LEN_MAX, REVOCATION_LIFETIME_S, SCOPE_PATTERNS_MAX, SITE_NAME_LEN_MAX,
    STATEMENT_VALIDITY_S, StatementDraft, StatementError, VerifiedStatement, record_digest,
    verify_endorsement, verify_revocation, verify_statement,
};
pub use tls::{
    ALPN_CARRIER, ALPN_LINK, ALPN_SESSION, Admitted, Dial, IdentityCell, RouterIdentity,
    RouterIdentityError, RouterTls, SERVER_NAME, admit, carrier_probe_client, claim_carrier_client,
    claim_client, claim_server, explain_alert,
};
pub use verifier::TrustCell;
