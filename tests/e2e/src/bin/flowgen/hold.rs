//! Many connections that have proved to work once and then do nothing until SIGTERM.

use anyhow::Result;
use serde_json::json;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use crate::protocol::{Header, Mode};
use crate::{Target, net};

#[derive(clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    target: Target,
    /// Connections to hold.
    #[arg(long, default_value_t = 5000)]
    flows: u64,
}

pub(crate) async fn run(args: Args) -> Result<serde_json::Value> {
    let mut held = Vec::new();
    for flow in 0..args.flows {
        let mut stream = net::connect(args.target.connect).await?;
        let header = Header { mode: Mode::Echo, seed: args.target.seed, flow, rate: 0 };
        header.write(&mut stream).await?;
        stream.write_all(b"x").await?;
        stream.read_u8().await?;
        held.push(stream);
    }
    crate::print(&json!({ "holding": held.len() }));
    net::stopped().await?;
    Ok(json!({ "held": held.len() }))
}
