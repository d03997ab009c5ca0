//! Many seeds, and one seed twice.
#![allow(clippy::unwrap_used, reason = "a test stops at what it cannot unwrap")]

use skein_sim::{Outcome, Scenario, run_apart};
use std::{
    path::Path,
    sync::atomic::{AtomicU64, Ordering},
};

/// Seeds that every change must pass; `SEEDS` says otherwise.
const SEEDS: u64 = 200;

fn run(scenario: &Scenario) -> Outcome {
    run_apart(Path::new(env!("CARGO_BIN_EXE_skein-sim")), scenario).unwrap()
}

#[test]
fn no_seed_fails() {
    let seeds = std::env::var("SEEDS").map_or(SEEDS, |seeds| seeds.parse().unwrap());
    let next = AtomicU64::new(0);
    let failed = std::thread::scope(|scope| {
        let work = || {
            let mut failed = Vec::new();
            loop {
                let seed = next.fetch_add(1, Ordering::Relaxed);
                if seed >= seeds {
                    return failed;
                }
                let outcome = run(&Scenario::generate(seed));
                let replay = format!("replay: cargo run -p skein-sim -- --seed {seed} --verbose");
                let told = outcome.failures.first().map(|first| format!("{first}\n  {replay}"));
                failed.extend(told);
            }
        };
        let jobs = std::thread::available_parallelism().map_or(1, usize::from);
        let workers: Vec<_> = (0..jobs).map(|_| scope.spawn(work)).collect();
        workers.into_iter().flat_map(|worker| worker.join().unwrap()).collect::<Vec<_>>()
    });
    assert!(failed.is_empty(), "{} of {seeds} seeds failed:\n{}", failed.len(), failed.join("\n"));
}

/// Seeds that are run twice.
const EXACT: u64 = 20;

#[test]
fn the_same_seed_gives_the_same_trace() {
    for seed in 0..EXACT {
        let scenario = Scenario::generate(seed);
        let (first, second) = (run(&scenario), run(&scenario));
        assert_eq!((seed, first), (seed, second));
    }
}

/// What seeds beyond those have found, made smaller.
#[test]
fn what_was_found_once_stays_mended() {
    let found = concat!(env!("CARGO_MANIFEST_DIR"), "/found");
    let mut scenarios = 0;
    for entry in std::fs::read_dir(found).unwrap() {
        let path = entry.unwrap().path();
        let text = std::fs::read_to_string(&path).unwrap();
        let outcome = run(&serde_json::from_str(&text).unwrap());
        assert!(outcome.failures.is_empty(), "{}: {:?}", path.display(), outcome.failures);
        scenarios += 1;
    }
    assert!(scenarios > 0, "none in {found}");
}

#[test]
fn a_scenario_is_saved_and_read() {
    let scenario = Scenario::generate(7);
    let text = serde_json::to_string(&scenario).unwrap();
    assert_eq!(serde_json::from_str::<Scenario>(&text).unwrap(), scenario);
}
