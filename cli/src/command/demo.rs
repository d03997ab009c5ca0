//! `skctl demo`
use crate::{args::Global, error::Failure};
use clap::Args;
/// Shows the whole thing on this machine: four sites, a download, and a transit killed under it
#[derive(Debug, Args)]
pub(crate) struct Demo {}
pub(crate) async fn run(_: &Global, _: Demo) -> Result<(), Failure> {
    Err(Failure::new("x"))
}
