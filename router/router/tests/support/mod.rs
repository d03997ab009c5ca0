//! What the tests of whole routers share.

pub(crate) mod controller;
pub(crate) mod site;

/// Shows the log of all routers under `SKEIN_LOG=debug` or any other filter.
pub(crate) fn log() {
    if let Ok(filter) = std::env::var("SKEIN_LOG") {
        // Other tests of this process have installed it already.
        drop(tracing_subscriber::fmt().with_env_filter(filter).with_test_writer().try_init());
    }
}
