//! One flow at its ingress: choose an egress, open, try another if that fails, splice.

use super::{
    Ingress,
    attempt::{Attempt, Client, Opened, Opening},
};
use crate::{
    egress::{Egress, Local, LocalFlow, Refusal},
    flows::{FlowRecord, Outcome, may_provide},
    net::{self, TcpStream},
    session::{Class, Flow},
    splice::{self, Terms},
};
use bytes::Bytes;
use std::io;

/// Of what a client says first, so much is read before an egress has accepted: a request, and what a flow that waits may hold.
const FIRST_LEN_MAX: usize = 16 << 10;

impl Client for TcpStream {
    type Local = Box<LocalFlow>;
    const CLASS: Class = Class::Streams;

    /// What there is without waiting, once.
    fn first(&self, ingress: &Ingress, before: Bytes) -> Result<Bytes, Outcome> {
        if !before.is_empty() {
            return Ok(before);
        }
        match ingress.0.config.surroundings.buffer.try_read(self, FIRST_LEN_MAX) {
            Ok(read) => Ok(read),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(before),
            Err(_reset) => Err(Outcome::NearReset),
        }
    }

    fn is_repeatable(&self) -> bool {
        false
    }

    fn began(&self, _flow: &Flow) {}

    async fn open_local(
        &self,
        egress: &Egress,
        local: Local<'_>,
    ) -> Result<Box<LocalFlow>, Refusal> {
        egress.connect_local(local).await.map(Box::new)
    }
}

/// Serves a client from its acceptance to its end.
pub(super) async fn serve(
    ingress: Ingress,
    opening: Opening,
    client: TcpStream,
    mut record: FlowRecord,
    turn: u64,
) {
    let surroundings = &ingress.0.config.surroundings;
    let progress = record.progress();
    let opening_counted = ingress.count_opening(&opening.address);
    let attempt =
        Attempt { ingress: &ingress, opening: &opening, client: &client, flow_id: record.flow_id };
    let opened = match net::tcp_flow_options(&client) {
        Ok(()) if opening_counted.is_none() => Err(Outcome::Overloaded),
        Ok(()) => tokio::select! {
            opened = attempt.open(&mut record, turn) => opened,
            () = splice::reset_of(&client) => Err(Outcome::NearReset),
            () = ingress.0.abort.cancelled() => Err(Outcome::Aborted),
        },
        Err(_gone) => Err(Outcome::NearReset),
    };
    drop(opening_counted);
    record.outcome = match opened {
        Ok((Opened::Remote(flow, first), _counted)) => {
            // Counted here what the splice does not see.
            progress.add_from_socket(flow.send.sent_bytes());
            let buffer = &surroundings.buffer;
            let abort = &ingress.0.abort;
            let terms = Terms { buffer, progress: &progress, idle_timeout: None, abort };
            let (egress_site, address) = (record.egress_site, &opening.address);
            let allowed =
                |trust: &_| egress_site.is_some_and(|site| may_provide(trust, site, address));
            tokio::select! {
                // Polled first, because only then does dropping it reset both sides.
                biased;
                outcome = splice::with_flow(client, *flow, first, terms) => outcome,
                () = surroundings.revoked(allowed) => {
                    tracing::debug!("flow reset: its egress may not serve the address any more");
                    Outcome::Aborted
                }
            }
        }
        Ok((Opened::Local(flow, first), _counted)) => {
            flow.splice(client, first, &progress, &ingress.0.abort).await
        }
        Err(outcome) => {
            splice::reset(client);
            outcome
        }
    };
}
