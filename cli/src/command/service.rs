//! `skctl service list`

use clap::{Args, Subcommand};
use skein_api::status::{ServiceRow, SiteStatus};

use crate::{
    args::{Format, Global},
    client::Client,
    error::Failure,
    output,
    render::{self, Services},
};

/// Shows what the network offers
#[derive(Debug, Args)]
pub(crate) struct Service {
    #[command(subcommand)]
    action: Action,
}

#[derive(Debug, Subcommand)]
enum Action {
    List(List),
}

/// Lists addresses: where to connect on this machine, who serves them, whether they work
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  skctl service list
  skctl service list -o hosts | sudo tee -a /etc/hosts
  skctl service list -o json")]
struct List {}

pub(crate) async fn run(global: &Global, args: Service) -> Result<(), Failure> {
    let Action::List(_) = args.action;
    let mut client = Client::connect(global).await?;
    let services: Vec<ServiceRow> = client.query("services").await?;
    if global.output == Format::Hosts {
        return output::print(&render::hosts(&services));
    }
    let is_linked = match services.is_empty() {
        true => client.query::<SiteStatus>("status").await?.links_up > 0,
        false => true,
    };
    output::show(global, &Services { rows: services, is_linked })
}
