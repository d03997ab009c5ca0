//! The Skein site controller: owns a site's identity, certificate authority, grants and wanted state, and tells its routers what to do.
//!
//! Everything decided purely is in `skein-site-core`; here is what touches files, sockets, clocks and processes.

mod adopt;
mod archive;
mod attach;
mod claim;
mod clock;
mod controller;
mod doctor;
mod farewell;
mod hosts;
mod learned;
mod leave;
mod lock;
mod net;
mod observed;
mod panic;
pub mod paths;
pub mod platform;
mod process;
mod record;
mod served;
mod service;
pub mod site;
pub mod store;

pub use archive::{ARCHIVE_LEN_MAX, ArchiveError, PASSPHRASE_LEN_MIN, open as open_identity};
pub use lock::{LockError, StateLock};
pub use paths::{DEFAULT_NAMESPACE, Environment, PathError, Paths};
pub use process::run;

#[cfg(test)]
mod tests;
