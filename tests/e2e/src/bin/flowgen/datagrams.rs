//! Streams of datagrams, numbered and checked: the server answers each with one of its own, as long and as checked, and counts.
//!
//! A datagram is magic, flow, number, number of the datagram that is answered, its time, what the server has received and found wrong so
//! far, and bytes that follow from all that names it.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Result, ensure};
use serde_json::json;
use tokio::net::UdpSocket;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::{Instant, MissedTickBehavior, interval, sleep, timeout};

use crate::payload::{Direction, Payload};
use crate::{Target, net};

const MAGIC: u32 = 0x4447_524d;
const HEADER_LEN: usize = 52;
/// As long as UDP over IPv4 can carry.
const LEN_MAX: usize = 65_507;
/// Faster streams send several at a time.
const TICK_MIN: Duration = Duration::from_millis(2);
/// A silence worth reporting.
const GAP_MIN: Duration = Duration::from_millis(100);
/// What is on its way when a stream ends has so long to arrive.
const LINGER: Duration = Duration::from_secs(2);
/// Between questions to which no answer came.
const ASK_AGAIN: Duration = Duration::from_millis(500);

#[derive(clap::Args)]
pub(crate) struct ServeArgs {
    /// Where to listen.
    #[arg(long)]
    listen: SocketAddr,
}

#[derive(clap::Args)]
pub(crate) struct StreamArgs {
    #[command(flatten)]
    target: Target,
    /// Streams at once, each from a socket of its own.
    #[arg(long, default_value_t = 1)]
    flows: u64,
    /// Datagrams a second, each way and stream.
    #[arg(long, default_value_t = 50)]
    rate: u64,
    /// Lengths in bytes, in turn.
    #[arg(long, value_delimiter = ',', default_value = "200")]
    sizes: Vec<usize>,
}

#[derive(clap::Args)]
pub(crate) struct HoldArgs {
    #[command(flatten)]
    target: Target,
    /// Associations to hold.
    #[arg(long, default_value_t = 10_000)]
    flows: u64,
}

/// What a datagram says of itself.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Head {
    flow: u64,
    number: u64,
    answers: u64,
    sent_us: u64,
    received: u64,
    wrong: u64,
}

impl Head {
    fn write(&self, seed: u64, direction: Direction, len: usize) -> Vec<u8> {
        let mut out = MAGIC.to_be_bytes().to_vec();
        for n in [self.flow, self.number, self.answers, self.sent_us, self.received, self.wrong] {
            out.extend(n.to_be_bytes());
        }
        out.resize(len.clamp(HEADER_LEN, LEN_MAX), 0);
        self.payload(seed, direction).fill(&mut out[HEADER_LEN..]);
        out
    }

    /// The head, and how many bytes behind it are wrong.
    fn read(datagram: &[u8], seed: u64, direction: Direction) -> Option<(Self, u64)> {
        let word = |at: usize| Some(u64::from_be_bytes(*datagram.get(at..)?.first_chunk()?));
        if datagram.first_chunk() != Some(&MAGIC.to_be_bytes()) {
            return None;
        }
        let head = Self {
            flow: word(4)?,
            number: word(12)?,
            answers: word(20)?,
            sent_us: word(28)?,
            received: word(36)?,
            wrong: word(44)?,
        };
        let wrong = head.payload(seed, direction).check(&datagram[HEADER_LEN..]);
        Some((head, wrong))
    }

    fn payload(&self, seed: u64, direction: Direction) -> Payload {
        let name = self.flow.rotate_left(32) ^ self.number ^ self.answers.rotate_left(16);
        Payload::new(seed, name, direction)
    }
}

/// Who is to be answered from now on, and how it stands.
#[derive(Debug, Default)]
struct Heard {
    received: u64,
    wrong: u64,
    sent: u64,
}

