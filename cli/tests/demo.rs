//! The demo as users start it: real controllers and routers on loopback, a transit killed under a download.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]
#![allow(clippy::disallowed_methods, reason = "a test that gives up waiting reads the clock")]

use std::{
    process::{Command, Output, Stdio},
    time::{Duration, Instant},
};

use rustix::process::{Pid, Signal, kill_process};

/// The demo with its temporary files under `dir`, away from other runs.
fn demo(dir: &tempfile::TempDir) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_skctl"));
    command
        .args(["demo", "--size", "32", "--seconds", "2", "-o", "json", "-v"])
        .env("TMPDIR", dir.path())
        .env_remove("SKEIN_NAMESPACE")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    command
}

/// Nothing of the demo is left: no file, no process that names the directory.
fn assert_clean(dir: &tempfile::TempDir) {
    let files: Vec<_> = std::fs::read_dir(dir.path()).unwrap().collect();
    assert!(files.is_empty(), "{files:?}");
    let name = dir.path().to_str().unwrap();
    for process in std::fs::read_dir("/proc").unwrap().flatten() {
        let line = std::fs::read(process.path().join("cmdline")).unwrap_or_default();
        let line = String::from_utf8_lossy(&line).replace('\0', " ");
        assert!(!line.contains(name), "{line}");
    }
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

#[test]
fn a_download_survives_its_transit() {
    let dir = tempfile::Builder::new().prefix("sk-").tempdir().unwrap();
    let output: Output = demo(&dir).output().unwrap();
    assert!(output.status.success(), "{}", text(&output.stderr));
    let report: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(report["intact"], true, "{report}");
    assert_eq!(report["bytes"], 32 << 20, "{report}");
    let (before, killed) = (&report["pathBefore"], &report["killed"]);
    assert_eq!(&before[0], killed, "{report}");
    assert_eq!(before[1], "demo-b", "{report}");
    assert_clean(&dir);
}

#[test]
fn it_needs_no_privileges() {
    const NOBODY: u32 = 65_534;
    if !rustix::process::geteuid().is_root() {
        return; // Then every test here shows it.
    }
    let dir = tempfile::Builder::new().prefix("sk-").tempdir().unwrap();
    // Where the build lies, others may not enter.
    let programs = tempfile::Builder::new().prefix("sk-bin-").tempdir().unwrap();
    let program = programs.path().join("skctl");
    std::fs::copy(env!("CARGO_BIN_EXE_skctl"), &program).unwrap();
    let everybody = std::os::unix::fs::PermissionsExt::from_mode(0o755);
    std::fs::set_permissions(programs.path(), everybody).unwrap();
    std::os::unix::fs::chown(dir.path(), Some(NOBODY), Some(NOBODY)).unwrap();
    let output = Command::new("setpriv")
        .args(["--reuid", "65534", "--regid", "65534", "--clear-groups", "--no-new-privs"])
        .args(["--inh-caps=-all", "--bounding-set=-all"])
        .arg(&program)
        .args(["demo", "--size", "8", "--seconds", "2", "-o", "json", "-v"])
        .current_dir("/")
        .env("TMPDIR", dir.path())
        .env("HOME", "/nonexistent")
        .env_remove("XDG_RUNTIME_DIR")
        .env_remove("SKEIN_NAMESPACE")
        .stdin(Stdio::null())
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", text(&output.stderr));
    let report: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(report["intact"], true, "{report}");
    assert_clean(&dir);
}

#[test]
fn an_interrupted_demo_leaves_nothing() {
    let dir = tempfile::Builder::new().prefix("sk-").tempdir().unwrap();
    let child = demo(&dir).spawn().unwrap();
    let pid = Pid::from_child(&child);
    // Until there is something to clean up: its sites have sockets.
    let began = Instant::now();
    let has_site = || {
        let homes = std::fs::read_dir(dir.path()).unwrap().flatten();
        homes.into_iter().any(|home| home.path().join("demo-t2/run/site.sock").exists())
    };
    while !has_site() && began.elapsed() < Duration::from_secs(60) {
        std::thread::sleep(Duration::from_millis(20));
    }
    assert!(has_site(), "the sites did not start");
    kill_process(pid, Signal::INT).unwrap();
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(130), "{}", text(&output.stderr));
    assert_clean(&dir);
}
