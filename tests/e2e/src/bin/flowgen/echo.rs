//! One byte there and back on an open connection: what a round trip takes, and nothing else.

use std::time::Duration;

use anyhow::{Result, ensure};
use serde_json::json;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::time::{Instant, sleep, timeout};

use crate::protocol::{Header, Mode};
use crate::{Target, net};

/// An answer that takes longer does not come. Beside a bulk flow over a path that loses 7 % in 600 ms some took half a minute.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(120);

#[derive(clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    target: Target,
    /// Time between an answer and the next question.
    #[arg(long, default_value_t = 10)]
    interval_ms: u64,
    /// How long to ask.
    #[arg(long, default_value_t = 5)]
    seconds: u64,
}

/// Fails when an answer is wrong or does not come.
pub(crate) async fn run(args: Args) -> Result<serde_json::Value> {
    let mut stream = net::connect(args.target.connect).await?;
    let header = Header { mode: Mode::Echo, seed: args.target.seed, flow: 0, rate: 0 };
    header.write(&mut stream).await?;
    let mut question = 0_u8;
    // This one opens the flow, and does not count.
    ask(&mut stream, question).await?;
    let end = Instant::now() + Duration::from_secs(args.seconds);
    let mut took_us = Vec::new();
    while took_us.is_empty() || Instant::now() < end {
        sleep(Duration::from_millis(args.interval_ms)).await;
        question = question.wrapping_add(1);
        took_us.push(ask(&mut stream, question).await?.as_micros());
    }
    took_us.sort_unstable();
    let percentile = |p: usize| took_us.get(took_us.len() * p / 100).or_else(|| took_us.last());
    Ok(json!({
        "answers": took_us.len(),
        "p50_us": percentile(50),
        "p95_us": percentile(95),
        "p99_us": percentile(99),
        "max_us": took_us.last(),
    }))
}

/// How long the answer took.
async fn ask(stream: &mut TcpStream, question: u8) -> Result<Duration> {
    let began = Instant::now();
    stream.write_u8(question).await?;
    let answer = timeout(ANSWER_TIMEOUT, stream.read_u8()).await??;
    ensure!(answer == question, "asked {question}, answered {answer}");
    Ok(began.elapsed())
}
