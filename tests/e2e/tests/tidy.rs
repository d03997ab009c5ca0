//! The tree keeps its own rules: arrows between crates, sizes of functions and files, clean words.

use anyhow::{Context, Result};
use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
    process::Command,
};

const FUNCTION_LINES_MAX: usize = 100;
const FILE_LINES_MAX: usize = 700;
/// What the pure crates must not reach, through whatever path.
const IMPURE: [&str; 6] = ["tokio", "quinn", "hyper", "socket2", "mio", "kube"];

/// Features of packages that the product does not ask for and is tested with, because one command builds all: tests need them. That it
/// compiles without them is checked on its own, see `.ci/run`.
const ADDED_BY_TESTS: [(&str, &[&str]); 3] = [
    // The lab's TUN devices.
    ("nix", &["default", "ioctl"]),
    // The simulation puts a seed where the kernel's randomness is.
    ("rustix", &["rand"]),
    // Virtual time.
    ("tokio", &["test-util"]),
];

#[test]
fn what_is_tested_is_what_is_shipped() -> Result<()> {
    let shipped = features(&["--edges", "normal,build", "--package", "skctl"])?;
    let tested = features(&["--edges", "normal,build,dev", "--workspace"])?;
    let mut allowed: BTreeMap<_, BTreeSet<_>> = BTreeMap::new();
    for (package, features) in ADDED_BY_TESTS {
        allowed.insert(package.to_owned(), features.iter().map(|&f| f.to_owned()).collect());
    }
    let mut added = BTreeMap::new();
    for (package, features) in &shipped {
        let more: BTreeSet<_> = tested[package].difference(features).cloned().collect();
        if !more.is_empty() {
            let (name, _) = package.split_once(' ').context("a version")?;
            added.insert(name.to_owned(), more);
        }
    }
    assert_eq!(added, allowed, "features that tests add to what is shipped");
    Ok(())
}

#[test]
fn pure_crates_reach_no_runtime() -> Result<()> {
    for pure in ["skein-core", "skein-api", "skein-site-core"] {
        let reached = built_from(pure)?;
        for impure in IMPURE {
            assert!(!reached.contains(impure), "{pure} must not depend on {impure}");
        }
    }
    Ok(())
}

#[test]
fn arrows_point_one_way() -> Result<()> {
    let forbidden = [
        ("skein-core", "skein-wire"),
        ("skein-wire", "skein-trust"),
        ("skein-trust", "skein-router"),
        ("skein-router", "skein-api"),
        ("skein-router", "skein-controller"),
        ("skein-api", "skein-wire"),
        ("skein-site-core", "skein-controller"),
        ("skein-controller", "skein-router"),
        ("skein-controller", "skctl"),
    ];
    for (from, to) in forbidden {
        assert!(!built_from(from)?.contains(to), "{from} must not depend on {to}");
    }
    Ok(())
}

#[test]
fn functions_and_files_stay_small() -> Result<()> {
    let mut findings = Vec::new();
    for path in rust_files()? {
        let text = fs::read_to_string(&path)?;
        let lines: Vec<&str> = text.lines().collect();
        let product = lines.iter().position(|l| l.trim() == "#[cfg(test)]").unwrap_or(lines.len());
        let is_test = path.components().any(|c| c.as_os_str() == "tests");
        if !is_test && product > FILE_LINES_MAX {
            findings.push(format!("{}: {product} lines without its tests", path.display()));
        }
        for (start, length) in functions(&lines) {
            if length > FUNCTION_LINES_MAX {
                findings.push(format!(
                    "{}:{}: function of {length} lines",
                    path.display(),
                    start + 1
                ));
            }
        }
    }
    assert!(findings.is_empty(), "too large:\n{}", findings.join("\n"));
    Ok(())
}

/// Start and length of each function, by the indentation rustfmt gives its closing brace.
fn functions(lines: &[&str]) -> Vec<(usize, usize)> {
    let mut found = Vec::new();
    for (start, line) in lines.iter().enumerate() {
        let indent = line.len() - line.trim_start().len();
        let words: Vec<&str> = line.split_whitespace().collect();
        let Some(at) = words.iter().position(|w| *w == "fn") else { continue };
        let qualifiers = ["pub", "async", "const", "pub(crate)", "pub(super)"];
        if words[..at].iter().any(|w| !qualifiers.contains(w)) {
            continue;
        }
        let closing = format!("{}}}", &line[..indent]);
        if let Some(length) = lines[start..].iter().position(|l| *l == closing) {
            found.push((start, length + 1));
        }
    }
    found
}

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

fn rust_files() -> Result<Vec<PathBuf>> {
    let listing = Command::new("git")
        .args(["ls-files", "*.rs"])
        .current_dir(root())
        .output()
        .context("git ls-files")?;
    let listing = String::from_utf8(listing.stdout)?;
    let files: Vec<_> = listing.lines().map(|l| root().join(l)).filter(|p| p.exists()).collect();
    assert!(files.len() > 10, "git lists the sources");
    Ok(files)
}

/// The features of each package, by name and version, that a build of some of the workspace asks for.
fn features(selection: &[&str]) -> Result<BTreeMap<String, BTreeSet<String>>> {
    let tree = cargo_tree(&[selection, &["--format", "{p}|{f}"]].concat())?;
    let mut found = BTreeMap::<_, BTreeSet<_>>::new();
    for line in tree.lines().filter(|line| !line.is_empty()) {
        let (package, features) = line.split_once('|').context("a package and its features")?;
        let package = package.split_whitespace().take(2).collect::<Vec<_>>().join(" ");
        let features = features.trim_end_matches(" (*)").split(',').filter(|f| !f.is_empty());
        found.entry(package).or_default().extend(features.map(str::to_owned));
    }
    Ok(found)
}

/// Names of all packages `package` is built from, itself included, with the features it asks for on its own.
fn built_from(package: &str) -> Result<BTreeSet<String>> {
    let tree = cargo_tree(&["--edges", "normal", "--package", package])?;
    let names: BTreeSet<_> =
        tree.lines().filter_map(|l| l.split_whitespace().next().map(str::to_owned)).collect();
    assert!(names.contains(package), "cargo tree knows {package}");
    Ok(names)
}

fn cargo_tree(args: &[&str]) -> Result<String> {
    let cargo = std::env::var("CARGO").unwrap_or_else(|_| "cargo".into());
    let output = Command::new(cargo)
        .args(["tree", "--locked", "--prefix", "none"])
        .args(args)
        .current_dir(root())
        .output()
        .context("cargo tree")?;
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    Ok(String::from_utf8(output.stdout)?)
}
