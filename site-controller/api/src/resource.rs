//! The closed set of resource kinds.

use std::{fmt, str::FromStr};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::{
    access::{AccessGrantSpec, AccessTokenSpec},
    connector::ConnectorSpec,
    invalid::Invalids,
    link::LinkSpec,
    listener::ListenerSpec,
    manifest::{Manifest, Metadata, ResourceStatus},
    site::SiteSpec,
};

/// The kinds of resources.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, JsonSchema,
)]
pub enum Kind {
    /// The site itself; exactly one.
    Site,
    /// A link this site dials.
    Link,
    /// Permission for others to link to this site.
    AccessGrant,
    /// A token to be redeemed here.
    AccessToken,
    /// An explicit local endpoint of an address.
    Listener,
    /// An address served from here.
    Connector,
}

/// The text names no [`Kind`].
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("unknown kind {0:?}; kinds are site, link, accessgrant, accesstoken, listener, connector")]
pub struct UnknownKind(pub String);

impl Kind {
    /// Every kind, in the order in which they are applied.
    pub const ALL: [Self; 6] = [
        Self::Site,
        Self::Link,
        Self::AccessGrant,
        Self::AccessToken,
        Self::Listener,
        Self::Connector,
    ];

    /// The name as written in `kind:`.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Site => "Site",
            Self::Link => "Link",
            Self::AccessGrant => "AccessGrant",
            Self::AccessToken => "AccessToken",
            Self::Listener => "Listener",
            Self::Connector => "Connector",
        }
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for Kind {
    type Err = UnknownKind;

    /// Accepts any case, the plural, and the short forms `grant` and `token`.
    fn from_str(text: &str) -> Result<Self, UnknownKind> {
        match text.to_ascii_lowercase().as_str() {
            "site" | "sites" => Ok(Self::Site),
            "link" | "links" => Ok(Self::Link),
            "accessgrant" | "accessgrants" | "grant" | "grants" => Ok(Self::AccessGrant),
            "accesstoken" | "accesstokens" | "token" | "tokens" => Ok(Self::AccessToken),
            "listener" | "listeners" => Ok(Self::Listener),
            "connector" | "connectors" => Ok(Self::Connector),
            _ => Err(UnknownKind(text.to_owned())),
        }
    }
}

/// A resource of any kind.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(untagged)]
pub enum Resource {
    /// The site itself.
    Site(Manifest<SiteSpec>),
    /// A link this site dials.
    Link(Manifest<LinkSpec>),
    /// Permission for others to link to this site.
    AccessGrant(Manifest<AccessGrantSpec>),
    /// A token to be redeemed here.
    AccessToken(Manifest<AccessTokenSpec>),
    /// An explicit local endpoint of an address.
    Listener(Manifest<ListenerSpec>),
    /// An address served from here.
    Connector(Manifest<ConnectorSpec>),
}

/// Runs the same expression on the manifest of whatever kind.
macro_rules! each {
    ($resource:expr, $manifest:ident => $body:expr) => {
        match $resource {
            Resource::Site($manifest) => $body,
            Resource::Link($manifest) => $body,
            Resource::AccessGrant($manifest) => $body,
            Resource::AccessToken($manifest) => $body,
            Resource::Listener($manifest) => $body,
            Resource::Connector($manifest) => $body,
        }
    };
}

impl Resource {
    /// The kind.
    #[must_use]
    pub fn kind(&self) -> Kind {
        each!(self, manifest => manifest.kind)
    }

    /// The name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.metadata().name
    }

    /// Name, labels and annotations.
    #[must_use]
    pub fn metadata(&self) -> &Metadata {
        each!(self, manifest => &manifest.metadata)
    }

    /// The status, if it carries one.
    #[must_use]
    pub fn status(&self) -> Option<&ResourceStatus> {
        each!(self, manifest => manifest.status.as_ref())
    }

    /// Replaces the status.
    pub fn set_status(&mut self, status: Option<ResourceStatus>) {
        each!(self, manifest => manifest.status = status);
    }

    /// Checks every rule of its kind.
    ///
    /// # Errors
    /// All broken rules with their fields.
    pub fn validate(&self) -> Result<(), Invalids> {
        each!(self, manifest => manifest.validate())
    }

    /// The resource as one JSON object.
    #[must_use]
    pub fn to_json(&self) -> String {
        serde_json::to_string(self).expect("invariant: resources have string keys only")
    }
}
