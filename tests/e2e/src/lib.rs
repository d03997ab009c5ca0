//! End-to-end tests of the real binaries: sites in a lab, driven through `skctl` alone.

pub mod clients;
pub mod faults;
pub mod flow;
pub mod servers;
mod shown;
mod site;
pub mod topology;

use std::path::{Path, PathBuf};
use std::sync::OnceLock;

pub use shown::Shown;
pub use site::{Processes, Site, Usage};

/// Whether to run at full length (`SKEIN_LONG=1`, as `.ci/long` does).
#[must_use]
pub fn long() -> bool {
    std::env::var_os("SKEIN_LONG").is_some()
}

/// `brief` in an ordinary run, `full` in a long one.
#[must_use]
pub fn scaled<T>(brief: T, full: T) -> T {
    if long() { full } else { brief }
}

/// Prints a figure of a test for whoever reads the log.
#[allow(clippy::print_stderr, reason = "figures are part of the result")]
pub fn figure(name: &str, value: impl std::fmt::Display) {
    eprintln!("FIGURE {name}: {value}");
}

/// The time that all programs of a machine share, to compare what they saw.
#[must_use]
pub fn unix_ms() -> u64 {
    let since = std::time::SystemTime::UNIX_EPOCH.elapsed().unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

/// The `skctl` under test: `SKEIN_BIN`, or the one of this build, brought up to date.
///
/// # Panics
/// When it does not build.
#[must_use]
pub fn skctl() -> &'static Path {
    static BUILT: OnceLock<PathBuf> = OnceLock::new();
    BUILT.get_or_init(|| {
        if let Some(path) = std::env::var_os("SKEIN_BIN") {
            // Relative to the workspace, where the command line that set it was typed.
            return Path::new(env!("CARGO_MANIFEST_DIR")).join("../..").join(path);
        }
        let mut cargo =
            std::process::Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
        cargo.args(["build", "--quiet", "--locked", "--package", "skctl"]);
        if target_dir().ends_with("release") {
            cargo.arg("--release");
        }
        let status = cargo.current_dir(env!("CARGO_MANIFEST_DIR")).status();
        assert!(status.is_ok_and(|status| status.success()), "skctl does not build");
        target_dir().join("skctl")
    })
}

/// The flow generator of this build.
#[must_use]
pub fn flowgen() -> PathBuf {
    target_dir().join("flowgen")
}

/// Tests are in `target/PROFILE/deps`, programs one above.
fn target_dir() -> PathBuf {
    let exe = std::env::current_exe().expect("invariant: a test knows its own path");
    let dir = exe.parent().expect("invariant: a file has a directory");
    let dir = if dir.ends_with("deps") { dir.parent() } else { Some(dir) };
    dir.expect("invariant: deps is below the target directory").to_owned()
}
