//! `skctl trace`

use clap::Args;
use skein_api::{Protocol, status::TraceReport};
use skein_core::Address;

use crate::{
    args::Global, client::Client, command::port::split_protocol, error::Failure, output, render,
};

/// Shows the path that a new flow to an address would take now
///
/// Every hop with its round-trip time, the sites that serve the address and why one of them is chosen, alternative paths.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  skctl trace postgres
  skctl trace web.prod:443 -o json
  skctl trace dns:53/udp")]
pub(crate) struct Trace {
    /// The address, with a port if sites serve different ones
    #[arg(value_name = "ADDRESS[:PORT[/udp]]")]
    address: String,
}

pub(crate) async fn run(global: &Global, args: Trace) -> Result<(), Failure> {
    let (address, port, protocol) = split(&args.address)?;
    let mut client = Client::connect(global).await?;
    let report: TraceReport = client.trace(address.to_owned(), u32::from(port), protocol).await?;
    let failed = !report.error.is_empty() || !report.candidates.iter().any(|c| c.chosen);
    output::show(global, &render::Trace { report, protocol })?;
    // The report itself says why.
    if failed { Err(Failure::told()) } else { Ok(()) }
}

fn split(text: &str) -> Result<(&str, u16, Protocol), Failure> {
    let (address, port, protocol) = match text.split_once(':') {
        None => (text, 0, Protocol::Tcp),
        Some((address, port)) => {
            let (port, protocol) = split_protocol(port).map_err(Failure::usage)?;
            match port.parse::<u16>() {
                Ok(number) if number > 0 => (address, number, protocol.unwrap_or_default()),
                _ => {
                    return Err(Failure::usage(format_args!(
                        "{port:?} is not a port of 1 to 65535"
                    )));
                }
            }
        }
    };
    address.parse::<Address>().map_err(|why| {
        Failure::usage(format_args!("{address:?} is not an address")).because(why)
    })?;
    Ok((address, port, protocol))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_port_is_optional_and_checked() {
        assert_eq!(split("a.b"), Ok(("a.b", 0, Protocol::Tcp)));
        assert_eq!(split("a:5"), Ok(("a", 5, Protocol::Tcp)));
        assert_eq!(split("a:5/udp"), Ok(("a", 5, Protocol::Udp)));
        for bad in ["a:5/sctp", "a/udp", "a:0", "a:70000", "a:", ":5", "A", "a:b:c"] {
            assert!(split(bad).is_err(), "{bad}");
        }
    }
}
