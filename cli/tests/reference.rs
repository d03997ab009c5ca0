//! `docs/cli.md` and `docs/man/` are what the command tree says. `SKEIN_BLESS=1 cargo test -p skctl` writes them anew.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::{
    collections::BTreeMap,
    fmt::Write as _,
    fs,
    path::{Path, PathBuf},
};

use clap::{Arg, Command};

/// The width people read in a terminal, whatever terminal the test runs in.
const WIDTH: usize = 100;

#[test]
fn the_command_tree_is_consistent() {
    skctl::command().debug_assert();
}

#[test]
fn every_command_has_examples() {
    visit(&built(), &mut Vec::new(), &mut |path, command| {
        let leaf = command.get_subcommands().next().is_none();
        let help = command.get_after_help().map(ToString::to_string).unwrap_or_default();
        assert!(!leaf || help.contains("Example"), "{} has no example", path.join(" "));
        assert!(
            !leaf || help.contains(&path.join(" ")),
            "{}: the example is another's",
            path.join(" ")
        );
        for arg in command.get_arguments() {
            let documented = arg.get_help().is_some_and(|help| !help.to_string().trim().is_empty());
            assert!(documented, "{}: {} is undocumented", path.join(" "), arg.get_id());
        }
    });
}

#[test]
fn the_reference_is_current() {
    let docs = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs");
    let mut files = BTreeMap::from([(docs.join("cli.md"), markdown())]);
    for (name, page) in man_pages() {
        files.insert(docs.join("man").join(name), page);
    }
    let bless = std::env::var_os("SKEIN_BLESS").is_some();
    if bless {
        fs::create_dir_all(docs.join("man")).unwrap();
        for stale in pages_in(&docs.join("man")).filter(|path| !files.contains_key(path)) {
            fs::remove_file(stale).unwrap();
        }
        for (path, text) in &files {
            fs::write(path, text).unwrap();
        }
    }
    for (path, text) in &files {
        let committed = fs::read_to_string(path).unwrap_or_default();
        assert!(
            committed == *text,
            "{} is stale; run: SKEIN_BLESS=1 cargo test -p skctl",
            path.display()
        );
    }
    for path in pages_in(&docs.join("man")) {
        assert!(files.contains_key(&path), "{} belongs to no command", path.display());
    }
}

fn pages_in(dir: &Path) -> impl Iterator<Item = PathBuf> {
    fs::read_dir(dir).into_iter().flatten().map(|entry| entry.unwrap().path())
}

fn built() -> Command {
    // The terminal's width and the environment's values belong to whoever runs this.
    let mut command = skctl::command().term_width(WIDTH).disable_help_subcommand(true);
    command.build();
    command
}

/// Calls `see` for every command but the root, parents first.
fn visit(command: &Command, path: &mut Vec<String>, see: &mut impl FnMut(&[String], &Command)) {
    path.push(command.get_name().to_owned());
    if path.len() > 1 {
        see(path, command);
    }
    for sub in command.get_subcommands() {
        visit(sub, path, see);
    }
    path.pop();
}

fn markdown() -> String {
    let root = built();
    let mut out = String::from(
        "# Command line\n\n<!-- Generated from the command tree: SKEIN_BLESS=1 cargo test -p skctl -->\n\n",
    );
    let about = root.get_long_about().or_else(|| root.get_about());
    writeln!(out, "{}\n", about.expect("a description")).unwrap();
    writeln!(out, "```text\n{}\n```\n", root.get_after_help().expect("examples")).unwrap();
    writeln!(out, "## Options of every command\n\n{}", table(root.get_arguments())).unwrap();
    visit(&root, &mut Vec::new(), &mut |path, command| section(&mut out, path, command));
    out
}

fn section(out: &mut String, path: &[String], command: &Command) {
    let level = "#".repeat(path.len());
    writeln!(out, "{level} {}\n", path.join(" ")).unwrap();
    let about = command.get_long_about().or_else(|| command.get_about());
    writeln!(out, "{}\n", about.expect("a description")).unwrap();
    if command.get_subcommands().next().is_none() || command.get_positionals().next().is_some() {
        let usage = command.clone().render_usage().to_string();
        writeln!(out, "```text\n{}\n```\n", usage.trim_start_matches("Usage: ")).unwrap();
    }
    let own = command.get_arguments().filter(|arg| !arg.is_global_set() && arg.get_id() != "help");
    let rows = table(own);
    if !rows.is_empty() {
        writeln!(out, "{rows}").unwrap();
    }
    if let Some(examples) = command.get_after_help() {
        let examples = examples.to_string();
        let lines =
            examples.lines().filter(|line| !line.starts_with("Example")).map(str::trim_start);
        writeln!(out, "```sh\n{}\n```\n", lines.collect::<Vec<_>>().join("\n")).unwrap();
    }
}

fn table<'a>(args: impl Iterator<Item = &'a Arg>) -> String {
    let mut out = String::new();
    for arg in args.filter(|arg| !matches!(arg.get_id().as_str(), "help" | "version")) {
        if out.is_empty() {
            out.push_str("| argument | meaning |\n|---|---|\n");
        }
        let value = arg.get_value_names().map(|names| names.join(" ")).unwrap_or_default();
        let takes_value = arg.get_action().takes_values();
        let name = match (arg.get_short(), arg.get_long()) {
            (Some(short), Some(long)) => format!("-{short}, --{long}"),
            (None, Some(long)) => format!("--{long}"),
            (Some(short), None) => format!("-{short}"),
            (None, None) => String::new(),
        };
        let name = match (name.is_empty(), takes_value) {
            (true, _) => value,
            (false, true) => format!("{name} {value}"),
            (false, false) => name,
        };
        let mut meaning = arg.get_help().map(ToString::to_string).unwrap_or_default();
        let possible: Vec<_> =
            arg.get_possible_values().iter().map(|value| value.get_name().to_owned()).collect();
        if takes_value && !possible.is_empty() && !arg.is_hide_possible_values_set() {
            write!(meaning, " (one of {})", possible.join(", ")).unwrap();
        }
        let defaults: Vec<_> =
            arg.get_default_values().iter().map(|value| value.to_string_lossy()).collect();
        if takes_value && !defaults.is_empty() {
            write!(meaning, " (default: {})", defaults.join(" ")).unwrap();
        }
        if let Some(variable) = arg.get_env() {
            write!(meaning, " (environment: {})", variable.to_string_lossy()).unwrap();
        }
        writeln!(out, "| `{}` | {} |", name.replace('|', "\\|"), meaning.replace('|', "\\|"))
            .unwrap();
    }
    out
}

fn man_pages() -> Vec<(String, String)> {
    let mut pages = Vec::new();
    let mut render = |name: String, command: &Command| {
        let mut page = Vec::new();
        let command = command.clone().name(&*name.clone().leak());
        clap_mangen::Man::new(command)
            .date("")
            .source(concat!("skein ", env!("CARGO_PKG_VERSION")))
            .manual("Skein")
            .render(&mut page)
            .unwrap();
        // Blanks at the ends of lines come and go with versions of the generator.
        let page = String::from_utf8(page).unwrap();
        let page: String = page.lines().map(|line| line.trim_end().to_owned() + "\n").collect();
        pages.push((format!("{name}.1"), page));
    };
    let root = built();
    render("skctl".to_owned(), &root);
    visit(&root, &mut Vec::new(), &mut |path, command| render(path.join("-"), command));
    pages
}
