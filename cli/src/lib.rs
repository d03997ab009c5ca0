//! The Skein command line.
//!
//! A command turns its arguments into a request to the site's controller and the answer into text; whatever decides
//! anything lives in the controller. What creates, starts and removes a site works without a controller and is in `host`.

mod args;
mod client;
mod clock;
mod command;
mod error;
mod host;
mod input;
mod net;
mod output;
mod progress;
mod render;

use std::{ffi::OsString, io::Write as _, process::ExitCode};

use clap::{CommandFactory as _, Parser as _};
use tokio::signal::unix::{Signal, SignalKind, signal};

use crate::{
    args::{Cli, Command},
    error::{Exit, Failure},
};

/// Runs `skctl`; `args` begins with the program's name.
///
/// Exits 0 on success, 1 on failure, 2 on wrong usage, 3 on a timeout, 130 when interrupted.
pub fn run(args: impl Iterator<Item = OsString>) -> ExitCode {
    let cli = match Cli::try_parse_from(args) {
        Ok(cli) => cli,
        Err(error) => {
            // Nothing is left to do when even the usage message cannot be printed.
            let _ = error.print();
            return if error.use_stderr() { Exit::Usage.into() } else { ExitCode::SUCCESS };
        }
    };
    match run_parsed(cli) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            if !failure.is_silent() {
                // As above.
                let _ = writeln!(std::io::stderr(), "error: {failure}");
            }
            failure.exit().into()
        }
    }
}

/// The command tree, for completions, man pages and the reference.
#[must_use]
pub fn command() -> clap::Command {
    Cli::command()
}

fn run_parsed(cli: Cli) -> Result<(), Failure> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| Failure::new("cannot start").because(error))?;
    let result = runtime.block_on(async {
        if matches!(&cli.command, Command::Init(init) if init.is_foreground()) {
            return command::run(cli).await;
        }
        let redeems = matches!(&cli.command, Command::Link(link) if link.redeems());
        // Dropping the command's future undoes what it began: progress lines, temporary files, the demo's sites.
        tokio::select! {
            biased; // an interrupted command must not be reported as a success
            result = interrupted() => result.map_err(|failure| match redeems {
                true => failure.because("the site may still redeem the token").next("see `skctl link list`"),
                false => failure,
            }),
            result = command::run(cli) => result,
        }
    });
    // A blocking read of standard input would otherwise keep the process alive.
    runtime.shutdown_background();
    result
}

/// Ctrl-C and SIGTERM, from the moment it is made.
pub(crate) struct Interrupt {
    interrupt: Signal,
    terminate: Signal,
}

impl Interrupt {
    /// # Errors
    /// The system refuses.
    pub(crate) fn new() -> Result<Self, Failure> {
        let handler = |error| Failure::new("cannot wait for signals").because(error);
        Ok(Self {
            interrupt: signal(SignalKind::interrupt()).map_err(handler)?,
            terminate: signal(SignalKind::terminate()).map_err(handler)?,
        })
    }

    /// Waits for either.
    pub(crate) async fn recv(&mut self) {
        tokio::select! {
            _ = self.interrupt.recv() => {} // cancel-safe
            _ = self.terminate.recv() => {} // cancel-safe
        }
    }
}

async fn interrupted() -> Result<(), Failure> {
    Interrupt::new()?.recv().await;
    Err(Failure::interrupted())
}
