//! The command tree. Arguments of a command live beside what it does.

use std::io::IsTerminal as _;

use clap::{Args, Parser, Subcommand, ValueEnum};

use crate::command;

const AFTER: &str = "\
Examples:
  skctl init hub --advertise 203.0.113.7     create and start a site that others can reach
  skctl token create branch.token            let one more site in
  skctl link branch.token                    join, on the other site
  skctl expose postgres --port 5432          serve an address to the network
  skctl service list                         what the network offers, and where to connect
  skctl demo                                 four sites on this machine in half a minute

Exit codes: 0 done, 1 failed, 2 wrong usage, 3 timeout, 130 interrupted.";

/// Connects services of sites that cannot reach each other.
///
/// Every site runs a controller and a router. `skctl` talks to the controller of the site on this machine; several sites
/// on one machine are told apart by their namespace.
#[derive(Debug, Parser)]
#[command(name = "skctl", version, after_help = AFTER, arg_required_else_help = true)]
#[command(max_term_width = 110, infer_subcommands = false)]
pub(crate) struct Cli {
    #[command(flatten)]
    pub(crate) global: Global,
    #[command(subcommand)]
    pub(crate) command: Command,
}

/// Options of every command.
#[derive(Clone, Debug, Args)]
#[command(next_help_heading = "Global options")]
pub(crate) struct Global {
    /// Site on this machine, when there are several
    #[arg(
        short,
        long,
        global = true,
        value_name = "NS",
        env = "SKEIN_NAMESPACE",
        default_value = "default",
        value_parser = parse_namespace
    )]
    pub(crate) namespace: String,
    /// Format of the output
    #[arg(
        short,
        long,
        global = true,
        value_name = "FORMAT",
        default_value = "table",
        hide_possible_values = true,
        help = "Format of the output: table, json, yaml, name, wide; `service list` has hosts too"
    )]
    pub(crate) output: Format,
    /// Only results and errors, no progress and notes
    #[arg(short, long, global = true, conflicts_with = "verbose")]
    pub(crate) quiet: bool,
    /// Every step with its time; the logs of processes when the demo fails
    #[arg(short, long, global = true)]
    pub(crate) verbose: bool,
}

/// A variable that is set to nothing is as good as one that is not set.
fn parse_namespace(text: &str) -> Result<String, std::convert::Infallible> {
    let is_unset = text.is_empty()
        && std::env::var_os("SKEIN_NAMESPACE").is_some_and(|value| value.is_empty());
    Ok(if is_unset { "default" } else { text }.to_owned())
}

impl Global {
    /// Whether standard error may be coloured (<https://no-color.org>).
    pub(crate) fn colour(&self) -> bool {
        std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty())
            && std::io::stderr().is_terminal()
    }

    /// Whether output goes to a program.
    pub(crate) fn structured(&self) -> bool {
        matches!(self.output, Format::Json | Format::Yaml | Format::Name)
    }
}

/// Formats of the output.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Format {
    /// For people.
    Table,
    /// One JSON document.
    Json,
    /// One YAML document.
    Yaml,
    /// Names only.
    Name,
    /// More columns.
    Wide,
    /// Lines for a hosts file; `service list` only.
    Hosts,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    Init(command::init::Init),
    Token(command::token::Token),
    Link(command::link::Link),
    Unlink(command::link::Unlink),
    Expose(command::expose::Expose),
    Unexpose(command::expose::Unexpose),
    Listen(command::listen::Listen),
    Unlisten(command::listen::Unlisten),
    Service(command::service::Service),
    Status(command::status::Status),
    Network(command::status::Network),
    Trace(command::trace::Trace),
    Doctor(command::doctor::Doctor),
    Apply(command::resource::Apply),
    Get(command::resource::Get),
    Delete(command::resource::Delete),
    Export(command::resource::Export),
    Start(command::process::Start),
    Stop(command::process::Stop),
    Restart(command::process::Restart),
    Logs(command::logs::Logs),
    Upgrade(command::process::Upgrade),
    Debug(command::debug::Debug),
    Identity(command::identity::Identity),
    Demo(command::demo::Demo),
    Completion(command::completion::Completion),
    Version(command::version::Version),
}
