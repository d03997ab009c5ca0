//! The life of a link between its hello and its end.

use super::{
    Inner, LinkEvent, LinkUp, Registered,
    event::Turns,
    hello::{self, CLOSED, Greeted, HelloError, SILENT, TOO_SMALL},
    port::ServedPort,
    stream::{MessageReader, ReadError, write_queued},
};
use crate::{
    carrier::Remote,
    clock,
    fabric::{Attention, FrameLink, LinkKeys},
};
use quinn::{Connection, ConnectionError, SendStream};
use skein_core::{LinkId, RouterId};
use skein_wire::{
    frame::Key,
    proto::routing::{LinkMessage, LinkParameters, link_message::Message},
};
use std::{sync::Arc, time::Duration};
use tokio::{
    sync::{mpsc, oneshot},
    time::{sleep, timeout},
};
use tokio_util::sync::CancellationToken;

/// Control messages waiting for the hop connection, per link; the engine keeps the rest.
const OUTGOING_MAX: usize = 64;
/// How long frames of a link that ended are still accepted: some are on their way.
const LINGER: Duration = Duration::from_secs(2);
/// How long what is queued may take to reach the neighbour when a link is closed.
const GOODBYE_MAX: Duration = Duration::from_millis(300);
/// How long a new link may take to find the size of its frames before it goes into service with the minimum.
const SETTLE_MAX: Duration = Duration::from_millis(100);
/// A round-trip time is told again when it has changed by this fraction.
const RTT_CHANGE_FRACTION: u32 = 4;
/// Changes below this are noise, whatever the fraction.
const RTT_CHANGE_MIN: Duration = Duration::from_millis(1);
/// Why a link is given up although its neighbour answers.
pub(super) const PATH_TOO_SMALL: &str = "the path does not carry packets of 1,280 bytes: raise the MTU of the tunnel or interface on the way";
/// Link costs as LSAs carry them.
const COST_MAX: u32 = 65_535;

/// A link about to go into service.
pub(super) struct Established {
    up: LinkUp,
    connection: Connection,
    send: SendStream,
    reader: MessageReader,
    frames: Arc<FrameLink>,
    port: Arc<ServedPort>,
    in_service: Option<oneshot::Sender<()>>,
}

/// A router, from one start of it to the next.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Neighbour {
    router: RouterId,
    boot_epoch: u64,
}

/// What a link is called and costs here; an incoming one adopts what the neighbour says.
#[derive(Clone, Debug)]
pub(super) struct Terms {
    pub(super) name: String,
    pub(super) cost: u32,
    pub(super) incoming: bool,
}

impl Established {
    /// Derives the keys and joins everything a link is made of.
    ///
    /// # Errors
    /// When the TLS library exports no keys.
    pub(super) fn new(
        inner: &Inner,
        connection: Connection,
        port: Arc<ServedPort>,
        greeted: Greeted,
        terms: Terms,
    ) -> Result<Self, HelloError> {
        let Greeted { peer, hello, id, send, reader } = greeted;
        let Terms { name, cost, incoming } = terms;
        let (from_dialler, from_accepter) = hello::frame_keys(&connection, id)?;
        let (mine, theirs) =
            if incoming { (from_accepter, from_dialler) } else { (from_dialler, from_accepter) };
        #[allow(clippy::cast_possible_truncation, reason = "two bits")]
        let epoch = (id.0 & 3) as u8;
        let keys = LinkKeys { send: Key::new(mine), receive: Key::new(theirs), epoch };
        // A dialled link leaves the choice of the source address to the kernel, so that it survives a change of network.
        let local_ip = connection.local_ip().filter(|_| incoming);
        let remote = Remote { addr: connection.remote_address(), local_ip };
        let carrier = port.port().carrier(remote, inner.random_bytes());
        let frames = FrameLink::new(
            (id, inner.fabric.source()),
            carrier,
            keys,
            (clock::now(), connection.rtt()),
        );
        let up = LinkUp {
            id,
            incoming,
            name,
            peer,
            hello,
            cost: cost.clamp(1, COST_MAX),
            rtt: frames.rtt(),
            mtu: frames.mtu(),
        };
        Ok(Self { up, connection, send, reader, frames, port, in_service: None })
    }

    pub(super) fn id(&self) -> LinkId {
        self.up.id
    }

    /// The router at the other end, and its boot.
    pub(super) fn neighbour(&self) -> Neighbour {
        Neighbour { router: self.up.peer.router, boot_epoch: self.up.hello.boot_epoch }
    }

    pub(super) fn is_tls(&self) -> bool {
        self.frames.carrier().name() == "tls"
    }

