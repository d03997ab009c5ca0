//! Bytes on the wire: protobuf messages, frame codec, conversions to and from the core types.
//!
//! Nothing here does I/O or reads a clock. `docs/protocol.md` describes every byte.

pub mod association;
pub mod config;
pub mod convert;
pub mod datagram;
pub mod frame;
pub mod framing;

/// Messages as defined in `proto/`, one module per package.
#[allow(
    missing_docs,
    unnameable_types,
    unused_qualifications,
    clippy::all,
    clippy::pedantic,
    clippy::allow_attributes_without_reason,
    reason = "generated code; the .proto files carry the documentation"
)]
pub mod proto {
    // The packages nest as in the .proto files, because generated code refers to its neighbours by relative path.
    pub mod skein {
        pub mod trust {
            pub mod v1 {
                include!(concat!(env!("OUT_DIR"), "/skein.trust.v1.rs"));
            }
        }
        pub mod routing {
            pub mod v1 {
                include!(concat!(env!("OUT_DIR"), "/skein.routing.v1.rs"));
            }
        }
        pub mod session {
            pub mod v1 {
                include!(concat!(env!("OUT_DIR"), "/skein.session.v1.rs"));
            }
        }
        pub mod control {
            pub mod v1 {
                include!(concat!(env!("OUT_DIR"), "/skein.control.v1.rs"));
            }
        }
        pub mod site {
            pub mod v1 {
                include!(concat!(env!("OUT_DIR"), "/skein.site.v1.rs"));
            }
        }
        pub mod claim {
            pub mod v1 {
                include!(concat!(env!("OUT_DIR"), "/skein.claim.v1.rs"));
            }
        }
    }
    pub use skein::claim::v1 as claim;
    pub use skein::control::v1 as control;
    pub use skein::routing::v1 as routing;
    pub use skein::session::v1 as session;
    pub use skein::site::v1 as site;
    pub use skein::trust::v1 as trust;
}
