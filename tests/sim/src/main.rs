//! Runs seeds; replays and shrinks those that fail.
#![allow(clippy::print_stdout, clippy::print_stderr, reason = "that is what it is for")]

use anyhow::{Context as _, Result, bail};
use clap::Parser;
use skein_sim::{Outcome, Scenario, kind, run, run_apart, shrink};
use std::{
    collections::BTreeMap,
    ops::Range,
    path::{Path, PathBuf},
    process::ExitCode,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

/// After so many failures there is enough to look at.
const FAILURES_MAX: usize = 50;

/// Progress is said this often.
const PROGRESS: Duration = Duration::from_secs(30);

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
    /// Run all seeds, however many fail, and say only how many did, and in what way
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
    let batch = Batch {
        next: AtomicU64::new(seeds.start),
        seeds,
        count,
        is_stopped: AtomicBool::new(false),
        found: Mutex::new(Found { done: 0, failed: 0, kinds: BTreeMap::new(), told: began }),
        began,
    };
    let batch = Arc::new(batch);
    let stopped = Arc::clone(&batch);
    // Ends with the program.
    std::thread::spawn(move || stop_when_told(&stopped.is_stopped));
    let program = std::env::current_exe()?;
    std::thread::scope(|scope| {
        let work = || batch.work(&program);
        let workers: Vec<_> = (0..jobs.max(1)).map(|_| scope.spawn(work)).collect();
        workers.into_iter().try_for_each(|worker| match worker.join() {
            Ok(outcome) => outcome,
            Err(_) => bail!("a worker panicked"),
        })
    })?;
    let found = batch.found();
    if count {
        println!("failed: {}", found.failed);
    } else {
        println!("{}", batch.summary(&found));
    }
    for (kind, count) in &found.kinds {
        println!("  {count} × {kind}");
    }
    // What was ended early has not shown anything.
    let is_done = found.done == batch.seeds.end - batch.seeds.start;
    Ok(is_done && (count || found.failed == 0))
}

/// After Ctrl-C what runs is run to its end, and what was found is said.
fn stop_when_told(is_stopped: &AtomicBool) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_io().build();
    let told = runtime.and_then(|runtime| runtime.block_on(tokio::signal::ctrl_c()));
    if told.is_ok() {
        is_stopped.store(true, Ordering::Relaxed);
    }
}

/// Seeds that are run, and what was found so far.
struct Batch {
    seeds: Range<u64>,
    next: AtomicU64,
    /// All are run, and failures only counted.
    count: bool,
    is_stopped: AtomicBool,
    found: Mutex<Found>,
    began: Instant,
}

struct Found {
    done: u64,
    failed: usize,
    kinds: BTreeMap<String, u64>,
    /// When progress was last said.
    told: Instant,
}

impl Batch {
    fn found(&self) -> MutexGuard<'_, Found> {
        self.found.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn work(&self, program: &Path) -> Result<()> {
        loop {
            let seed = self.next.fetch_add(1, Ordering::Relaxed);
            let enough = !self.count && self.found().failed >= FAILURES_MAX;
            if seed >= self.seeds.end || enough || self.is_stopped.load(Ordering::Relaxed) {
                return Ok(());
            }
            let outcome = run_apart(program, &Scenario::generate(seed))
                .with_context(|| format!("seed {seed}"))?;
            self.note(seed, &outcome);
        }
    }

    fn note(&self, seed: u64, outcome: &Outcome) {
        let mut found = self.found();
        found.done += 1;
        if let Some(first) = outcome.failures.first() {
            found.failed += 1;
            *found.kinds.entry(kind(first)).or_default() += 1;
            if !self.count {
                println!("seed {seed} failed: {first}");
                println!("  replay: cargo run -p skein-sim -- --seed {seed} --verbose");
            }
        }
        if !self.count && found.told.elapsed() >= PROGRESS {
            found.told = now();
            eprintln!("{}", self.summary(&found));
        }
    }

    fn summary(&self, found: &Found) -> String {
        let (took_s, of) = (self.began.elapsed().as_secs_f64(), self.seeds.end - self.seeds.start);
        let per_minute = found.done as f64 * 60.0 / took_s;
        let Found { done, failed, .. } = found;
        format!(
            "{done} of {of} seeds, {failed} failed, {took_s:.1} s, {per_minute:.0} seeds a minute"
        )
    }
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