pub(crate) async fn serve(args: ServeArgs) -> Result<serde_json::Value> {
    let socket = net::datagrams(args.listen).await?;
    crate::print(&json!({ "listening": socket.local_addr()?.to_string() }));
    let (mut flows, mut buffer) = (HashMap::<u64, Heard>::new(), vec![0; 1 << 16]);
    let mut stopped = std::pin::pin!(net::stopped());
    let mut damaged = 0_u64;
    loop {
        let received = tokio::select! {
            received = socket.recv_from(&mut buffer) => received,
            outcome = &mut stopped => {
                outcome?;
                let received: u64 = flows.values().map(|heard| heard.received).sum();
                return Ok(json!({ "flows": flows.len(), "received": received, "damaged": damaged }));
            }
        };
        // Of a client that is gone.
        let Ok((len, from)) = received else { continue };
        // The seed is the client's: it names the flow as well.
        let Some((head, _)) = Head::read(&buffer[..len], 0, Direction::Up) else {
            damaged += 1;
            continue;
        };
        let (_, wrong) =
            Head::read(&buffer[..len], seed_of(head.flow), Direction::Up).unwrap_or_default();
        let heard = flows.entry(head.flow).or_default();
        heard.received += 1;
        heard.wrong += wrong;
        let answer = Head {
            number: heard.sent,
            answers: head.number,
            received: heard.received,
            wrong: heard.wrong,
            ..head
        };
        heard.sent += 1;
        let answer = answer.write(seed_of(head.flow), Direction::Down, len);
        // A full socket is a loss like any other, and seen as such.
        let _ = socket.send_to(&answer, from).await;
    }
}

/// Flows have the seed in their upper half.
fn seed_of(flow: u64) -> u64 {
    flow >> 32
}

fn flow_of(seed: u64, n: u64) -> u64 {
    seed << 32 | n
}

/// How one stream went.
#[derive(Debug, Default)]
struct Account {
    sent: u64,
    received: u64,
    /// As the server counts.
    arrived: u64,
    wrong: u64,
    duplicates: u64,
    reordered: u64,
    rtts_us: Vec<u64>,
    /// Sixteenths of microseconds, so that it can be smoothed in whole numbers.
    jitter_16: u64,
    gap_max: Duration,
    /// Since the last one came, when it was told to stop.
    silence: Duration,
    gaps: u64,
    seen_max: Option<u64>,
    seen: Vec<bool>,
}

pub(crate) async fn stream(args: StreamArgs) -> Result<serde_json::Value> {
    ensure!(args.sizes.iter().all(|size| *size <= LEN_MAX), "at most {LEN_MAX} bytes");
    let (stop, stopping) = watch::channel(false);
    let mut streams = JoinSet::new();
    for n in 0..args.flows {
        let (target, sizes) = (args.target.clone(), args.sizes.clone());
        streams.spawn(run(target, n, args.rate, sizes, stopping.clone()));
    }
    net::stopped().await?;
    // Nobody listens any more only if every stream has ended already.
    let _ = stop.send(true);
    let accounts: Result<Vec<_>> = streams.join_all().await.into_iter().collect();
    Ok(report(accounts?))
}

async fn run(
    target: Target,
    n: u64,
    rate: u64,
    sizes: Vec<usize>,
    mut stopping: watch::Receiver<bool>,
) -> Result<Account> {
    let socket = net::datagrams_to(target.connect).await?;
    let (flow, start) = (flow_of(target.seed, n), Instant::now());
    let mut account = Account::default();
    let tick = Duration::from_micros(1_000_000 / rate.max(1)).max(TICK_MIN);
    let mut ticks = interval(tick);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let (mut buffer, mut last) = (vec![0; 1 << 16], Instant::now());
    let stop = async {
        // The sender lives as long as `stream`.
        let _ = stopping.wait_for(|stop| *stop).await;
    };
    let mut stop = std::pin::pin!(stop);
    let mut linger = std::pin::pin!(sleep(Duration::MAX));
    let mut is_stopping = false;
    loop {
        tokio::select! {
            _ = ticks.tick(), if !is_stopping => {
                let due = count(start.elapsed().as_millis()) * rate / 1_000 + 1;
                while account.sent < due {
                    let turn = usize::try_from(account.sent).unwrap_or_default();
                    send(&socket, &mut account, flow, start, sizes[turn % sizes.len()]).await;
                }
            }
            received = socket.recv(&mut buffer) => {
                // A port that is closed for the moment is told as an error.
                let Ok(len) = received else { continue };
                account.take(&buffer[..len], flow, start, &mut last);
            }
            () = &mut stop, if !is_stopping => {
                is_stopping = true;
                account.stop(last.elapsed());
                linger.as_mut().reset(Instant::now() + LINGER);
            }
            () = &mut linger => return Ok(account),
        }
    }
}

