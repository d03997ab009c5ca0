//! The server: does with each connection what its header asks for.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::Result;
use serde_json::json;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::task::JoinSet;
use tokio::time::Instant;

use crate::payload::{Direction, Payload};
use crate::protocol::{Header, Mode};
use crate::{duplex, net};

/// How long a connection may take to say what it wants.
const HEADER_TIMEOUT: Duration = Duration::from_secs(60);

#[derive(clap::Args)]
pub(crate) struct Args {
    /// Where to listen.
    #[arg(long)]
    listen: SocketAddr,
    /// What to answer those who ask who this is.
    #[arg(long, default_value = "server")]
    name: String,
    /// Resets one of so many echo connections after its first bytes; 0 never.
    #[arg(long, default_value_t = 0)]
    kill_every: u64,
}

pub(crate) async fn run(args: Args) -> Result<serde_json::Value> {
    let listener = net::listen(args.listen).await?;
    let start = Instant::now();
    let (mut connections, mut accepted) = (JoinSet::new(), 0_u64);
    let mut stopped = std::pin::pin!(net::stopped());
    loop {
        tokio::select! {
            outcome = listener.accept() => {
                accepted += 1;
                // Out of descriptors: the next end of a connection makes room.
                let Ok((stream, _)) = outcome else { continue };
                let kill = args.kill_every > 0 && accepted.is_multiple_of(args.kill_every);
                connections.spawn(connection(stream, args.name.clone(), start, kill));
            }
            Some(_) = connections.join_next(), if !connections.is_empty() => {}
            outcome = &mut stopped => {
                outcome?;
                return Ok(json!({ "accepted": accepted, "open": connections.len() }));
            }
        }
    }
}

async fn connection(mut stream: TcpStream, name: String, start: Instant, kill: bool) {
    // A client that went away reports what it saw of that itself.
    if let Ok(Some(header)) = serve(&mut stream, name, kill).await {
        duplex::serve(stream, header, start).await;
    }
}

async fn serve(
    stream: &mut TcpStream,
    name: String,
    kill: bool,
) -> std::io::Result<Option<Header>> {
    let header = tokio::time::timeout(HEADER_TIMEOUT, Header::read(stream)).await??;
    match header.mode {
        Mode::Duplex => return Ok(Some(header)),
        Mode::Name => stream.write_all(name.as_bytes()).await?,
        Mode::Up => swallow(stream, header).await?,
        Mode::Down => pour(stream, header).await?,
        Mode::Stall => std::future::pending::<()>().await,
        Mode::Echo => echo(stream, kill).await?,
    }
    Ok(None)
}

async fn swallow(stream: &mut TcpStream, header: Header) -> std::io::Result<()> {
    let mut payload = Payload::new(header.seed, header.flow, Direction::Up);
    let (mut received, mut in_time, mut wrong, mut gap_max) = (0_u64, 0_u64, 0, Duration::ZERO);
    let mut buffer = vec![0; 256 << 10];
    let mut last = Instant::now();
    let end = last + Duration::from_millis(header.rate);
    loop {
        let n = stream.read(&mut buffer).await?;
        let now = Instant::now();
        // A silence counts as far as the time does.
        gap_max = gap_max.max(now.min(end).saturating_duration_since(last));
        if now < end {
            in_time += n as u64;
        }
        last = now;
        if n == 0 {
            break;
        }
        received += n as u64;
        wrong += payload.check(&buffer[..n]);
        tokio::task::yield_now().await;
    }
    let gap_ms = u64::try_from(gap_max.as_millis()).unwrap_or(u64::MAX);
    for number in [received, in_time, wrong, gap_ms] {
        stream.write_u64(number).await?;
    }
    stream.shutdown().await
}

async fn pour(stream: &mut TcpStream, header: Header) -> std::io::Result<()> {
    let mut payload = Payload::new(header.seed, header.flow, Direction::Down);
    let mut buffer = vec![0; 64 << 10];
    loop {
        payload.fill(&mut buffer);
        stream.write_all(&buffer).await?;
        // A socket that always takes more would keep the other flows waiting for megabytes.
        tokio::task::yield_now().await;
    }
}

async fn echo(stream: &mut TcpStream, kill: bool) -> std::io::Result<()> {
    let mut buffer = vec![0; 16 << 10];
    loop {
        let n = stream.read(&mut buffer).await?;
        if n == 0 {
            return stream.shutdown().await;
        }
        if kill {
            return net::reset_on_drop(stream);
        }
        stream.write_all(&buffer[..n]).await?;
    }
}
