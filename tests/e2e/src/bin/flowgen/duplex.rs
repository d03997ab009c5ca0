//! Paced, framed, verified flows in both directions; the same code at both ends.

use std::time::Duration;

use anyhow::Result;
use serde::Serialize;
use serde_json::json;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use tokio::time::{Instant, timeout};

use crate::payload::{Direction, Payload};
use crate::protocol::{FRAME_MAX_BYTES, Header, Mode, Trailer};
use crate::{Target, net};

/// How often a paced flow sends.
const TICK: Duration = Duration::from_millis(20);
/// A silence worth reporting.
const GAP_MIN: Duration = Duration::from_millis(100);
/// Longer than the fabric lets a flow wait for a path, so that what is truncated shows as such.
const FINISH_TIMEOUT: Duration = Duration::from_secs(45);

#[derive(clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    target: Target,
    /// Flows at once.
    #[arg(long, default_value_t = 10)]
    flows: u64,
    /// Bytes a second, each way and flow.
    #[arg(long, default_value_t = 20_000)]
    rate: u64,
}

/// A time in which nothing arrived although the other end was sending.
#[derive(Clone, Copy, Debug, Serialize)]
pub(crate) struct Gap {
    flow: u64,
    /// Its start, since this process began.
    at_ms: u128,
    length_ms: u128,
}

/// One end's account of a flow.
#[derive(Debug, Default)]
pub(crate) struct Account {
    own: Trailer,
    peer: Option<Trailer>,
    gaps: Vec<Gap>,
    error: Option<String>,
}

pub(crate) async fn run(args: Args) -> Result<serde_json::Value> {
    let (start, start_unix_ms) = (Instant::now(), net::unix_ms());
    let (stop, stopping) = watch::channel(false);
    // Room for each flow's one word.
    let (open, opened) = mpsc::channel(usize::try_from(args.flows)?.max(1));
    let mut flows = JoinSet::new();
    for flow in 0..args.flows {
        let (open, stopping) = (open.clone(), stopping.clone());
        flows.spawn(client(args.target.clone(), flow, args.rate, start, stopping, open));
    }
    drop(open);
    tokio::select! {
        outcome = net::stopped() => outcome?,
        outcome = tell_when_open(opened, args.flows) => outcome?,
    }
    // Nobody listens any more only if every flow has ended already.
    let _ = stop.send(true);
    let accounts = flows.join_all().await;
    Ok(report(&accounts, start_unix_ms))
}

/// Says on stdout that something has arrived on every flow, if so; completes when this process is told to stop.
async fn tell_when_open(mut opened: mpsc::Receiver<()>, flows: u64) -> Result<()> {
    let mut open = 0;
    while opened.recv().await.is_some() {
        open += 1;
    }
    if open == flows {
        crate::print(&json!({ "open": open }));
    }
    std::future::pending().await
}

fn report(accounts: &[Account], start_unix_ms: u128) -> serde_json::Value {
    let sum = |f: fn(&Account) -> u64| accounts.iter().map(f).sum::<u64>();
    let errors: Vec<_> = accounts.iter().filter_map(|a| a.error.clone()).collect();
    let gaps: Vec<_> = accounts.iter().flat_map(|a| a.gaps.clone()).collect();
    let short = |a: &&Account| {
        a.error.is_none()
            && a.peer.is_none_or(|p| p.sent != a.own.received || p.received != a.own.sent)
    };
    json!({
        "flows": accounts.len(),
        "sent": sum(|a| a.own.sent),
        "received": sum(|a| a.own.received),
        "wrong": sum(|a| a.own.wrong + a.peer.map_or(0, |p| p.wrong)),
        "failed": errors.len(),
        "truncated": accounts.iter().filter(short).count(),
        "errors": errors,
        "start_unix_ms": start_unix_ms,
        "gaps": gaps,
    })
}

async fn client(
    target: Target,
    flow: u64,
    rate: u64,
    start: Instant,
    stopping: watch::Receiver<bool>,
    is_open: mpsc::Sender<()>,
) -> Account {
    let header = Header { mode: Mode::Duplex, seed: target.seed, flow, rate };
    let open = async {
        let mut stream = net::connect(target.connect).await?;
        header.write(&mut stream).await?;
        Ok::<_, std::io::Error>(stream)
    };
    match open.await {
        Ok(stream) => {
            let directions = [Direction::Up, Direction::Down];
            converse(stream, header, directions, start, stopping, Some(is_open)).await
        }
        Err(error) => {
            Account { error: Some(format!("flow {flow}: open: {error}")), ..Account::default() }
        }
    }
}

/// The server's end: it stops sending when the client has.
pub(crate) async fn serve(stream: TcpStream, header: Header, start: Instant) -> Account {
    let (_never, stopping) = watch::channel(false);
    converse(stream, header, [Direction::Down, Direction::Up], start, stopping, None).await
}

