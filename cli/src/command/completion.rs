//! `skctl completion`

use clap::Args;
use clap_complete::Shell;

use crate::{error::Failure, output};

/// Prints a completion script for a shell
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  source <(skctl completion bash)
  skctl completion zsh > ~/.zfunc/_skctl
  skctl completion fish > ~/.config/fish/completions/skctl.fish")]
pub(crate) struct Completion {
    /// The shell
    shell: Shell,
}

pub(crate) fn run(args: &Completion) -> Result<(), Failure> {
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut crate::command(), "skctl", &mut script);
    let script = String::from_utf8(script)
        .map_err(|error| Failure::new("cannot write the script").because(error))?;
    output::print(&script)
}