    pub(super) fn rtt(&self) -> Duration {
        self.up.rtt
    }

    pub(super) fn frames(&self) -> Arc<FrameLink> {
        Arc::clone(&self.frames)
    }

    /// Tells when the link has gone into service; the sender is dropped if it never does.
    pub(super) fn in_service(&mut self) -> oneshot::Receiver<()> {
        let (sender, receiver) = oneshot::channel();
        self.in_service = Some(sender);
        receiver
    }

    /// Serves the link until it ends; returns why.
    ///
    /// # Cancel safety
    /// Must run to its end, or the link's `Down` event is missing: end it through `stop` or its [`Registered`] entry.
    pub(super) async fn run(self, inner: &Arc<Inner>, stop: &CancellationToken) -> String {
        let Self { up, connection, send, reader, frames, port, in_service } = self;
        let id = up.id;
        let (queue, queued) = mpsc::channel(OUTGOING_MAX);
        let close = stop.child_token();
        let registered = Registered {
            queue: queue.clone(),
            frames: Arc::clone(&frames),
            close: close.clone(),
            close_reason: Arc::default(),
            up: up.clone(),
            since_unix_ms: clock::unix_ms(),
            since: clock::now(),
        };
        let close_reason = Arc::clone(&registered.close_reason);
        if !inner.register(registered) {
            connection.close(CLOSED, b"link id in use");
            return "link id in use".to_owned();
        }
        frames.carrier().attach(&frames);
        settle(&frames, inner).await;
        let up = LinkUp { rtt: frames.rtt(), mtu: frames.mtu(), ..up };
        inner.fabric.add_link(Arc::clone(&frames));
        tracing::info!(name = up.name, peer = %up.peer.router, incoming = up.incoming, "link up");
        let incoming = up.incoming;
        let reported = (up.rtt, up.mtu);
        inner.report(LinkEvent::Up(Box::new(up))).await;
        if let Some(in_service) = in_service {
            // Whoever does not wait for it does not mind.
            let _ = in_service.send(());
        }

        let turns = Turns::new();
        let ping = (!incoming).then_some(&queue);
        let reason = tokio::select! {
            // The branches are futures made here and dropped together: none is resumed after another has ended.
            reason = read(reader, (id, &turns), &connection, inner) => reason,
            outcome = write(send, queued, &close) => write_reason(outcome, &close_reason.lock()),
            ended = frames.carrier().ended() => ended,
            reason = keep_alive(&frames, reported, ping, inner) => reason,
            () = async { close.cancelled().await; sleep(GOODBYE_MAX).await } => {
                write_reason(Ok(()), &close_reason.lock())
            }
        };
        frames.set_down();
        inner.fabric.remove_link(id);
        let closed = connection.close_reason();
        if let Some(ConnectionError::ApplicationClosed(close)) = &closed {
            match close.error_code {
                TOO_SMALL => frames.set_too_small(),
                SILENT => frames.set_silent(),
                _ => {}
            }
        }
        let reason = closed.map_or(reason, |error| connection_reason(&error));
        let code = match (frames.is_too_small(), frames.is_silent()) {
            (true, _) => TOO_SMALL,
            (false, true) => SILENT,
            (false, false) => CLOSED,
        };
        connection.close(code, reason.as_bytes());
        inner.unregister(id);
        tracing::info!(reason, "link down");
        tokio::select! {
            // What the neighbour said last comes before its end.
            last = turns.next() => drop(last), // cancel-safe
            () = inner.stop.cancelled() => {} // cancel-safe
        }
        inner.report(LinkEvent::Down { id, reason: reason.clone() }).await;
        linger(inner, frames, port);
        reason
    }
}

/// Waits a moment until probes have found the size of frames: sessions opened over a new link keep the one they start with.
async fn settle(frames: &FrameLink, inner: &Inner) {
    let until = clock::now() + SETTLE_MAX;
    while !frames.is_size_known() && clock::now() < until {
        let next = match frames.poll_attention(clock::now(), inner.fabric.counters()) {
            Attention::Sleep(next) => next.min(until),
            Attention::Missed => continue,
            Attention::Dead(_) | Attention::TooSmall => return,
        };
        tokio::select! {
            () = tokio::time::sleep_until(next.into()) => {} // cancel-safe
            () = frames.rearmed() => {} // cancel-safe
        }
    }
}

