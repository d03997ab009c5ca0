//! New connections at a steady pace: who answers, and when does nobody.

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::Result;
use serde_json::json;
use tokio::io::AsyncReadExt as _;
use tokio::task::JoinSet;
use tokio::time::{Instant, MissedTickBehavior, timeout};

use crate::protocol::{Header, Mode};
use crate::{Target, net};

/// Failures that are told one by one.
const TOLD_MAX: usize = 1_000;
#[derive(clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    target: Target,
    /// Time between two connections.
    #[arg(long, default_value_t = 20)]
    interval_ms: u64,
    /// Ends after so many instead of at SIGTERM.
    #[arg(long)]
    count: Option<u64>,
    /// A connection that takes longer has failed.
    #[arg(long, default_value_t = 5_000)]
    timeout_ms: u64,
}

struct Probe {
    /// Since the first one.
    began_ms: u128,
    /// When it began and ended, to compare with what others did.
    unix_ms: [u128; 2],
    took_ms: u128,
    outcome: Result<String, String>,
}

pub(crate) async fn run(args: Args) -> Result<serde_json::Value> {
    let start = Instant::now();
    let (mut running, mut probes) = (JoinSet::new(), Vec::new());
    let mut ticks = tokio::time::interval(Duration::from_millis(args.interval_ms.max(1)));
    // What was missed on a busy machine does not come all at once.
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let limit = Duration::from_millis(args.timeout_ms);
    let mut stopped = std::pin::pin!(net::stopped());
    let mut made = 0;
    while args.count.is_none_or(|count| made < count) {
        tokio::select! {
            _ = ticks.tick() => {
                running.spawn(probe(args.target.clone(), limit, start));
                made += 1;
            }
            Some(done) = running.join_next(), if !running.is_empty() => probes.extend(done.ok()),
            outcome = &mut stopped => { outcome?; break }
        }
    }
    probes.extend(running.join_all().await);
    probes.sort_by_key(|probe| probe.began_ms);
    Ok(report(&probes))
}

async fn probe(target: Target, limit: Duration, start: Instant) -> Probe {
    let (began, began_unix_ms) = (Instant::now(), net::unix_ms());
    let ask = async {
        let mut stream = net::connect(target.connect).await?;
        let header = Header { mode: Mode::Name, seed: target.seed, flow: 0, rate: 0 };
        header.write(&mut stream).await?;
        let mut name = String::new();
        stream.read_to_string(&mut name).await?;
        Ok::<_, std::io::Error>(name)
    };
    let outcome = match timeout(limit, ask).await {
        Ok(Ok(name)) if !name.is_empty() => Ok(name),
        Ok(Ok(_)) => Err("no answer".to_owned()),
        Ok(Err(error)) => Err(error.to_string()),
        Err(_) => Err(format!("nothing within {limit:?}")),
    };
    let (began_ms, took_ms) = ((began - start).as_millis(), began.elapsed().as_millis());
    Probe { began_ms, unix_ms: [began_unix_ms, net::unix_ms()], took_ms, outcome }
}

fn report(probes: &[Probe]) -> serde_json::Value {
    let (mut servers, mut errors) = (BTreeMap::<_, u64>::new(), BTreeMap::<_, u64>::new());
    let (mut outage_ms, mut outage_start) = (0, None);
    let mut failed_unix_ms = Vec::new();
    for probe in probes {
        match &probe.outcome {
            Ok(name) => {
                *servers.entry(name).or_default() += 1;
                if let Some(began) = outage_start.take() {
                    outage_ms = outage_ms.max(probe.began_ms - began);
                }
            }
            Err(error) => {
                *errors.entry(error).or_default() += 1;
                failed_unix_ms.push(probe.unix_ms);
                outage_start.get_or_insert(probe.began_ms);
            }
        }
    }
    failed_unix_ms.truncate(TOLD_MAX);
    let mut took: Vec<_> = probes.iter().filter(|p| p.outcome.is_ok()).map(|p| p.took_ms).collect();
    took.sort_unstable();
    let percentile = |p: usize| took.get(took.len() * p / 100).or_else(|| took.last());
    json!({
        "probes": probes.len(),
        "ok": took.len(),
        "servers": servers,
        "errors": errors,
        "failed_unix_ms": failed_unix_ms,
        "outage_max_ms": outage_ms,
        "p50_ms": percentile(50),
        "p99_ms": percentile(99),
        "max_ms": took.last(),
    })
}