fn count(n: u128) -> u64 {
    u64::try_from(n).unwrap_or(u64::MAX)
}

async fn send(socket: &UdpSocket, account: &mut Account, flow: u64, start: Instant, size: usize) {
    let sent_us = count(start.elapsed().as_micros());
    let head = Head { flow, number: account.sent, sent_us, ..Head::default() };
    let datagram = head.write(seed_of(flow), Direction::Up, size);
    account.sent += 1;
    account.seen.push(false);
    // An error of an earlier one takes the place of this one, which is then lost and seen as such.
    let _ = socket.send(&datagram).await;
}

impl Account {
    /// A silence that nothing ends is one as well.
    fn stop(&mut self, silence: Duration) {
        self.silence = silence;
        if self.received > 0 && silence >= GAP_MIN {
            self.gaps += 1;
            self.gap_max = self.gap_max.max(silence);
        }
    }

    fn take(&mut self, datagram: &[u8], flow: u64, start: Instant, last: &mut Instant) {
        let head = Head::read(datagram, seed_of(flow), Direction::Down);
        let Some((head, wrong)) = head.filter(|(head, _)| head.flow == flow) else {
            self.wrong += 1;
            return;
        };
        let silence = last.elapsed();
        *last = Instant::now();
        if self.received > 0 && silence >= GAP_MIN {
            self.gaps += 1;
            self.gap_max = self.gap_max.max(silence);
        }
        self.wrong += wrong;
        self.arrived = self.arrived.max(head.received);
        if head.wrong > 0 {
            self.wrong += 1;
        }
        let seen = usize::try_from(head.answers).ok().and_then(|n| self.seen.get_mut(n));
        match seen.map(|seen| std::mem::replace(seen, true)) {
            Some(false) => self.received += 1,
            Some(true) => return self.duplicates += 1,
            None => return self.wrong += 1,
        }
        if self.seen_max.is_some_and(|max| head.answers < max) {
            self.reordered += 1;
        }
        self.seen_max = self.seen_max.max(Some(head.answers));
        let rtt_us = count(start.elapsed().as_micros()).saturating_sub(head.sent_us);
        // RFC 3550, 6.4.1, over the way there and back.
        if let Some(before) = self.rtts_us.last() {
            self.jitter_16 += rtt_us.abs_diff(*before);
            self.jitter_16 -= self.jitter_16 / 16;
        }
        self.rtts_us.push(rtt_us);
    }
}

fn report(accounts: Vec<Account>) -> serde_json::Value {
    let sum = |of: fn(&Account) -> u64| accounts.iter().map(of).sum::<u64>();
    let mut rtts: Vec<u64> = accounts.iter().flat_map(|a| a.rtts_us.iter().copied()).collect();
    rtts.sort_unstable();
    let at = |percent: usize| rtts.get(rtts.len() * percent / 100).copied().unwrap_or_default();
    let gap_max = accounts.iter().map(|a| a.gap_max).max().unwrap_or_default();
    let silence_max = accounts.iter().map(|a| a.silence).max().unwrap_or_default();
    let jitter_us = accounts.iter().map(|a| a.jitter_16 / 16).max();
    json!({
        "flows": accounts.len(),
        "sent": sum(|a| a.sent),
        "received": sum(|a| a.received),
        "received_min": accounts.iter().map(|a| a.received).min(),
        "lost": sum(|a| a.sent - a.received),
        "lost_up": sum(|a| a.sent.saturating_sub(a.arrived)),
        "wrong": sum(|a| a.wrong),
        "duplicates": sum(|a| a.duplicates),
        "reordered": sum(|a| a.reordered),
        "rtt_us": { "p50": at(50), "p99": at(99), "max": rtts.last().copied().unwrap_or(0) },
        "jitter_us": jitter_us,
        "gaps": sum(|a| a.gaps),
        "gap_max_ms": gap_max.as_millis(),
        "last_gap_max_ms": silence_max.as_millis(),
    })
}

