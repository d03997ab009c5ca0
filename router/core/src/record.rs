//! Records: the unit of flooding.
//!
//! A record is named by its [`RecordKey`]; of two with the same key the greater [`Edition`] wins. The payload is parsed once
//! at the edge of the process; what was signed travels along untouched in [`Sealed`].

use crate::{
    AddressEntry, Endorsement, Handle, Label, LinkId, Revocation, RouterId, SiteId, SiteStatement,
};
use std::{fmt, sync::Arc, time::Duration};

/// Longest subkey in bytes: a site id.
pub const SUBKEY_LEN_MAX: usize = 32;
/// How long a router record lives without a refresh.
pub const ROUTER_RECORD_LIFETIME: Duration = Duration::from_secs(60 * 60);
/// A router issues its records anew after this time: two refreshes may be lost.
pub const ROUTER_RECORD_REFRESH: Duration = Duration::from_secs(20 * 60);
/// Longest lifetime of any record but revocations: endorsements are valid for seven days, plus a day of grace for renewal.
pub const LIFETIME_S_MAX: u32 = 8 * 24 * 60 * 60;
/// Pages over which a router's addresses are hashed: a change re-floods about 1/64 of them.
pub const ADDRESS_PAGES: u8 = 64;

/// What a record says, as a number on the wire. The order is that of dependence: a kind is verified with the ones before it.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum RecordKind {
    /// A site about itself.
    SiteStatement,
    /// A site vouches for another.
    Endorsement,
    /// A site withdraws all trust from another.
    Revocation,
    /// A router and its links.
    RouterLsa,
    /// Some of the addresses a router serves.
    AddressPage,
    /// From a later version: kept and passed on, not understood.
    Unknown(u32),
}

impl RecordKind {
    /// The number in [`RecordKey`] and on the wire.
    #[must_use]
    pub fn number(self) -> u32 {
        match self {
            Self::SiteStatement => 1,
            Self::Endorsement => 2,
            Self::Revocation => 3,
            Self::RouterLsa => 4,
            Self::AddressPage => 5,
            Self::Unknown(number) => number,
        }
    }

    /// The inverse of [`Self::number`]; `None` for 0, which no record may carry.
    #[must_use]
    pub fn from_number(number: u32) -> Option<Self> {
        Some(match number {
            0 => return None,
            1 => Self::SiteStatement,
            2 => Self::Endorsement,
            3 => Self::Revocation,
            4 => Self::RouterLsa,
            5 => Self::AddressPage,
            other => Self::Unknown(other),
        })
    }

    /// Longest lifetime such a record may ask for, in seconds. Revocations have no limit: one that aged out would let
    /// back in whoever is still endorsed somewhere.
    #[must_use]
    pub fn lifetime_s_max(self) -> u32 {
        if self == Self::Revocation { u32::MAX } else { LIFETIME_S_MAX }
    }

    /// Statements of sites: signed by identity keys, kept by controllers.
    #[must_use]
    pub fn is_statement(self) -> bool {
        matches!(self, Self::SiteStatement | Self::Endorsement | Self::Revocation)
    }
}

/// Who signed a record.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Origin {
    /// A site, with its identity key.
    Site(SiteId),
    /// A router, with the key of the certificate in its LSA.
    Router(RouterId),
}

/// Tells records of one kind and origin apart: a subject's site id, a page number, or nothing.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Subkey {
    bytes: [u8; SUBKEY_LEN_MAX],
    len: u8,
}

impl Subkey {
    /// The subkey of kinds of which an origin has only one.
    pub const EMPTY: Self = Self { bytes: [0; SUBKEY_LEN_MAX], len: 0 };

    /// `None` if `bytes` is longer than [`SUBKEY_LEN_MAX`].
    #[must_use]
    pub fn new(bytes: &[u8]) -> Option<Self> {
        let mut out = Self::EMPTY;
        out.bytes.get_mut(..bytes.len())?.copy_from_slice(bytes);
        out.len = u8::try_from(bytes.len()).ok()?;
        Some(out)
    }

