//! What the user sees while a command works: a spinner on a terminal, lines otherwise, timed with `-v`, nothing with `-q`.

use std::{
    io::{IsTerminal as _, Write as _},
    time::{Duration, Instant},
};

use indicatif::{ProgressBar, ProgressStyle};

use crate::{args::Global, clock};

/// How often the spinner turns.
const TICK: Duration = Duration::from_millis(100);

/// Progress of one command, on standard error.
#[derive(Debug)]
pub(crate) struct Progress {
    kind: Kind,
    last: String,
}

#[derive(Debug)]
enum Kind {
    Quiet,
    Lines,
    /// Lines with the time since the command began.
    Timed(Instant),
    Spinner(ProgressBar),
}

impl Progress {
    pub(crate) fn start(global: &Global, step: impl Into<String>) -> Self {
        let kind = if global.quiet {
            Kind::Quiet
        } else if global.verbose {
            Kind::Timed(clock::instant())
        } else if std::io::stderr().is_terminal() {
            let bar = ProgressBar::new_spinner();
            let template =
                if global.colour() { "{spinner:.cyan} {msg}" } else { "{spinner} {msg}" };
            bar.set_style(
                ProgressStyle::with_template(template).expect("invariant: a constant template"),
            );
            bar.enable_steady_tick(TICK);
            Kind::Spinner(bar)
        } else {
            Kind::Lines
        };
        let mut progress = Self { kind, last: String::new() };
        progress.step(step);
        progress
    }

    /// Says what is being done or waited for.
    pub(crate) fn step(&mut self, step: impl Into<String>) {
        let step = step.into();
        if step == self.last || step.is_empty() {
            return;
        }
        match &self.kind {
            Kind::Quiet => {}
            Kind::Spinner(bar) => bar.set_message(format!("{step} …")),
            Kind::Timed(began) => {
                let seconds = began.elapsed().as_secs_f64();
                // As below.
                drop(writeln!(std::io::stderr(), "[{seconds:7.3} s] {step} …"));
            }
            // Whether standard error can be written to is not for this command to mend.
            Kind::Lines => drop(writeln!(std::io::stderr(), "{step} …")),
        }
        self.last = step;
    }

    /// Removes the spinner; also happens on drop.
    pub(crate) fn finish(self) {}
}

impl Drop for Progress {
    fn drop(&mut self) {
        if let Kind::Spinner(bar) = &self.kind {
            bar.finish_and_clear();
        }
    }
}
