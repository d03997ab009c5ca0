//! Flows as fast as they go: shares, silences, and what a stalled reader does to the others.

use std::time::Duration;

use anyhow::Result;
use clap::ValueEnum;
use serde::Serialize;
use serde_json::json;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::task::JoinSet;
use tokio::time::{Instant, timeout, timeout_at};

use crate::payload::{Direction, Payload};
use crate::protocol::{Header, Mode};
use crate::{Target, net};

/// What is queued in between may take a while to drain.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(60);

#[derive(clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    target: Target,
    /// Flows at once.
    #[arg(long, default_value_t = 20)]
    flows: u64,
    /// Further flows whose server reads nothing.
    #[arg(long, default_value_t = 0)]
    stalled: u64,
    /// How long to send or receive.
    #[arg(long, default_value_t = 5)]
    seconds: u64,
    /// Which way the bytes go.
    #[arg(long, default_value = "up")]
    direction: Way,
    /// Bytes a second and flow; 0 is as fast as it goes.
    #[arg(long, default_value_t = 0)]
    rate: u64,
}

#[derive(Clone, Copy, ValueEnum)]
enum Way {
    Up,
    Down,
}

#[derive(Serialize)]
struct Share {
    /// Received in time.
    bytes: u64,
    wrong: u64,
    gap_max_ms: u64,
    error: Option<String>,
}

pub(crate) async fn run(args: Args) -> Result<serde_json::Value> {
    let start = Instant::now();
    let end = start + Duration::from_secs(args.seconds);
    let mut stalled = JoinSet::new();
    for flow in 0..args.stalled {
        let header = Header { mode: Mode::Stall, seed: args.target.seed, flow, rate: 0 };
        let mut stream = net::connect(args.target.connect).await?;
        header.write(&mut stream).await?;
        stalled.spawn(async move {
            let buffer = vec![0; 64 << 10];
            // It is meant to block for ever; the end of the run ends it.
            while stream.write_all(&buffer).await.is_ok() {}
        });
    }
    let mut flows = JoinSet::new();
    for flow in 0..args.flows {
        flows.spawn(one(args.target.clone(), flow, args.direction, args.rate, end));
    }
    let shares = flows.join_all().await;
    stalled.shutdown().await;
    let bytes: u64 = shares.iter().map(|share| share.bytes).sum();
    Ok(json!({
        "bytes": bytes,
        "bytes_per_s": bytes / args.seconds.max(1),
        "bytes_min": shares.iter().map(|share| share.bytes).min(),
        "bytes_max": shares.iter().map(|share| share.bytes).max(),
        "gap_max_ms": shares.iter().map(|share| share.gap_max_ms).max(),
        "wrong": shares.iter().map(|share| share.wrong).sum::<u64>(),
        "failed": shares.iter().filter(|share| share.error.is_some()).count(),
        "shares": shares,
    }))
}

async fn one(target: Target, flow: u64, way: Way, rate: u64, end: Instant) -> Share {
    let mode = match way {
        Way::Up => Mode::Up,
        Way::Down => Mode::Down,
    };
    let run = async {
        let mut stream = net::connect(target.connect).await?;
        let left = end.saturating_duration_since(Instant::now());
        let counted_ms = u64::try_from(left.as_millis()).unwrap_or(u64::MAX);
        let header = Header { mode, seed: target.seed, flow, rate: counted_ms };
        header.write(&mut stream).await?;
        match way {
            Way::Up => up(&mut stream, target.seed, flow, rate, end).await,
            Way::Down => down(&mut stream, target.seed, flow, end).await,
        }
    };
    run.await.unwrap_or_else(|error: std::io::Error| Share {
        bytes: 0,
        wrong: 0,
        gap_max_ms: 0,
        error: Some(error.to_string()),
    })
}

async fn up(
    stream: &mut TcpStream,
    seed: u64,
    flow: u64,
    rate: u64,
    end: Instant,
) -> std::io::Result<Share> {
    let mut payload = Payload::new(seed, flow, Direction::Up);
    let chunk = if rate == 0 { 64 << 10 } else { usize::try_from(rate / 50).unwrap_or(1).max(1) };
    let mut buffer = vec![0; chunk];
    let mut ticks = tokio::time::interval(Duration::from_millis(20));
    let mut sent = 0;
    while Instant::now() < end {
        if rate > 0 {
            ticks.tick().await;
        }
        payload.fill(&mut buffer);
        sent += buffer.len() as u64;
        // Not cut off at the end of the time: the server knows every byte of a whole chunk.
        stream.write_all(&buffer).await?;
        // A socket that always takes more would keep the other flows waiting for megabytes.
        tokio::task::yield_now().await;
    }
    stream.shutdown().await?;
    let answer = async {
        let received = stream.read_u64().await?;
        let (bytes, wrong) = (stream.read_u64().await?, stream.read_u64().await?);
        let gap_max_ms = stream.read_u64().await?;
        let error = (received != sent).then(|| format!("{received} of {sent} arrived"));
        Ok(Share { bytes, wrong, gap_max_ms, error })
    };
    timeout(ANSWER_TIMEOUT, answer).await?
}

async fn down(
    stream: &mut TcpStream,
    seed: u64,
    flow: u64,
    end: Instant,
) -> std::io::Result<Share> {
    let mut payload = Payload::new(seed, flow, Direction::Down);
    let mut share = Share { bytes: 0, wrong: 0, gap_max_ms: 0, error: None };
    let (mut buffer, mut last) = (vec![0; 256 << 10], Instant::now());
    // On a long way the first bytes may come when the time is over, but they come.
    let (mut has_begun, mut gap_max) = (false, Duration::ZERO);
    // The time alone does not end a read that always finds something.
    while !has_begun || Instant::now() < end {
        let until = if has_begun { end } else { end + ANSWER_TIMEOUT };
        let n = match timeout_at(until, stream.read(&mut buffer)).await {
            Ok(outcome) => outcome?,
            Err(_) if has_begun => break,
            Err(over) => return Err(over.into()),
        };
        if n == 0 {
            return Err(std::io::ErrorKind::UnexpectedEof.into());
        }
        has_begun = true;
        gap_max = gap_max.max(last.elapsed());
        last = Instant::now();
        if last < end {
            share.bytes += n as u64;
        }
        share.wrong += payload.check(&buffer[..n]);
    }
    // Nothing need end a silence.
    gap_max = gap_max.max(end.saturating_duration_since(last));
    share.gap_max_ms = u64::try_from(gap_max.as_millis()).unwrap_or(u64::MAX);
    net::reset_on_drop(stream)?;
    Ok(share)
}
