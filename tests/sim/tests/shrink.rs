//! A failure is made smaller, saved, and replayed from the file.
#![allow(clippy::unwrap_used, reason = "a test stops at what it cannot unwrap")]

use skein_sim::{Fault, Scenario, What, kind, run_apart, shrink};
use std::{path::Path, process::Command};

/// A small scenario, and what makes every run of it fail: a link that is cut for good, and is wanted.
fn failing() -> Scenario {
    let is_small = |scenario: &Scenario| scenario.sites.len() <= 4 && scenario.flows.len() <= 5;
    let mut scenario = (0..).map(Scenario::generate).find(is_small).unwrap();
    let cut = Fault { at_ms: 8_000, for_ms: 100_000_000, what: What::Cut { link: 0 } };
    let harmless = Fault { at_ms: 5_000, for_ms: 500, what: What::Clock { site: 0, ahead_ms: 9 } };
    scenario.faults = vec![harmless, cut];
    scenario
}

#[test]
fn a_failure_is_made_smaller_and_replayed_from_a_file() {
    let program = Path::new(env!("CARGO_BIN_EXE_skein-sim"));
    let scenario = failing();
    let failure = kind(run_apart(program, &scenario).unwrap().failures.first().unwrap());
    let smaller = shrink(&scenario, |scenario| run_apart(program, scenario)).unwrap();
    assert_eq!((smaller.flows.len(), smaller.associations.len()), (0, 0), "{smaller:?}");
    assert_eq!(smaller.faults.len(), 1, "{smaller:?}");
    assert!(matches!(smaller.faults[0].what, What::Cut { .. }), "{smaller:?}");

    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), serde_json::to_string_pretty(&smaller).unwrap()).unwrap();
    let replayed = Command::new(program).arg("--scenario").arg(file.path()).output().unwrap();
    let text = String::from_utf8(replayed.stdout).unwrap();
    let told = text.lines().nth(1).map(kind);
    assert_eq!((told, replayed.status.code()), (Some(failure), Some(1)), "{text}");
}
