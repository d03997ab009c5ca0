//! Short flows at a steady rate, some killed by the client midway: nothing may be left of any of them.

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::Result;
use serde_json::json;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::task::JoinSet;
use tokio::time::{Instant, MissedTickBehavior, timeout};

use crate::payload::{Direction, Payload};
use crate::protocol::{Header, Mode};
use crate::{Target, net};

/// A flow that takes longer has failed.
const FLOW_TIMEOUT: Duration = Duration::from_secs(15);
/// Flows at once: a machine that is too busy for the rate makes fewer, instead of keeping all of them waiting.
const RUNNING_MAX: usize = 100;

#[derive(clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    target: Target,
    /// New flows a second.
    #[arg(long, default_value_t = 200)]
    rate: u64,
    /// How long.
    #[arg(long, default_value_t = 10)]
    seconds: u64,
    /// Bytes to and fro in each flow.
    #[arg(long, default_value_t = 4000)]
    bytes: usize,
    /// Kills one of so many flows midway; 0 none.
    #[arg(long, default_value_t = 100)]
    kill_every: u64,
}

enum Outcome {
    Done,
    Killed,
    Failed(String),
}

pub(crate) async fn run(args: Args) -> Result<serde_json::Value> {
    let end = Instant::now() + Duration::from_secs(args.seconds);
    let mut ticks = tokio::time::interval(Duration::from_micros(1_000_000 / args.rate.max(1)));
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let (mut running, mut outcomes, mut flow) = (JoinSet::new(), Vec::new(), 0_u64);
    while Instant::now() < end {
        tokio::select! {
            _ = ticks.tick(), if running.len() < RUNNING_MAX => {
                flow += 1;
                let kill = args.kill_every > 0 && flow.is_multiple_of(args.kill_every);
                running.spawn(one(args.target.clone(), flow, args.bytes, kill));
            }
            Some(done) = running.join_next(), if !running.is_empty() => outcomes.extend(done.ok()),
        }
    }
    outcomes.extend(running.join_all().await);
    let (mut done, mut killed, mut errors) = (0_u64, 0_u64, BTreeMap::<_, u64>::new());
    for outcome in outcomes {
        match outcome {
            Outcome::Done => done += 1,
            Outcome::Killed => killed += 1,
            Outcome::Failed(error) => *errors.entry(error).or_default() += 1,
        }
    }
    let failed: u64 = errors.values().sum();
    Ok(json!({ "done": done, "killed": killed, "failed": failed, "errors": errors }))
}

async fn one(target: Target, flow: u64, bytes: usize, kill: bool) -> Outcome {
    match timeout(FLOW_TIMEOUT, converse(target, flow, bytes, kill)).await {
        Ok(Ok(())) if kill => Outcome::Killed,
        Ok(Ok(())) => Outcome::Done,
        Ok(Err(error)) => Outcome::Failed(error.to_string()),
        Err(_) => Outcome::Failed(format!("not done within {FLOW_TIMEOUT:?}")),
    }
}

async fn converse(target: Target, flow: u64, bytes: usize, kill: bool) -> std::io::Result<()> {
    let mut stream = net::connect(target.connect).await?;
    Header { mode: Mode::Echo, seed: target.seed, flow, rate: 0 }.write(&mut stream).await?;
    let mut sent = vec![0; bytes];
    Payload::new(target.seed, flow, Direction::Up).fill(&mut sent);
    let (first, second) = sent.split_at(bytes / 2);
    let mut received = vec![0; first.len()];
    stream.write_all(first).await?;
    stream.read_exact(&mut received).await?;
    if kill {
        return net::reset_on_drop(&stream);
    }
    stream.write_all(second).await?;
    stream.shutdown().await?;
    stream.read_to_end(&mut received).await?;
    if received == sent { Ok(()) } else { Err(std::io::Error::other("the echo differs")) }
}
