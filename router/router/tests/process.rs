//! The router as a process: arguments, exit codes, signals.
#![allow(clippy::unwrap_used, reason = "a test stops at what it cannot unwrap")]

#[path = "support/controller.rs"]
mod controller;

use controller::FakeController;
use rustix::process::{Pid, Signal, kill_process};
use std::{process::Stdio, time::Duration};
use tokio::{process::Command, time};

/// An end that takes longer waits for something that does not come.
const SOON: Duration = Duration::from_secs(10);

fn router() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_skein-router"));
    command.stdout(Stdio::piped()).stderr(Stdio::piped()).kill_on_drop(true);
    command
}

#[tokio::test]
async fn wrong_arguments_are_a_usage_error() {
    let output = router().arg("--no-such-option").output().await.unwrap();
    assert_eq!(output.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&output.stderr).contains("--no-such-option"));
}

#[tokio::test]
async fn help_is_no_error() {
    let output = router().arg("--help").output().await.unwrap();
    assert_eq!(output.status.code(), Some(0));
    assert!(String::from_utf8_lossy(&output.stdout).contains("--controller"));
}

#[tokio::test]
async fn an_unusable_state_directory_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("a-file");
    std::fs::write(&file, "").unwrap();
    let state = file.join("state");
    let output = router()
        .args(["--controller", "unix:/nowhere", "--state"])
        .arg(&state)
        .output()
        .await
        .unwrap();
    assert_eq!(output.status.code(), Some(1));
    let log = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(log.contains(state.to_str().unwrap()), "{log}");
}

#[tokio::test]
async fn sigterm_ends_it_even_before_it_knows_who_it_is() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("c.sock");
    let mut fake = FakeController::listen(&socket);
    let mut child = router()
        .args(["--log-format", "json", "--state"])
        .arg(dir.path().join("state"))
        .arg("--controller")
        .arg(format!("unix:{}", socket.display()))
        .spawn()
        .unwrap();
    let mut attachment = fake.attached().await;
    assert_eq!(attachment.attach.pid, child.id().unwrap());
    let pid = Pid::from_raw(child.id().unwrap().try_into().unwrap()).unwrap();
    kill_process(pid, Signal::TERM).unwrap();
    let status = time::timeout(SOON, child.wait()).await.unwrap().unwrap();
    assert_eq!(status.code(), Some(0));
    assert!(attachment.next().await.is_none(), "nothing more comes from a router that has ended");
}
