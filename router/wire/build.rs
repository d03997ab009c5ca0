//! Compiles the protobuf definitions in Rust, so that no system `protoc` is needed.

use std::{error::Error, path::Path};

const FILES: [&str; 6] = [
    "skein/trust.proto",
    "skein/routing.proto",
    "skein/session.proto",
    "skein/control.proto",
    "skein/site.proto",
    "skein/claim.proto",
];

fn main() -> Result<(), Box<dyn Error>> {
    let root = Path::new("proto");
    let descriptors = protox::compile(FILES, [root])?;
    tonic_prost_build::configure()
        .build_client(std::env::var_os("CARGO_FEATURE_RPC").is_some())
        .build_server(std::env::var_os("CARGO_FEATURE_RPC").is_some())
        .bytes(".skein.routing.v1.Record")
        .compile_fds(descriptors)?;
    println!("cargo::rerun-if-changed=proto");
    Ok(())
}
