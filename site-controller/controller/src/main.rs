//! The controller as a program of its own.

use std::process::ExitCode;

fn main() -> ExitCode {
    skein_controller::run(std::env::args_os())
}
