//! The Skein data-plane router.
//!
//! `ARCHITECTURE.md` has the data path file by file. Binaries call [`run`]; tests start any number of routers
//! in one process with [`Router::start`].

mod api;
mod association;
mod carrier;
mod claims;
pub mod clock;
mod config;
mod control;
mod credentials;
mod data;
pub mod egress;
pub mod fabric;
pub mod flows;
mod gate;
pub mod ingress;
mod key;
pub mod link;
mod metrics;
#[cfg(not(feature = "sim"))]
pub mod net;
#[cfg(feature = "sim")]
#[path = "net/sim.rs"]
pub mod net;
mod panic;
mod respawn;
mod router;
pub mod session;
pub mod splice;
mod telemetry;

pub use config::{Config, ControllerAddress};
pub use router::{Router, Runtimes, StartError};

use clap::Parser as _;
use std::{ffi::OsString, process::ExitCode};

/// Runs a router as a process of its own until SIGTERM or SIGINT, then drains; `args` begins with the program's name.
///
/// Exits 0 after an orderly end, 1 after a failure, 2 on wrong arguments.
pub fn run(args: impl Iterator<Item = OsString>) -> ExitCode {
    let args = match config::Args::try_parse_from(args) {
        Ok(args) => args,
        Err(error) => {
            // Nothing is left to do when even the usage message cannot be printed.
            let _ = error.print();
            return if error.use_stderr() { ExitCode::from(2) } else { ExitCode::SUCCESS };
        }
    };
    telemetry::install(args.log_format, &args.log_level);
    panic::abort_the_process();
    let outcome = router::run_process(args.into_config());
    if let Err(error) = &outcome {
        tracing::error!(error = format!("{error:#}"), "router failed");
    }
    telemetry::finish();
    if outcome.is_ok() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
