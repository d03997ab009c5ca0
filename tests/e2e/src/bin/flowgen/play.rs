//! Conversations by script. Both ends report what each step saw, so that a run through Skein can be
//! compared with a run without it.
//!
//! Steps, separated by `;`: `send N`, `recv N`, `fin`, `end` (read to the end), `exchange N` (send N and
//! FIN while reading to the end), `rst`, `wait MS`, `pingpong N`, `drip N MS`, `fill MS` (send until
//! nothing is taken for MS), `poke` (send until it fails).

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;
use tokio::time::timeout;

use crate::net;
use crate::payload::{Direction, Payload};

/// No step may take longer, a held connection of a minute included.
const STEP_TIMEOUT: Duration = Duration::from_secs(300);
/// `fill` that has not blocked after so many bytes never will.
const FILL_MAX_BYTES: u64 = 2 << 30;

#[derive(clap::Args)]
pub(crate) struct Args {
    /// Be the client.
    #[arg(long, conflicts_with = "listen", required_unless_present = "listen")]
    connect: Option<SocketAddr>,
    /// Be the server, until told to stop. Every connection is played and reported: a router that looks
    /// whether the target answers makes some as well.
    #[arg(long)]
    listen: Option<SocketAddr>,
    /// What to do.
    #[arg(long)]
    script: String,
}

enum Step {
    Send(u64),
    Receive(u64),
    Fin,
    End,
    Exchange(u64),
    Reset,
    Wait(Duration),
    PingPong(u64),
    Drip(u64, Duration),
    Fill(Duration),
    Poke,
}

struct Player {
    stream: TcpStream,
    outbound: Payload,
    inbound: Payload,
    client: bool,
    wrong: u64,
}

pub(crate) async fn run(args: Args) -> Result<Value> {
    let steps = parse(&args.script)?;
    match (args.connect, args.listen) {
        (Some(address), _) => match net::connect(address).await {
            Ok(stream) => Ok(play(stream, true, &steps).await),
            Err(error) => Ok(json!({ "connect": kind(&error) })),
        },
        (None, Some(address)) => serve(net::listen(address).await?, steps.into()).await,
        (None, None) => bail!("invariant: clap asks for one of them"),
    }
}

async fn serve(listener: TcpListener, steps: Arc<[Step]>) -> Result<Value> {
    let mut connections = JoinSet::new();
    let mut stopped = std::pin::pin!(net::stopped());
    loop {
        tokio::select! {
            outcome = listener.accept() => {
                let (stream, _) = outcome?;
                let steps = Arc::clone(&steps);
                connections.spawn(async move { play(stream, false, &steps).await });
            }
            outcome = &mut stopped => break outcome?,
        }
    }
    drop(listener);
    Ok(json!({ "connections": connections.join_all().await }))
}

async fn play(stream: TcpStream, client: bool, steps: &[Step]) -> Value {
    let (up, down) = (Payload::new(7, 0, Direction::Up), Payload::new(7, 0, Direction::Down));
    let (outbound, inbound) = if client { (up, down) } else { (down, up) };
    let mut player = Player { stream, outbound, inbound, client, wrong: 0 };
    let mut seen = Vec::new();
    for step in steps {
        let outcome = timeout(STEP_TIMEOUT, player.play(step)).await;
        seen.push(match outcome {
            Ok(Ok(value)) => value,
            Ok(Err(error)) => json!({ "error": kind(&error) }),
            Err(_) => json!("hangs"),
        });
    }
    json!({ "seen": seen, "wrong": player.wrong })
}

impl Player {
    async fn play(&mut self, step: &Step) -> std::io::Result<Value> {
        match *step {
            Step::Send(count) => {
                self.send(count).await?;
                Ok(json!({ "sent": count }))
            }
            Step::Receive(count) => {
                let mut bytes = vec![0; usize::try_from(count).unwrap_or(usize::MAX)];
                self.stream.read_exact(&mut bytes).await?;
                self.wrong += self.inbound.check(&bytes);
                Ok(json!({ "received": count }))
            }
            Step::Fin => self.stream.shutdown().await.map(|()| json!("fin")),
            Step::End => Ok(self.end().await),
            Step::Exchange(count) => self.exchange(count).await,
            Step::Reset => net::reset_on_drop(&self.stream).map(|()| json!("rst")),
            Step::Wait(time) => {
                tokio::time::sleep(time).await;
                Ok(json!("waited"))
            }
            Step::PingPong(count) => self.ping_pong(count).await,
            Step::Drip(count, every) => {
                for _ in 0..count {
                    tokio::time::sleep(every).await;
                    self.send(1).await?;
                }
                Ok(json!({ "sent": count }))
            }
            Step::Fill(quiet) => self.fill(quiet).await,
            Step::Poke => {
                // A reset reaches a writer only after something was written; how much is chance.
                loop {
                    if let Err(error) = self.stream.write_all(&[0; 1024]).await {
                        return Ok(json!({ "write": kind(&error) }));
                    }
                    tokio::time::sleep(Duration::from_millis(10)).await;
                }
            }
        }
    }

