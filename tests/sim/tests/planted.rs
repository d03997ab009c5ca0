//! The bugs that show that the simulation finds any can still be planted.
#![allow(clippy::unwrap_used, reason = "a test stops at what it cannot unwrap")]

use std::process::{Command, Output};

fn planted(args: &[&str]) -> Output {
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/planted/run");
    Command::new(script).args(args).output().unwrap()
}

#[test]
fn every_bug_can_be_planted_in_the_code_as_it_is() {
    let checked = planted(&["--check"]);
    assert!(checked.status.success(), "{}", String::from_utf8_lossy(&checked.stderr));
}

#[test]
fn what_is_not_known_is_refused_before_anything_is_built() {
    for args in [&["--chekc"][..], &["--check", "5"], &["many"], &["0"], &["5", "no-such-bug"]] {
        let refused = planted(args);
        let told = String::from_utf8_lossy(&refused.stderr);
        assert_eq!(refused.status.code(), Some(2), "{args:?}: {told}");
        assert!(told.contains("usage: run"), "{args:?}: {told}");
    }
    let helped = planted(&["--help"]);
    assert!(helped.status.success());
    assert!(String::from_utf8_lossy(&helped.stdout).contains("usage: run"));
}
