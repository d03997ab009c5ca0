//! What a test needs of the machine. A test that cannot run says so; where `SKEIN_LAB_STRICT` is set (CI),
//! it fails instead.

use std::path::Path;

/// Says on stderr that a test was skipped and why.
///
/// # Panics
/// Where `SKEIN_LAB_STRICT` is set: there nothing may be skipped.
pub fn skipped(reason: &str) {
    skip(reason, std::env::var_os("SKEIN_LAB_STRICT").is_some());
}

#[allow(clippy::print_stderr, reason = "the reader of a test run must see what did not run")]
fn skip(reason: &str, is_strict: bool) {
    assert!(!is_strict, "cannot run: {reason}");
    eprintln!("SKIPPED: {reason}");
}

/// False, and said on stderr, unless this runs as root.
#[must_use]
pub fn require_root(reason: &str) -> bool {
    if crate::Lab::rootless() {
        skipped(&format!("needs root: {reason}"));
        return false;
    }
    true
}

/// False, and said on stderr, unless all of the programs are installed.
#[must_use]
pub fn require_programs(programs: &[&str]) -> bool {
    let missing: Vec<_> = programs.iter().filter(|program| !installed(program)).copied().collect();
    if missing.is_empty() {
        return true;
    }
    skipped(&format!("not installed: {} (run .ci/packages)", missing.join(", ")));
    false
}

fn installed(program: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain(["/usr/sbin".into(), "/sbin".into()])
        .any(|dir| dir.join(Path::new(program)).is_file())
}

#[cfg(test)]
mod tests {
    use super::skip;

    #[test]
    #[should_panic(expected = "cannot run: not installed: x")]
    fn where_all_must_run_nothing_is_skipped() {
        skip("not installed: x", true);
    }
}
