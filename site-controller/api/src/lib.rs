//! What users write and read: resources, status documents, the token format.
//!
//! Nothing here does I/O, reads a clock or draws randomness: text in, types out. Resources are YAML or JSON documents
//! ([`parse_documents`]), status documents are JSON ([`status`]), tokens are small text files ([`Token`]).

mod access;
mod connector;
mod invalid;
mod link;
mod listener;
mod manifest;
mod resource;
mod site;
pub mod status;
mod token;
mod value;
mod yaml;

pub use access::{AccessGrantSpec, AccessTokenSpec, GuestScope, TOKEN_EXPIRES_MAX, TOKEN_USES_MAX};
pub use connector::{
    CONNECTOR_TARGETS_MAX, ConnectorPort, ConnectorSpec, ProxyProtocol, Retry, SourceAddress,
    Strategy,
};
pub use invalid::{Invalid, Invalids};
pub use link::{LINK_COST_MAX, LINK_ENDPOINTS_MAX, LinkSpec};
pub use listener::{ListenerPort, ListenerSpec, PORTS_MAX};
pub use manifest::{API_VERSION, Condition, Manifest, Metadata, Phase, ResourceStatus, Spec};
pub use resource::{Kind, Resource, UnknownKind};
pub use site::{AutoListen, DEFAULT_PORT, Limits, Platform, ProxySpec, Role, Service, SiteSpec};
pub use token::{CODE_LEN_MIN, Code, TOKEN_LEN_MAX, Token, TokenError};
pub use value::{
    Duration, DurationError, HostPort, HostPortError, NAME_LEN_MAX, Protocol, valid_host,
    valid_name,
};
pub use yaml::{
    DOCUMENT_LEN_MAX, DOCUMENTS_MAX, INPUT_LEN_MAX, ParseError, parse_documents, parse_json,
    parse_stored, to_yaml,
};
