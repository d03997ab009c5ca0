//! What a router is told at start: its name, where its controller is, where its key lives. Everything else arrives from the controller.

use crate::telemetry::LogFormat;
use rand::{Rng as _, SeedableRng as _, rngs::StdRng};
use std::{convert::Infallible, ffi::OsString, path::PathBuf, str::FromStr};

/// Where the controller listens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ControllerAddress {
    /// A Unix socket on this host.
    Unix(PathBuf),
}

impl FromStr for ControllerAddress {
    type Err = Infallible;

    /// `unix:PATH`, or just a path.
    fn from_str(text: &str) -> Result<Self, Infallible> {
        Ok(Self::Unix(PathBuf::from(text.strip_prefix("unix:").unwrap_or(text))))
    }
}

/// Everything a router needs to start.
#[derive(Clone, Debug)]
pub struct Config {
    /// The router's name within its site, part of its certificate.
    pub name: String,
    /// Where the controller listens.
    pub controller: ControllerAddress,
    /// Directory of `router.key` and the cached certificate; made with mode 0700 if missing.
    pub state_dir: PathBuf,
    /// Program and arguments that start the controller when its socket stays dead; empty: somebody else looks after it.
    pub respawn_controller: Vec<OsString>,
    /// Everything random that is not cryptography derives from this: flow ids, draws among equals.
    pub seed: [u8; 32],
}

/// The router process's command line.
#[derive(clap::Parser, Debug)]
#[command(name = "skein-router", version, about = "The data plane of a Skein site")]
pub(crate) struct Args {
    /// Name of this router within its site
    #[arg(long, default_value = "router")]
    name: String,
    /// Where the controller listens: unix:PATH
    #[arg(long)]
    controller: ControllerAddress,
    /// Directory of the router's key and certificate
    #[arg(long, value_name = "DIR")]
    state: PathBuf,
    /// How log lines look
    #[arg(long, value_enum, default_value_t)]
    pub(crate) log_format: LogFormat,
    /// error, warn, info, debug, trace, or a filter such as info,skein_router::link=debug
    #[arg(long, default_value = "info")]
    pub(crate) log_level: String,
    /// Command that starts the controller when its socket stays dead; takes the rest of the line
    #[arg(long, value_name = "CMD", num_args = 1.., allow_hyphen_values = true)]
    respawn_controller: Vec<OsString>,
}

impl Args {
    pub(crate) fn into_config(self) -> Config {
        Config {
            name: self.name,
            controller: self.controller,
            state_dir: self.state,
            respawn_controller: self.respawn_controller,
            seed: StdRng::from_os_rng().random(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::{CommandFactory as _, Parser as _};

    #[test]
    fn the_command_line_is_consistent() {
        Args::command().debug_assert();
    }

    #[test]
    fn the_respawn_command_takes_the_rest_of_the_line() {
        let args = Args::parse_from(
            "skein-router --name r1 --controller unix:/run/s.sock --state /s --respawn-controller skein-controller --state /x"
                .split(' '),
        );
        let config = args.into_config();
        assert_eq!(config.controller, ControllerAddress::Unix("/run/s.sock".into()));
        assert_eq!(config.respawn_controller, ["skein-controller", "--state", "/x"]);
    }
}
