//! Identities, signed statements, certificates and the verifiers that enforce them.
