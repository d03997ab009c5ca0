//! The Skein site controller: owns a site's identity, certificate authority, grants and wanted state, and tells its routers what to do.
//!
//! Everything decided purely is in `skein-site-core`; here is what touches files, sockets, clocks and processes.

mod clock;
mod net;
pub mod paths;
pub mod site;
pub mod store;

use std::{ffi::OsString, process::ExitCode};

pub use paths::{DEFAULT_NAMESPACE, Environment, PathError, Paths};

/// Runs a controller as a process of its own until SIGTERM or SIGINT; `args` begins with the program's name.
///
/// Exits 0 after an orderly end, 1 after a failure, 2 on wrong arguments.
pub fn run(args: impl Iterator<Item = OsString>) -> ExitCode {
    drop(args);
    ExitCode::FAILURE
}