    /// The subkey of statements about `site`.
    #[must_use]
    pub fn site(site: SiteId) -> Self {
        Self { bytes: site.0, len: 32 }
    }

    /// The subkey of an address page.
    #[must_use]
    pub fn page(page: u8) -> Self {
        let mut out = Self { len: 1, ..Self::EMPTY };
        out.bytes[0] = page;
        out
    }

    /// The bytes on the wire.
    #[must_use]
    pub fn as_bytes(&self) -> &[u8] {
        &self.bytes[..usize::from(self.len)]
    }
}

impl fmt::Debug for Subkey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.as_bytes().iter().take(5).try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

/// Names a record.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct RecordKey {
    /// What it says.
    pub kind: RecordKind,
    /// Who says it.
    pub origin: Origin,
    /// About what.
    pub subkey: Subkey,
}

impl RecordKey {
    /// The key of a router's LSA.
    #[must_use]
    pub fn lsa(router: RouterId) -> Self {
        let origin = Origin::Router(router);
        Self { kind: RecordKind::RouterLsa, origin, subkey: Subkey::EMPTY }
    }

    /// The key of one of a router's address pages.
    #[must_use]
    pub fn page(router: RouterId, page: u8) -> Self {
        let origin = Origin::Router(router);
        Self { kind: RecordKind::AddressPage, origin, subkey: Subkey::page(page) }
    }

    /// The key of a site's statement about itself.
    #[must_use]
    pub fn statement(site: SiteId) -> Self {
        let origin = Origin::Site(site);
        Self { kind: RecordKind::SiteStatement, origin, subkey: Subkey::EMPTY }
    }

    /// The key of `issuer`'s endorsement of `subject`.
    #[must_use]
    pub fn endorsement(issuer: SiteId, subject: SiteId) -> Self {
        let origin = Origin::Site(issuer);
        Self { kind: RecordKind::Endorsement, origin, subkey: Subkey::site(subject) }
    }

    /// The key of `issuer`'s revocation of `subject`.
    #[must_use]
    pub fn revocation(issuer: SiteId, subject: SiteId) -> Self {
        let origin = Origin::Site(issuer);
        Self { kind: RecordKind::Revocation, origin, subkey: Subkey::site(subject) }
    }
}

/// Whether a router carries frames for others.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub enum Role {
    /// May be transit.
    Interior,
    /// Never transit.
    #[default]
    Edge,
}

/// One router and its links.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct RouterLsa {
    /// The router, also the record's origin.
    pub router: RouterId,
    /// Its site.
    pub site: SiteId,
    /// Its name within the site.
    pub name: Arc<str>,
    /// The site's name, for people.
    pub site_name: Arc<str>,
    /// Whether it may be transit.
    pub role: Role,
    /// Names it in frame headers during this boot.
    pub handle: Handle,
    /// Grows with every start.
    pub boot_epoch: u64,
    /// The router's address pages with a lower sequence are void: those of earlier boots.
    pub pages_since: u64,
    /// DER certificate whose key signs this router's records.
    pub certificate: Arc<[u8]>,
    /// Its links, ascending by label.
    pub links: Vec<LinkAdvert>,
    /// Lowest protocol version spoken.
    pub protocol_min: u32,
    /// Highest protocol version spoken.
    pub protocol_max: u32,
    /// `host:port` on which it accepts links.
    pub endpoints: Vec<String>,
    /// Software version.
    pub version: Arc<str>,
    /// A farewell: it has no links and no addresses any more.
    pub leaving: bool,
}

/// One end's view of a link.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct LinkAdvert {
    /// The router at the other end.
    pub neighbor: RouterId,
    /// Identity of the link, the same at both ends.
    pub link: LinkId,
    /// This end's number for it.
    pub label: Label,
    /// Configured cost, 1 to 65535.
    pub cost: u16,
    /// Quantised smoothed RTT in microseconds.
    pub rtt_us: u32,
    /// Largest end-to-end packet, frame header excluded, in bytes.
    pub mtu: u16,
}

