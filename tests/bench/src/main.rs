//! Prints one table of one interleaved run. Usage: `skein-bench [ROUNDS [SECONDS]]`, both 3 unless given.

use anyhow::{Context as _, Result};
use skein_bench::column::{Column, Setup};
use skein_bench::measure::{bulk, http, memory};
use skein_bench::table::Table;
use skein_lab::Host;

/// Flows held open for the memory row.
const IDLE_FLOWS: u32 = 5000;

#[allow(clippy::print_stdout, reason = "the table is the product of this program")]
fn main() -> Result<()> {
    let mut args = std::env::args().skip(1);
    let mut number = |default: u32| -> Result<u32> {
        args.next()
            .map_or(Ok(default), |arg| arg.parse().with_context(|| format!("{arg} is no number")))
    };
    let (rounds, seconds) = (number(3)?, number(3)?);
    let setup = Setup::new()?;
    let mut table = Table::default();
    for _ in 0..rounds {
        for (index, column) in setup.columns.iter().enumerate() {
            round(&mut table, index, &setup.client, column, seconds)
                .with_context(|| column.name.to_owned())?;
        }
    }
    for (index, column) in setup.columns.iter().enumerate() {
        if !column.processes.is_empty() {
            let (idle, loaded) = memory(&setup.client, column, IDLE_FLOWS)?;
            table.add("RSS of all processes in between, idle, MB", index, idle);
            table.add("RSS with 5,000 idle flows, MB", index, loaded);
        }
    }
    let names: Vec<_> = setup.columns.iter().map(|column| column.name).collect();
    println!("{}", table.markdown(&names));
    Ok(())
}

fn round(
    table: &mut Table,
    index: usize,
    client: &Host,
    column: &Column,
    seconds: u32,
) -> Result<()> {
    let (rate, cpu) = bulk(client, column, 1, seconds)?;
    table.add("bulk, 1 flow, Gbit/s", index, rate);
    if !column.processes.is_empty() {
        table.add("bulk, 1 flow: CPU-s/GB of all processes in between", index, cpu);
    }
    let (rate, _) = bulk(client, column, 8, seconds)?;
    table.add("bulk, 8 flows, Gbit/s", index, rate);
    let one = http(client, column, 1, 2000 * seconds, true)?;
    table.add("HTTP, 1 connection, p50 ms", index, one.p50_ms);
    table.add("HTTP, 1 connection, p99 ms", index, one.p99_ms);
    let many = http(client, column, 64, 10_000 * seconds, true)?;
    table.add("HTTP, 64 connections, p50 ms", index, many.p50_ms);
    table.add("HTTP, 64 connections, p99 ms", index, many.p99_ms);
    table.add("HTTP, 64 connections, requests/s", index, many.rate);
    let new = http(client, column, 64, 2000 * seconds, false)?;
    table.add("new connections/s", index, new.rate);
    Ok(())
}
