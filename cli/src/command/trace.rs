//! `skctl trace`

use clap::Args;
use skein_api::status::TraceReport;
use skein_core::Address;

use crate::{args::Global, client::Client, error::Failure, output, render};

/// Shows the path that a new flow to an address would take now
///
/// Every hop with its round-trip time, the sites that serve the address and why one of them is chosen, alternative paths.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  skctl trace postgres\n  skctl trace web.prod:443 -o json")]
pub(crate) struct Trace {
    /// The address, with a port if sites serve different ones
    #[arg(value_name = "ADDRESS[:PORT]")]
    address: String,
}

pub(crate) async fn run(global: &Global, args: Trace) -> Result<(), Failure> {
    let (address, port) = split(&args.address)?;
    let report: TraceReport =
        Client::connect(global).await?.trace(address.to_owned(), u32::from(port)).await?;
    let failed = !report.error.is_empty() || !report.candidates.iter().any(|c| c.chosen);
    output::show(global, &render::Trace(report))?;
    // The report itself says why.
    if failed { Err(Failure::told()) } else { Ok(()) }
}

fn split(text: &str) -> Result<(&str, u16), Failure> {
    let (address, port) = match text.split_once(':') {
        None => (text, 0),
        Some((address, port)) => match port.parse::<u16>() {
            Ok(number) if number > 0 => (address, number),
            _ => return Err(Failure::usage(format_args!("{port:?} is not a port of 1 to 65535"))),
        },
    };
    address.parse::<Address>().map_err(|why| {
        Failure::usage(format_args!("{address:?} is not an address")).because(why)
    })?;
    Ok((address, port))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_port_is_optional_and_checked() {
        assert_eq!(split("a.b"), Ok(("a.b", 0)));
        assert_eq!(split("a:5"), Ok(("a", 5)));
        for bad in ["a:0", "a:70000", "a:", ":5", "A", "a:b:c"] {
            assert!(split(bad).is_err(), "{bad}");
        }
    }
}
