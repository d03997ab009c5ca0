//! The router as a process.

use std::process::ExitCode;

fn main() -> ExitCode {
    skein_router::run(std::env::args_os())
}