/// The addresses of a router whose hash falls on one page.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct AddressPage {
    /// Ascending by address, no address twice.
    pub entries: Vec<Arc<AddressEntry>>,
}

/// What a record says, parsed.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Payload {
    /// See [`RecordKind::SiteStatement`].
    SiteStatement(Arc<SiteStatement>),
    /// See [`RecordKind::Endorsement`].
    Endorsement(Endorsement),
    /// See [`RecordKind::Revocation`].
    Revocation(Revocation),
    /// See [`RecordKind::RouterLsa`].
    RouterLsa(Arc<RouterLsa>),
    /// See [`RecordKind::AddressPage`].
    AddressPage(AddressPage),
    /// Not understood; the bytes are in [`Sealed::body`].
    Unknown,
}

/// First half of SHA-256 over a record's body. The signature is left out of it: whoever passes a record on can change some
/// kinds of signatures so that they still hold.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Digest(pub [u8; 16]);

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().take(4).try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

/// Of two records with the same key the one of the greater edition wins. Nobody should seal two with one sequence; of those
/// of somebody who does, the digest makes everybody choose the same.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Edition {
    /// Counted by the origin.
    pub sequence: u64,
    /// Of the record's body.
    pub digest: Digest,
}

/// The exact bytes that were signed, and the signature.
#[derive(Clone, PartialEq, Eq)]
pub struct Sealed {
    /// Encoded body.
    pub body: Arc<[u8]>,
    /// Over a domain prefix and the body.
    pub signature: Arc<[u8]>,
    /// Of the body.
    pub digest: Digest,
}

impl fmt::Debug for Sealed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Sealed({} bytes)", self.body.len())
    }
}

/// A parsed record. Whoever makes one guarantees that the payload agrees with the key and the sealed bytes; whether the
/// signature holds is the [`crate::Notary`]'s to say.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Record {
    /// Its name.
    pub key: RecordKey,
    /// The first half of its [`Edition`]. A router counts all its records in one row, so that of any two the later one is
    /// known.
    pub sequence: u64,
    /// Lifetime from its first sealing, in seconds; 0 is a purge.
    pub lifetime_s: u32,
    /// What it says.
    pub payload: Payload,
    /// What was signed.
    pub sealed: Sealed,
}

impl Record {
    /// Whether this record exists only to remove its predecessor.
    #[must_use]
    pub fn is_purge(&self) -> bool {
        self.lifetime_s == 0
    }

    /// Memory it holds on to, roughly, in bytes.
    #[must_use]
    pub fn size_bytes(&self) -> usize {
        // Parsed payloads take about as much as their encoding.
        size_of::<Self>() + 2 * self.sealed.body.len() + self.sealed.signature.len()
    }

    /// What it is compared by with others of its name.
    #[must_use]
    pub fn edition(&self) -> Edition {
        Edition { sequence: self.sequence, digest: self.sealed.digest }
    }

    /// Key and edition.
    #[must_use]
    pub fn header(&self) -> RecordHeader {
        RecordHeader { key: self.key, edition: self.edition() }
    }
}

/// A record before it is sealed.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct RecordDraft {
    /// Its name.
    pub key: RecordKey,
    /// Its sequence number.
    pub sequence: u64,
    /// Its lifetime in seconds; 0 is a purge.
    pub lifetime_s: u32,
    /// What it says.
    pub payload: Payload,
}

/// Enough to tell which of two databases is behind.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct RecordHeader {
    /// Which record.
    pub key: RecordKey,
    /// Which edition of it.
    pub edition: Edition,
}

/// A record on its way, with what is left of its lifetime.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct AgedRecord {
    /// The record.
    pub record: Arc<Record>,
    /// At most the signed lifetime, in seconds.
    pub remaining_s: u32,
}