    async fn send(&mut self, count: u64) -> std::io::Result<()> {
        pump(&mut self.stream, &mut self.outbound, count).await
    }

    async fn end(&mut self) -> Value {
        let (received, wrong, how) = drain(&mut self.stream, &mut self.inbound).await;
        self.wrong += wrong;
        json!({ "received": received, "end": how })
    }

    async fn exchange(&mut self, count: u64) -> std::io::Result<Value> {
        let (mut reader, mut writer) = self.stream.split();
        let write = async {
            pump(&mut writer, &mut self.outbound, count).await?;
            writer.shutdown().await
        };
        let ((received, wrong, how), written) =
            tokio::join!(drain(&mut reader, &mut self.inbound), write);
        self.wrong += wrong;
        written?;
        Ok(json!({ "received": received, "end": how }))
    }

    async fn ping_pong(&mut self, count: u64) -> std::io::Result<Value> {
        let mut byte = [0];
        for _ in 0..count {
            if self.client {
                self.send(1).await?;
            }
            self.stream.read_exact(&mut byte).await?;
            self.wrong += self.inbound.check(&byte);
            if !self.client {
                self.send(1).await?;
            }
        }
        Ok(json!({ "rounds": count }))
    }

    /// Whether a reader that does not read holds the writer up.
    async fn fill(&mut self, quiet: Duration) -> std::io::Result<Value> {
        let (mut taken, mut buffer, mut done) = (0, vec![0; 64 << 10], 64 << 10);
        while taken < FILL_MAX_BYTES {
            if done == buffer.len() {
                self.outbound.fill(&mut buffer);
                done = 0;
            }
            match timeout(quiet, self.stream.write(&buffer[done..])).await {
                Ok(outcome) => {
                    let n = outcome?;
                    (done, taken) = (done + n, taken + n as u64);
                }
                Err(_) => return Ok(json!("blocked")),
            }
        }
        Ok(json!("never blocked"))
    }
}

async fn pump(
    to: &mut (impl tokio::io::AsyncWrite + Unpin),
    payload: &mut Payload,
    count: u64,
) -> std::io::Result<()> {
    let (mut left, mut buffer) = (count, vec![0; 64 << 10]);
    while left > 0 {
        let n = usize::try_from(left).unwrap_or(buffer.len()).min(buffer.len());
        payload.fill(&mut buffer[..n]);
        to.write_all(&buffer[..n]).await?;
        left -= n as u64;
    }
    Ok(())
}

async fn drain(
    from: &mut (impl tokio::io::AsyncRead + Unpin),
    payload: &mut Payload,
) -> (u64, u64, &'static str) {
    let (mut received, mut wrong, mut buffer) = (0, 0, vec![0; 64 << 10]);
    loop {
        match from.read(&mut buffer).await {
            Ok(0) => return (received, wrong, "fin"),
            Ok(n) => {
                received += n as u64;
                wrong += payload.check(&buffer[..n]);
            }
            Err(error) => return (received, wrong, kind(&error)),
        }
    }
}

/// A reset is a reset, whether reading or writing noticed it.
fn kind(error: &std::io::Error) -> &'static str {
    match error.kind() {
        std::io::ErrorKind::ConnectionReset | std::io::ErrorKind::BrokenPipe => "reset",
        std::io::ErrorKind::ConnectionRefused => "refused",
        std::io::ErrorKind::UnexpectedEof => "early end",
        _ => "other error",
    }
}

fn parse(script: &str) -> Result<Vec<Step>> {
    script.split(';').map(|step| parse_step(step.trim()).with_context(|| step.to_owned())).collect()
}

fn parse_step(step: &str) -> Result<Step> {
    let mut words = step.split_whitespace();
    let verb = words.next().context("an empty step")?;
    let mut number = || -> Result<u64> { Ok(words.next().context("a number")?.parse()?) };
    Ok(match verb {
        "send" => Step::Send(number()?),
        "recv" => Step::Receive(number()?),
        "fin" => Step::Fin,
        "end" => Step::End,
        "exchange" => Step::Exchange(number()?),
        "rst" => Step::Reset,
        "wait" => Step::Wait(Duration::from_millis(number()?)),
        "pingpong" => Step::PingPong(number()?),
        "drip" => Step::Drip(number()?, Duration::from_millis(number()?)),
        "fill" => Step::Fill(Duration::from_millis(number()?)),
        "poke" => Step::Poke,
        _ => bail!("no such step"),
    })
}
