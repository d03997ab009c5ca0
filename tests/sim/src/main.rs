//! Runs seeds; replays and shrinks those that fail.
#![allow(clippy::print_stdout, reason = "that is what it is for")]

use anyhow::{Context as _, Result, bail};
use clap::Parser;
use skein_sim::{Outcome, Scenario, kind, run, run_apart, shrink};
use std::{
    collections::BTreeMap,
    ops::Range,
    path::PathBuf,
    process::ExitCode,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
    time::Instant,
};

/// After so many failures there is enough to look at.
const FAILURES_MAX: usize = 50;

#[derive(Parser)]
#[command(about = "Whole networks of routers in virtual time, from one seed")]
struct Args {
    /// Run this seed
    #[arg(long)]
    seed: Option<u64>,
    /// Run these seeds: A..B
    #[arg(long, value_name = "A..B")]
    seeds: Option<String>,
    /// Run the scenario in this file; - is standard input
    #[arg(long, value_name = "FILE")]
    scenario: Option<PathBuf>,
    /// Make this failing seed's scenario smaller, and save it
    #[arg(long, value_name = "SEED")]
    shrink: Option<u64>,
    /// Runs at a time
    #[arg(long, default_value_t = 1)]
    jobs: usize,
    /// Run all seeds, however many fail, and say only how many did
    #[arg(long)]
    count: bool,
    /// Print the outcome as JSON
    #[arg(long)]
    report: bool,
    /// Show the scenario and the logs of all routers; SKEIN_LOG is their filter
    #[arg(long)]
    verbose: bool,
}

fn main() -> ExitCode {
    match start(&Args::parse()) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            println!("error: {error:#}");
            ExitCode::from(2)
        }
    }
}

/// Returns whether nothing failed.
fn start(args: &Args) -> Result<bool> {
    if args.verbose {
        let filter = std::env::var("SKEIN_LOG").unwrap_or_else(|_| "info".into());
        let format = tracing_subscriber::fmt().with_env_filter(filter).with_ansi(false);
        format.with_timer(skein_sim::VirtualTime).init();
    }
    if let Some(seed) = args.shrink {
        return save_smaller(seed);
    }
    if let Some(path) = &args.scenario {
        let text = match path.to_str() {
            Some("-") => std::io::read_to_string(std::io::stdin()),
            _ => std::fs::read_to_string(path),
        };
        let scenario = serde_json::from_str(&text.context("the scenario")?);
        return one(&scenario.context("the scenario")?, args);
    }
    if let Some(seed) = args.seed {
        return one(&Scenario::generate(seed), args);
    }
    let Some((from, to)) = args.seeds.as_deref().and_then(|text| text.split_once("..")) else {
        bail!("nothing to do: --seed N, --seeds A..B, --scenario FILE or --shrink N");
    };
    many(from.parse()?..to.parse()?, args.jobs, args.count)
}

#[allow(clippy::disallowed_methods, reason = "it says how fast it is")]
fn now() -> Instant {
    Instant::now()
}

fn one(scenario: &Scenario, args: &Args) -> Result<bool> {
    if args.report {
        let outcome = run(scenario).unwrap_or_else(|error| Outcome {
            failures: vec![format!("it cannot be run: {error:#}")],
            ..Outcome::default()
        });
        println!("{}", serde_json::to_string(&outcome)?);
        return Ok(true);
    }
    if args.verbose {
        println!("{}", serde_json::to_string(scenario)?);
    }
    let began = now();
    let outcome = run(scenario)?;
    let Outcome { trace, virtual_ms, opened, attempts, .. } = outcome;
    println!(
        "seed {}: {} sites, {} links, {} faults; {opened} of {} flows opened in {attempts} tries; \
         {virtual_ms} ms in {} ms; trace {:016x} of {} events",
        scenario.seed,
        scenario.sites.len(),
        scenario.links.len(),
        scenario.faults.len(),
        scenario.flows.len(),
        began.elapsed().as_millis(),
        trace.0,
        trace.1
    );
    for failure in &outcome.failures {
        println!("  {failure}");
    }
    Ok(outcome.failures.is_empty())
}

fn many(seeds: Range<u64>, jobs: usize, count: bool) -> Result<bool> {
    let began = now();
    let (next, failed) = (AtomicU64::new(seeds.start), AtomicUsize::new(0));
    let kinds = Mutex::new(BTreeMap::<String, u64>::new());
    let program = std::env::current_exe()?;
    let work = || -> Result<()> {
        loop {
            let seed = next.fetch_add(1, Ordering::Relaxed);
            let enough = !count && failed.load(Ordering::Relaxed) >= FAILURES_MAX;
            if seed >= seeds.end || enough {
                return Ok(());
            }
            let outcome = run_apart(&program, &Scenario::generate(seed))
                .with_context(|| format!("seed {seed}"))?;
            let Some(first) = outcome.failures.first() else { continue };
            failed.fetch_add(1, Ordering::Relaxed);
            let mut kinds = kinds.lock().unwrap_or_else(PoisonError::into_inner);
            *kinds.entry(kind(first)).or_default() += 1;
            if count {
                continue;
            }
            println!("seed {seed} failed: {first}");
            println!("  replay: cargo run -p skein-sim -- --seed {seed} --verbose");
        }
    };
    std::thread::scope(|scope| {
        let workers: Vec<_> = (0..jobs.max(1)).map(|_| scope.spawn(work)).collect();
        workers.into_iter().try_for_each(|worker| match worker.join() {
            Ok(outcome) => outcome,
            Err(_) => bail!("a worker panicked"),
        })
    })?;
    let (took, failed) = (began.elapsed(), failed.into_inner());
    if count {
        println!("failed: {failed}");
        return Ok(true);
    }
    let count = seeds.end - seeds.start;
    println!(
        "{count} seeds, {failed} failed, {:.1} s, {:.0} seeds a minute",
        took.as_secs_f64(),
        count as f64 * 60.0 / took.as_secs_f64()
    );
    for (kind, count) in kinds.lock().unwrap_or_else(PoisonError::into_inner).iter() {
        println!("  {count} × {kind}");
    }
    Ok(failed == 0)
}

fn save_smaller(seed: u64) -> Result<bool> {
    let scenario = Scenario::generate(seed);
    let program = std::env::current_exe()?;
    let smaller = shrink(&scenario, |scenario| run_apart(&program, scenario))?;
    let path = PathBuf::from(format!("scenario-{seed}.json"));
    std::fs::write(&path, serde_json::to_string_pretty(&smaller)?)?;
    println!(
        "{} of {} sites, {} of {} links, {} of {} flows, {} of {} faults are left",
        smaller.sites.len(),
        scenario.sites.len(),
        smaller.links.len(),
        scenario.links.len(),
        smaller.flows.len(),
        scenario.flows.len(),
        smaller.faults.len(),
        scenario.faults.len()
    );
    println!("replay: cargo run -p skein-sim -- --scenario {}", path.display());
    Ok(true)
}
