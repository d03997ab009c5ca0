//! Flows whose every byte is known in advance, so that both ends can tell loss, damage and truncation
//! from an end that was meant. Reports are JSON on stdout.

mod bulk;
mod churn;
mod datagrams;
mod duplex;
mod echo;
mod hold;
mod net;
mod payload;
mod play;
mod probe;
mod protocol;
mod serve;

use std::net::SocketAddr;
use std::process::ExitCode;

use anyhow::Result;
use clap::{Parser, Subcommand};

#[derive(Parser)]
#[command(name = "flowgen", about = "Generates and verifies flows")]
struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// The server of all client commands but `play`.
    Serve(serve::Args),
    /// Paced flows in both directions until SIGTERM; reports silences, resets and wrong bytes.
    Duplex(duplex::Args),
    /// One byte there and back, again and again, on one connection.
    Echo(echo::Args),
    /// A new connection every few milliseconds until SIGTERM; reports who answered and outages.
    Probe(probe::Args),
    /// Flows as fast as they go, some of them never read by the server.
    Bulk(bulk::Args),
    /// Short flows at a steady rate, some of them killed midway.
    Churn(churn::Args),
    /// Connections that do nothing, until SIGTERM.
    Hold(hold::Args),
    /// The server of the two commands for datagrams.
    UdpServe(datagrams::ServeArgs),
    /// Streams of datagrams in both directions until SIGTERM; reports what was lost, late or wrong.
    UdpDuplex(datagrams::StreamArgs),
    /// Associations that have proved to work once, and prove it again after SIGTERM.
    UdpHold(datagrams::HoldArgs),
    /// One conversation by script, reported step by step.
    Play(play::Args),
}

/// What every client command needs.
#[derive(clap::Args, Clone)]
struct Target {
    /// Where to connect to.
    #[arg(long)]
    connect: SocketAddr,
    /// Decides every byte.
    #[arg(long, default_value_t = 1)]
    seed: u64,
}

fn main() -> Result<ExitCode> {
    let args = Args::parse();
    raise_descriptor_limit()?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let report = runtime.block_on(async {
        match args.command {
            Command::Serve(args) => serve::run(args).await,
            Command::Duplex(args) => duplex::run(args).await,
            Command::Echo(args) => echo::run(args).await,
            Command::Probe(args) => probe::run(args).await,
            Command::Bulk(args) => bulk::run(args).await,
            Command::Churn(args) => churn::run(args).await,
            Command::Hold(args) => hold::run(args).await,
            Command::UdpServe(args) => datagrams::serve(args).await,
            Command::UdpDuplex(args) => datagrams::stream(args).await,
            Command::UdpHold(args) => datagrams::hold(args).await,
            Command::Play(args) => play::run(args).await,
        }
    })?;
    print(&report);
    Ok(ExitCode::SUCCESS)
}

/// Thousands of connections need more descriptors than the usual soft limit.
fn raise_descriptor_limit() -> Result<()> {
    use rustix::process::{Resource, getrlimit, setrlimit};
    let mut limit = getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    Ok(setrlimit(Resource::Nofile, limit)?)
}

#[allow(clippy::print_stdout, reason = "the report is the product of this program")]
fn print(report: &serde_json::Value) {
    println!("{report}");
}
