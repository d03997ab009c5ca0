//! `skctl`; started under the name `skein-router` or `skein-controller` it is that program.

use std::{ffi::OsString, path::Path, process::ExitCode};

fn main() -> ExitCode {
    let args: Vec<OsString> = std::env::args_os().collect();
    let name = args.first().map(Path::new).and_then(Path::file_name).and_then(|name| name.to_str());
    match name {
        Some("skein-router") => skein_router::run(args.into_iter()),
        Some("skein-controller") => skein_controller::run(args.into_iter()),
        _ => skctl::run(args.into_iter()),
    }
}