/// Passes control messages on to the consumer of events until the connection or its stream ends. What came before a goodbye is passed on as
/// well: it may be the neighbour's last word.
async fn read(
    mut reader: MessageReader,
    (id, turns): (LinkId, &Turns),
    connection: &Connection,
    inner: &Inner,
) -> String {
    loop {
        let turn = turns.next().await;
        match reader.next().await {
            // Parameters of this type only make the hop connection send something.
            Ok(LinkMessage { message: Some(Message::Parameters(_)) }) => {}
            Ok(message) => inner.report(LinkEvent::Message(id, message, turn)).await,
            Err(error @ ReadError::Ended) => {
                // Usually the whole connection ended or does so in a moment, and knows the reason.
                let closed = timeout(LINGER, connection.closed()).await;
                return closed
                    .map_or_else(|_| error.to_string(), |error| connection_reason(&error));
            }
            Err(error) => return error.to_string(),
        }
    }
}

/// Writes control messages until the link is closed here. Where the connection is lost, what came before is still to be read.
async fn write(
    send: SendStream,
    queued: mpsc::Receiver<LinkMessage>,
    close: &CancellationToken,
) -> Result<(), quinn::WriteError> {
    let outcome = write_queued(send, queued, close).await;
    if outcome.is_err() {
        sleep(LINGER).await;
    }
    outcome
}

/// Probes the link and reports its changes until it is dead or found to be of no use; returns why.
async fn keep_alive(
    frames: &FrameLink,
    mut reported: (Duration, u16),
    ping: Option<&mpsc::Sender<LinkMessage>>,
    inner: &Inner,
) -> String {
    loop {
        let now = clock::now();
        let until = match frames.poll_attention(now, inner.fabric.counters()) {
            Attention::Dead(silence) => {
                return format!("no sign of life for {} ms", silence.as_millis());
            }
            Attention::TooSmall => return PATH_TOO_SMALL.to_owned(),
            Attention::Missed => {
                if let Some(queue) = ping {
                    // If our address has changed, the neighbour learns it from whatever the hop connection sends. A full queue
                    // means that it is sending already.
                    let parameters = Message::Parameters(LinkParameters {
                        rtt_us: u32::try_from(frames.rtt().as_micros()).unwrap_or(u32::MAX),
                        mtu: u32::from(frames.mtu()),
                        ..LinkParameters::default()
                    });
                    let _ = queue.try_send(LinkMessage { message: Some(parameters) });
                }
                continue;
            }
            Attention::Sleep(until) => until,
        };
        let current = (frames.rtt(), frames.mtu());
        let tolerance = (reported.0 / RTT_CHANGE_FRACTION).max(RTT_CHANGE_MIN);
        if current.1 != reported.1 || current.0.abs_diff(reported.0) > tolerance {
            reported = current;
            let changed = LinkEvent::Changed { id: frames.id(), rtt: current.0, mtu: current.1 };
            // A consumer that is behind must not keep us from probing; the next change tells it.
            if inner.events.try_send(changed).is_err() {
                reported = (Duration::ZERO, 0);
            }
        }
        tokio::select! {
            () = tokio::time::sleep_until(until.into()) => {} // cancel-safe
            () = frames.rearmed() => {} // cancel-safe
        }
    }
}

/// Accepts frames that are still on their way, then forgets the link.
fn linger(inner: &Inner, frames: Arc<FrameLink>, port: Arc<ServedPort>) {
    let stop = inner.stop.clone();
    inner.spawn(async move {
        tokio::select! {
            () = sleep(LINGER) => {} // cancel-safe
            () = stop.cancelled() => {} // cancel-safe
        }
        frames.detach();
        drop(port);
    });
}

fn write_reason(outcome: Result<(), quinn::WriteError>, close_reason: &str) -> String {
    match outcome {
        Ok(()) if close_reason.is_empty() => "closed here".to_owned(),
        Ok(()) => close_reason.to_owned(),
        Err(error) => error.to_string(),
    }
}

/// Why a connection ended, in words for people.
pub(super) fn connection_reason(error: &ConnectionError) -> String {
    match error {
        ConnectionError::ApplicationClosed(close) if !close.reason.is_empty() => {
            // The peer's words: bounded, and without control characters that would garble a terminal.
            let words = String::from_utf8_lossy(&close.reason);
            let words: String = words.chars().filter(|c| !c.is_control()).take(200).collect();
            format!("the peer: {words}")
        }
        ConnectionError::ConnectionClosed(close) => {
            let alert = u64::from(close.error_code).checked_sub(0x100);
            let explained = alert
                .and_then(|alert| u8::try_from(alert).ok())
                .and_then(skein_trust::explain_alert);
            explained.map_or_else(|| error.to_string(), str::to_owned)
        }
        ConnectionError::LocallyClosed => "closed here".to_owned(),
        ConnectionError::Reset => "the peer restarted".to_owned(),
        other => other.to_string(),
    }
}
