//! `skctl status`, `skctl network status`

use clap::{Args, Subcommand};
use skein_api::status::{NetworkStatus, SiteStatus};

use crate::{
    args::Global,
    client::Client,
    error::Failure,
    output,
    render::{Network as NetworkView, Site},
};

/// Shows this site: processes, links, services, and what is wrong
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  skctl status\n  skctl status -o json")]
pub(crate) struct Status {}

/// Shows the whole network
#[derive(Debug, Args)]
pub(crate) struct Network {
    #[command(subcommand)]
    action: Action,
}

#[derive(Debug, Subcommand)]
enum Action {
    Status(NetworkArgs),
}

/// Shows every site, router, link and address, and what is wrong
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  skctl network status\n  skctl network status -o wide")]
struct NetworkArgs {}

pub(crate) async fn run(global: &Global) -> Result<(), Failure> {
    let status: SiteStatus = Client::connect(global).await?.query("status").await?;
    output::show(global, &Site(status))
}

pub(crate) async fn network(global: &Global, args: Network) -> Result<(), Failure> {
    let Action::Status(_) = args.action;
    let status: NetworkStatus = Client::connect(global).await?.query("network").await?;
    output::show(global, &NetworkView(status))
}
