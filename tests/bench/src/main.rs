//! Measures the ways from client to server in one interleaved run, and prints one table.

use anyhow::{Context as _, Result};
use clap::{Parser, ValueEnum};
use skein_bench::column::{Column, Setup, Way};
use skein_bench::measure::{bulk, http, memory};
use skein_bench::table::{Figure, Table};
use skein_lab::Host;

/// Flows held open for the memory row.
const IDLE_FLOWS: u32 = 5000;

#[derive(Debug, Parser)]
#[command(
    name = "skein-bench",
    about = "Measures Skein beside its peers, in network namespaces of this machine",
    long_about = "Measures Skein beside its peers, in network namespaces of this machine.\n\n\
                  Every round measures every way, so that what the machine does meanwhile hits all of them alike. \
                  Compare figures of one run only, and build with --release.",
    after_help = "Examples:\n  \
        cargo run --release -p skein-bench\n  \
        cargo run --release -p skein-bench -- --case bulk --way direct,skein --rounds 10\n  \
        cargo run --release -p skein-bench -- --case http,new-connections -o json > bench.json"
)]
struct Args {
    /// How often everything is measured
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..))]
    rounds: u32,
    /// Length of one measurement of bulk; requests of one measurement of HTTP grow with it
    #[arg(long, default_value_t = 3, value_name = "SECONDS", value_parser = clap::value_parser!(u32).range(1..=60))]
    seconds: u32,
    /// What is measured
    #[arg(long = "case", value_enum, value_delimiter = ',', value_name = "CASES", default_values_t = Case::value_variants().to_vec())]
    cases: Vec<Case>,
    /// What it is measured over
    #[arg(long = "way", value_enum, value_delimiter = ',', value_name = "WAYS", default_values_t = Way::value_variants().to_vec())]
    ways: Vec<Way>,
    /// Form of the result
    #[arg(short, long, value_enum, default_value_t = Form::Table, value_name = "FORM")]
    output: Form,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Case {
    /// Bytes a second of 1 and of 8 flows, and what they cost in between
    Bulk,
    /// Requests over 1 and over 64 kept connections
    Http,
    /// A connection for each request
    NewConnections,
    /// What the processes in between hold, idle and with 5,000 flows
    Memory,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Form {
    /// Markdown
    Table,
    /// JSON, with the figure of every round
    Json,
}

#[allow(clippy::print_stdout, reason = "the table is the product of this program")]
fn main() -> Result<()> {
    let mut args = Args::parse();
    // Named twice is wanted once.
    let mut seen = Vec::new();
    args.ways.retain(|way| {
        !seen.contains(way) && {
            seen.push(*way);
            true
        }
    });
    let setup = Setup::new(&args.ways)?;
    let mut table = Table::default();
    for _ in 0..args.rounds {
        for (index, column) in setup.columns.iter().enumerate() {
            round(&mut table, index, &setup.client, column, &args)
                .with_context(|| column.way.name())?;
        }
    }
    let between = setup.columns.iter().enumerate().filter(|(_, it)| !it.processes.is_empty());
    for (index, column) in between.filter(|_| args.cases.contains(&Case::Memory)) {
        let (idle, loaded) = memory(&setup.client, column, IDLE_FLOWS)?;
        table.add(mb("RSS of all processes in between, idle"), index, idle);
        table.add(mb("RSS with 5,000 idle flows"), index, loaded);
    }
    let ways = args.ways.iter();
    match args.output {
        Form::Table => {
            let names: Vec<_> = ways.map(|way| way.name()).collect();
            print!("{}", table.markdown(&names));
        }
        Form::Json => {
            let names: Vec<_> = ways
                .filter_map(|way| Some(way.to_possible_value()?.get_name().to_owned()))
                .collect();
            println!("{}", table.json(&names)?);
        }
    }
    Ok(())
}

fn round(
    table: &mut Table,
    index: usize,
    client: &Host,
    column: &Column,
    args: &Args,
) -> Result<()> {
    let mut add = |name, unit, value| table.add(Figure { name, unit }, index, value);
    let (has, seconds) = (|case| args.cases.contains(&case), args.seconds);
    if has(Case::Bulk) {
        let (rate, cpu) = bulk(client, column, 1, seconds)?;
        add("bulk, 1 flow", "Gbit/s", rate);
        if !column.processes.is_empty() {
            add("bulk, 1 flow: CPU of all processes in between", "s/GB", cpu);
        }
        let (rate, _) = bulk(client, column, 8, seconds)?;
        add("bulk, 8 flows", "Gbit/s", rate);
    }
    if has(Case::Http) {
        let one = http(client, column, 1, 2000 * seconds, true)?;
        add("HTTP, 1 connection, p50", "ms", one.p50_ms);
        add("HTTP, 1 connection, p99", "ms", one.p99_ms);
        let many = http(client, column, 64, 10_000 * seconds, true)?;
        add("HTTP, 64 connections, p50", "ms", many.p50_ms);
        add("HTTP, 64 connections, p99", "ms", many.p99_ms);
        add("HTTP, 64 connections", "requests/s", many.rate);
    }
    if has(Case::NewConnections) {
        let new = http(client, column, 64, 2000 * seconds, false)?;
        add("new connections", "1/s", new.rate);
    }
    Ok(())
}

fn mb(name: &'static str) -> Figure {
    Figure { name, unit: "MB" }
}

#[cfg(test)]
mod tests {
    use super::{Args, Case};
    use clap::Parser as _;
    use skein_bench::column::Way;

    #[test]
    fn examples_are_understood() {
        let help = <Args as clap::CommandFactory>::command().render_help().to_string();
        let examples: Vec<_> = help.lines().filter_map(|line| line.split_once(" -- ")).collect();
        assert_eq!(examples.len(), 2);
        for (_, arguments) in examples {
            let arguments = arguments.split('>').next().unwrap_or_default();
            let parsed = Args::try_parse_from(
                std::iter::once("skein-bench").chain(arguments.split_whitespace()),
            );
            assert!(parsed.is_ok(), "{arguments}: {parsed:?}");
        }
    }

    #[test]
    fn nothing_given_measures_all() {
        let args = Args::parse_from(["skein-bench"]);
        assert_eq!(args.cases, [Case::Bulk, Case::Http, Case::NewConnections, Case::Memory]);
        assert_eq!(args.ways, [Way::Direct, Way::Haproxy, Way::Skein, Way::Transit]);
    }
}