async fn converse(
    stream: TcpStream,
    header: Header,
    [outbound, inbound]: [Direction; 2],
    start: Instant,
    mut stopping: watch::Receiver<bool>,
    is_open: Option<mpsc::Sender<()>>,
) -> Account {
    let (reader, writer) = stream.into_split();
    let (done, peer_done) = watch::channel(None);
    let client = matches!(outbound, Direction::Up);
    let payload = Payload::new(header.seed, header.flow, inbound);
    let read = receive(reader, payload, header.flow, start, done, is_open);
    let stop = async {
        if client {
            // The sender of this signal lives as long as `run`.
            let _ = stopping.wait_for(|stop| *stop).await;
        } else {
            let _ = peer_done.clone().wait_for(Option::is_some).await;
        }
    };
    let payload = Payload::new(header.seed, header.flow, outbound);
    let write = send(writer, payload, header.rate, stop, peer_done.clone(), client);
    let both = async { tokio::join!(read, write) };
    let ((own, peer, gaps, read_error), write_outcome) = both.await;
    let (sent, write_error) = match write_outcome {
        Ok(sent) => (sent, None),
        Err(error) => (0, Some(format!("send: {error}"))),
    };
    let error = read_error.or(write_error).map(|error| format!("flow {}: {error}", header.flow));
    Account { own: Trailer { sent, ..own }, peer, gaps, error }
}

type Received = (Trailer, Option<Trailer>, Vec<Gap>, Option<String>);

/// Reads to the end; `is_open` hears of the first frame, `done` what arrived once the peer has said it sends no more.
async fn receive(
    mut reader: OwnedReadHalf,
    mut payload: Payload,
    flow: u64,
    start: Instant,
    done: watch::Sender<Option<Trailer>>,
    mut is_open: Option<mpsc::Sender<()>>,
) -> Received {
    let (mut own, mut gaps, mut last) = (Trailer::default(), Vec::new(), Instant::now());
    let mut buffer = vec![0; FRAME_MAX_BYTES];
    let outcome: std::io::Result<Trailer> = async {
        loop {
            let length = reader.read_u32().await? as usize;
            if let Some(is_open) = is_open.take() {
                // Nobody listens any more when this process has been told to stop.
                let _ = is_open.try_send(());
            }
            let silence = last.elapsed();
            // What passes before the first frame is the opening.
            if own.received > 0 && silence >= GAP_MIN {
                let at_ms = (last - start).as_millis();
                gaps.push(Gap { flow, at_ms, length_ms: silence.as_millis() });
            }
            last = Instant::now();
            if length == 0 {
                return Trailer::read(&mut reader).await;
            }
            let frame = buffer.get_mut(..length).ok_or(std::io::ErrorKind::InvalidData)?;
            reader.read_exact(frame).await?;
            own.received += length as u64;
            own.wrong += payload.check(frame);
        }
    }
    .await;
    match outcome {
        Ok(peer) => {
            done.send_replace(Some(own));
            let end = timeout(FINISH_TIMEOUT, reader.read(&mut buffer)).await;
            let error = match end {
                Ok(Ok(0)) => None,
                Ok(Ok(_)) => Some("bytes after the end".to_owned()),
                Ok(Err(error)) => Some(format!("end: {error}")),
                Err(_) => Some("no end".to_owned()),
            };
            (own, Some(peer), gaps, error)
        }
        Err(error) => {
            let error = format!("receive: {error}");
            // Dropping `done` tells the writer.
            (own, None, gaps, Some(error))
        }
    }
}

/// Sends until `stop`, then the trailer and FIN. A client's trailer cannot know what will still arrive,
/// so the server's alone carries the received count both ends are compared by.
async fn send(
    mut writer: OwnedWriteHalf,
    mut payload: Payload,
    rate: u64,
    stop: impl Future<Output = ()>,
    peer_done: watch::Receiver<Option<Trailer>>,
    client: bool,
) -> std::io::Result<u64> {
    let mut stop = std::pin::pin!(stop);
    let per_tick = usize::try_from(rate * 20 / 1000).unwrap_or(FRAME_MAX_BYTES);
    let mut frame = vec![0; per_tick.clamp(1, FRAME_MAX_BYTES - 4) + 4];
    let length = u32::try_from(frame.len() - 4).expect("invariant: frames are ≤ 64 KiB");
    let mut ticks = tokio::time::interval(TICK);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut sent = 0;
    loop {
        tokio::select! {
            biased;
            () = &mut stop => break,
            _ = ticks.tick(), if rate > 0 => {}
            () = std::future::ready(()), if rate == 0 => tokio::task::yield_now().await,
        }
        frame[..4].copy_from_slice(&length.to_be_bytes());
        payload.fill(&mut frame[4..]);
        writer.write_all(&frame).await?;
        sent += u64::from(length);
    }
    let received = peer_done.borrow().unwrap_or_default();
    let trailer = Trailer { sent, ..if client { Trailer::default() } else { received } };
    trailer.write(&mut writer).await?;
    writer.shutdown().await?;
    Ok(sent)
}
