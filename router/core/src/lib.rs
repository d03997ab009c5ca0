//! Pure routing logic of the Skein router.
//!
//! This crate never opens a socket, reads a clock, spawns a task or draws a random number: events, the time and
//! randomness are arguments, decisions are return values. It does not know the encoding of anything.

mod address;
mod adjacency;
mod choose;
mod disjoint;
mod engine;
mod fib;
mod files;
mod id;
mod labels;
mod lsdb;
mod pages;
mod record;
mod share;
mod spf;
mod throttle;
mod trust;

pub use address::{ADDRESS_LEN_MAX, Address, AddressEntry, AddressError, Port, Protocol, Strategy};
pub use adjacency::AdjacencyState;
pub use choose::{Choice, Verdict, Wanted, choose};
pub use engine::{
    Engine, Identity, Input, Known, LinkUp, Message, NetworkView, Notary, Output, Rejection,
    RouterView, SealError, Settings, SiteView,
};
pub use fib::{Fib, LABELS_MAX, LocalRouter, Path, Provider, Providers, Route};
pub use files::{AUTOMATIC_MAX, FileShares, share_out_files};
pub use id::{Handle, Label, LinkId, PINS_MAX, Pin, RouterId, SiteId, parse_vaddr, vaddr};
pub use lsdb::{Entry, Lsdb};
pub use pages::page_of;
pub use record::{
    ADDRESS_PAGES, AddressPage, AgedRecord, Digest, Edition, LIFETIME_S_MAX, LinkAdvert, Origin,
    Payload, ROUTER_RECORD_LIFETIME, ROUTER_RECORD_REFRESH, Record, RecordDraft, RecordHeader,
    RecordKey, RecordKind, Role, RouterLsa, SUBKEY_LEN_MAX, Sealed, Subkey,
};
pub use share::{Portion, Room, fair_share};
pub use spf::HOPS_MAX;
pub use trust::{
    Endorsement, Evidence, Inception, KeyRotation, Membership, Pattern, Revocation, Scope,
    SiteStatement, TrustView, TrustedSite, evaluate,
};
