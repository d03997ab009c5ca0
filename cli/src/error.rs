//! Failures as users read them: what; why; what to do next.

use std::{fmt, process::ExitCode};

/// How a command ended, as its exit code.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Exit {
    /// It did not do what was asked.
    Failed = 1,
    /// It was asked wrongly.
    Usage = 2,
    /// It gave up waiting.
    Timeout = 3,
    /// Ctrl-C or SIGTERM, by the convention of shells.
    Interrupted = 130,
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> Self {
        Self::from(exit as u8)
    }
}

/// Why a command failed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) struct Failure {
    exit: Exit,
    what: String,
    why: Option<String>,
    next: Option<String>,
}

impl Failure {
    /// `what` went wrong.
    pub(crate) fn new(what: impl fmt::Display) -> Self {
        Self { exit: Exit::Failed, what: what.to_string(), why: None, next: None }
    }

    /// The arguments make no sense.
    pub(crate) fn usage(what: impl fmt::Display) -> Self {
        Self { exit: Exit::Usage, ..Self::new(what) }
    }

    /// Waiting was given up.
    pub(crate) fn timeout(what: impl fmt::Display) -> Self {
        Self { exit: Exit::Timeout, ..Self::new(what) }
    }

    /// The user or the system ended the program.
    pub(crate) fn interrupted() -> Self {
        Self { exit: Exit::Interrupted, ..Self::new("interrupted") }
    }

    /// The failure was already told on the way; only the exit code is left.
    pub(crate) fn told() -> Self {
        Self::new("")
    }

    pub(crate) fn because(mut self, why: impl fmt::Display) -> Self {
        self.why = Some(why.to_string());
        self
    }

    pub(crate) fn next(mut self, next: impl fmt::Display) -> Self {
        self.next = Some(next.to_string());
        self
    }

    /// Says where it happened, in front of what.
    pub(crate) fn within(mut self, place: impl fmt::Display) -> Self {
        self.what = format!("{place}: {}", self.what);
        self
    }

    pub(crate) fn exit(&self) -> Exit {
        self.exit
    }

    pub(crate) fn is_silent(&self) -> bool {
        self.what.is_empty()
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.what)?;
        for part in [&self.why, &self.next].into_iter().flatten() {
            write!(f, "; {part}")?;
        }
        Ok(())
    }
}

impl From<tonic::Status> for Failure {
    fn from(status: tonic::Status) -> Self {
        use tonic::Code;
        let message = status.message();
        match status.code() {
            Code::DeadlineExceeded | Code::Cancelled => {
                Self::timeout("the controller did not answer in time")
                    .next("see `skctl logs`, or run `skctl restart`")
            }
            Code::Unavailable => Self::new("lost the connection to the controller")
                .because(message)
                .next("see `skctl logs`"),
            Code::Unimplemented => Self::new("the controller does not know this request")
                .because("it is older than this skctl")
                .next("run `skctl upgrade`"),
            _ if message.is_empty() => {
                Self::new(format_args!("the controller refused ({})", status.code()))
                    .next("see `skctl logs`")
            }
            // The controller words its errors for users.
            _ => Self::new(message),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_what_why_next() {
        let failure = Failure::new("a").because("b").next("c");
        assert_eq!(failure.to_string(), "a; b; c");
        assert_eq!(Failure::usage("a").next("c").to_string(), "a; c");
        assert_eq!(Failure::usage("a").exit(), Exit::Usage);
    }

    #[test]
    fn a_deadline_is_a_timeout() {
        assert_eq!(Failure::from(tonic::Status::deadline_exceeded("x")).exit(), Exit::Timeout);
        let refused = Failure::from(tonic::Status::invalid_argument("x; y; z"));
        assert_eq!((refused.exit(), refused.to_string().as_str()), (Exit::Failed, "x; y; z"));
    }
}
