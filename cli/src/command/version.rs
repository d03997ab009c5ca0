//! `skctl version`

use clap::Args;
use serde::Serialize;
use skein_api::status::VersionInfo;

use crate::{
    args::Global,
    client::Client,
    error::Failure,
    output::{self, Show},
};

/// Shows the versions of skctl, and of the site's controller and routers if they run
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  skctl version\n  skctl version --client -o json")]
pub(crate) struct Version {
    /// Only that of skctl
    #[arg(long)]
    client: bool,
}

pub(crate) async fn run(global: &Global, args: Version) -> Result<(), Failure> {
    let mut info = VersionInfo::default();
    // A site that is absent or down has no version, which is no failure.
    if !args.client
        && let Ok(mut client) = Client::connect(global).await
    {
        info = client.query("version").await?;
    }
    info.skctl = env!("CARGO_PKG_VERSION").to_owned();
    output::show(global, &Versions(info))
}

#[derive(Serialize)]
struct Versions(VersionInfo);

impl Show for Versions {
    fn table(&self, _: bool) -> String {
        let mut out = format!("skctl       {}\n", self.0.skctl);
        if !self.0.controller.is_empty() {
            out += &format!("controller  {}\n", output::printable(&self.0.controller));
        }
        for router in &self.0.routers {
            let line = format!("router      {} ({})", router.version, router.name);
            out += &(output::printable(&line) + "\n");
        }
        out
    }

    fn names(&self) -> Vec<String> {
        vec![self.0.skctl.clone()]
    }
}
