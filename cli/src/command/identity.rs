//! `skctl identity export`

use std::path::Path;

use clap::{Args, Subcommand};

use crate::{
    args::Global, client::Client, error::Failure, input, output::note, progress::Progress,
};

/// Backs up who this site is
#[derive(Debug, Args)]
pub(crate) struct Identity {
    #[command(subcommand)]
    action: Action,
}

#[derive(Debug, Subcommand)]
enum Action {
    Export(Export),
}

/// Writes the site's identity to a file, encrypted with a passphrase
///
/// With it `skctl init --identity FILE` rebuilds the site on another machine under the same id. Never run both at once.
/// The passphrase is asked for on the terminal, or read from standard input.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  skctl identity export hub.identity
  skctl identity export hub.identity --passphrase-file /run/secrets/passphrase")]
struct Export {
    /// File to write (mode 0600)
    file: String,
    /// Reads the passphrase from the first line of this file
    #[arg(long, value_name = "FILE")]
    passphrase_file: Option<String>,
    /// Replaces the file if it exists
    #[arg(long)]
    force: bool,
}

pub(crate) async fn run(global: &Global, args: Identity) -> Result<(), Failure> {
    let Action::Export(args) = args.action;
    let path = Path::new(&args.file);
    if !args.force && path.exists() {
        return Err(Failure::new(format_args!("{} exists already", path.display()))
            .next("name another file, or add --force to replace it"));
    }
    let mut client = Client::connect(global).await?;
    let passphrase = input::passphrase(args.passphrase_file, true).await?;
    // Deriving the key takes a second or more on purpose.
    let progress = Progress::start(global, "encrypting");
    let archive = client.export_identity(passphrase).await?;
    progress.finish();
    input::write_secret(path, &archive, args.force)?;
    note(global, format_args!("Wrote {}. Without the passphrase it is useless.", path.display()));
    Ok(())
}