/// Opens as many associations as asked for, and asks through each of them once more when told to stop.
pub(crate) async fn hold(args: HoldArgs) -> Result<serde_json::Value> {
    let mut held = Vec::new();
    let mut asked_again = 0;
    for n in 0..args.flows {
        let socket = net::datagrams_to(args.target.connect).await?;
        asked_again += ask(&socket, flow_of(args.target.seed, n), 0).await;
        held.push(socket);
    }
    crate::print(&json!({ "holding": held.len(), "asked_again": asked_again }));
    net::stopped().await?;
    let (mut fresh, mut asked_again) = (0, 0);
    for (n, socket) in (0..).zip(&held) {
        let flow = flow_of(args.target.seed, n);
        asked_again += ask(socket, flow, 1).await;
        fresh += 1;
    }
    Ok(json!({ "held": held.len(), "answered": fresh, "asked_again": asked_again }))
}

/// Asks until there is an answer; how often again.
async fn ask(socket: &UdpSocket, flow: u64, number: u64) -> u64 {
    let question = Head { flow, number, ..Head::default() };
    let question = question.write(seed_of(flow), Direction::Up, 100);
    let mut buffer = vec![0; 2_048];
    for again in 0.. {
        // Errors of earlier ones: the next is asked anyway.
        let _ = socket.send(&question).await;
        let deadline = Instant::now() + ASK_AGAIN;
        while let Ok(received) = timeout(deadline - Instant::now(), socket.recv(&mut buffer)).await
        {
            let Ok(len) = received else { break };
            let head = Head::read(&buffer[..len], seed_of(flow), Direction::Down);
            if head.is_some_and(|(head, wrong)| {
                head.flow == flow && head.answers == number && wrong == 0
            }) {
                return again;
            }
        }
    }
    unreachable!("invariant: asks for ever")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn any_damage_is_seen() {
        let head = Head { flow: flow_of(7, 3), number: 5, sent_us: 9, ..Head::default() };
        let mut datagram = head.write(7, Direction::Up, 1_420);
        assert_eq!(datagram.len(), 1_420);
        assert_eq!(Head::read(&datagram, 7, Direction::Up), Some((head, 0)));
        datagram[1_000] ^= 1;
        assert_eq!(Head::read(&datagram, 7, Direction::Up), Some((head, 1)));
        assert_eq!(Head::read(&datagram[..20], 7, Direction::Up), None);
        assert_eq!(head.write(7, Direction::Up, 0).len(), HEADER_LEN);
    }

    #[test]
    fn losses_repetitions_and_order_are_counted() {
        let (flow, start) = (flow_of(1, 0), Instant::now());
        let mut account = Account { sent: 4, seen: vec![false; 4], ..Account::default() };
        let mut last = Instant::now();
        for answers in [0, 3, 1, 1] {
            let head = Head { flow, answers, received: 4, ..Head::default() };
            account.take(&head.write(1, Direction::Down, 100), flow, start, &mut last);
        }
        assert_eq!((account.received, account.duplicates, account.reordered), (3, 1, 1));
        assert_eq!((account.wrong, account.arrived), (0, 4));
    }

    #[test]
    fn a_silence_to_the_end_is_one_of_a_stream_that_ran() {
        let silence = Duration::from_secs(9);
        let mut account = Account { received: 1, ..Account::default() };
        account.stop(silence);
        assert_eq!((account.gap_max, account.gaps), (silence, 1));
        let mut account = Account::default();
        account.stop(silence);
        assert_eq!((account.gap_max, account.silence), (Duration::ZERO, silence));
    }
}
