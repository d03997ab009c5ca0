//! Copies both ways between a socket and a flow, or two sockets, and ends both sides as the other ended: FIN is finish, RST is reset,
//! half-close is kept.
//!
//! As with TCP itself, an abort is of the whole conversation, and what was sent before it is delivered before it.

use crate::{
    flows::{Outcome, Progress},
    net::{self, TcpStream},
    session::{Flow, FlowError, FlowRecv, FlowSend, TURN_BYTES, Turn},
};
use bytes::{BufMut as _, Bytes, BytesMut};
use parking_lot::Mutex;
use std::{io, time::Duration};
use tokio::{
    io::Interest,
    sync::SetOnce,
    time::{sleep, timeout},
};
use tokio_util::sync::CancellationToken;

/// A flow whose socket has been silent for so long gives unused credit back.
const CREDIT_IDLE: Duration = Duration::from_secs(1);
/// One that has never needed more than an idle flow keeps does so earlier: otherwise thousands of clients that connect at once and
/// then say little would use up the budget of their peers.
const CREDIT_IDLE_FRESH: Duration = Duration::from_millis(100);
/// After a reset, what was sent before it has so long to be delivered.
const ABORT_LINGER: Duration = Duration::from_secs(2);
/// Between looks at a socket whose reset waits for what was written before.
const SENT_CHECK: Duration = Duration::from_millis(10);
/// Idle flows are noticed within a quarter of their timeout.
const IDLE_CHECKS: u32 = 4;
/// A shorter read is copied. One that is split off keeps a whole buffer for as long as it waits to be acknowledged: a quarter of which it
/// fills at least. Copying costs little beside encrypting.
const SPLIT_LEN_MIN: usize = TURN_BYTES / 4;

/// A datagram of any length fits.
const DATAGRAM_BUFFER_LEN: usize = 1 << 16;

/// The buffers that every socket of a router is read into, so that idle flows hold none. What was read of a stream is split off, or copied
/// if little.
#[derive(Debug, Default)]
pub struct ReadBuffer {
    stream: Mutex<BytesMut>,
    datagram: Mutex<Vec<u8>>,
}

impl ReadBuffer {
    /// Lends the buffer for one datagram.
    pub(crate) fn with_datagram<T>(&self, read: impl FnOnce(&mut [u8]) -> T) -> T {
        let mut buffer = self.datagram.lock();
        buffer.resize(DATAGRAM_BUFFER_LEN, 0);
        read(&mut buffer)
    }

    /// Reads what is there, at most `len_max`; empty at the end of the stream.
    pub(crate) fn try_read(&self, socket: &TcpStream, len_max: usize) -> io::Result<Bytes> {
        let mut buffer = self.stream.lock();
        // Room for a whole turn: what the flow before has left must not decide how much this one may read.
        if buffer.capacity() < len_max.min(TURN_BYTES) {
            buffer.reserve(TURN_BYTES);
        }
        let len = socket.try_read_buf(&mut (&mut *buffer).limit(len_max))?;
        if len >= SPLIT_LEN_MIN {
            return Ok(buffer.split().freeze());
        }
        let read = Bytes::copy_from_slice(&buffer);
        buffer.clear();
        Ok(read)
    }
}

/// What a splice needs besides its two ends.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Terms<'a> {
    pub(crate) buffer: &'a ReadBuffer,
    pub(crate) progress: &'a Progress,
    /// Reset when nothing moves for so long.
    pub(crate) idle_timeout: Option<Duration>,
    /// Resets the flow.
    pub(crate) abort: &'a CancellationToken,
}

/// Joins `socket` and `flow` until both have ended; `first` was read from the socket before.
///
/// # Cancel safety
/// Dropped midway, both are reset.
pub(crate) async fn with_flow(
    socket: TcpStream,
    flow: Flow,
    first: Bytes,
    terms: Terms<'_>,
) -> Outcome {
    let socket = AbortOnDrop(Some(socket));
    let Flow { mut send, mut recv } = flow;
    let far_aborted = recv.aborted();
    let (eof, delivered) = (SetOnce::new(), SetOnce::new());
    let ended = tokio::select! {
        biased;
        ended = async {
            tokio::try_join!(
                socket_to_flow(&socket, &mut send, first, &eof, terms),
                flow_to_socket(&socket, &mut recv, &delivered, terms.progress),
            )
        } => ended.map(|((), ())| Outcome::Finished),
        outcome = interrupted(&socket, &eof, terms) => Err(outcome),
        // `flow_to_socket` notices as well, unless it has ended or the socket takes nothing.
        _ = async {
            far_aborted.await;
            timeout(ABORT_LINGER, async { delivered.wait().await; left(&socket).await }).await
        } => Err(Outcome::FarReset),
    };
    match ended {
        Ok(outcome) => {
            socket.finished();
            outcome
        }
        Err(Outcome::NearReset) => {
            drop(socket);
            send.abort_after_sent();
            await_far_abort(&send, &mut recv).await;
            Outcome::NearReset
        }
        Err(outcome) => outcome,
    }
}

/// Joins two sockets until both have ended; the outcome is seen from `near`, from which `first` was read before.
///
/// # Cancel safety
/// Dropped midway, both are reset.
pub(crate) async fn with_socket(
    near: TcpStream,
    far: TcpStream,
    first: Bytes,
    terms: Terms<'_>,
) -> Outcome {
    let (near, far) = (AbortOnDrop(Some(near)), AbortOnDrop(Some(far)));
    let (near_eof, far_eof) = (SetOnce::new(), SetOnce::new());
    let sent = |len: usize| terms.progress.add_from_socket(len as u64);
    let received = |len: usize| terms.progress.add_to_socket(len as u64);
    let ended = tokio::select! {
        biased;
        ended = async {
            tokio::try_join!(
                socket_to_socket(&near, &far, first, &near_eof, terms.buffer, sent),
                async {
                    let copied =
                        socket_to_socket(&far, &near, Bytes::new(), &far_eof, terms.buffer, received);
                    copied.await.map_err(Side::other)
                },
            )
        } => ended.map(|((), ())| Outcome::Finished).map_err(|side| match side {
            Side::From => Outcome::NearReset,
            Side::To => Outcome::FarReset,
        }),
        outcome = interrupted(&near, &near_eof, terms) => Err(outcome),
        () = async { far_eof.wait().await; reset_of(&far).await } => Err(Outcome::FarReset),
    };
    match ended {
        Ok(outcome) => {
            near.finished();
            far.finished();
            outcome
        }
        Err(outcome) => {
            let sent_before = async {
                match outcome {
                    Outcome::NearReset => left(&far).await,
                    Outcome::FarReset => left(&near).await,
                    _ => {}
                }
            };
            if timeout(ABORT_LINGER, sent_before).await.is_err() {
                tracing::debug!("an aborted flow was reset before all of it was delivered");
            }
            outcome
        }
    }
}

/// Resets the connection: the peer sees `ECONNRESET`, never a clean end.
pub(crate) fn reset(socket: TcpStream) {
    drop(AbortOnDrop(Some(socket)));
}

/// Completes when the peer has reset the connection; whoever reads gets what came before, and then the error.
///
/// # Cancel safety
/// Cancel-safe.
pub(crate) async fn reset_of(socket: &TcpStream) {
    // Fails only when the runtime shuts down.
    let _ = socket.ready(Interest::ERROR).await;
}

/// Completes when what was written to the socket has left this host; a reset would discard it.
async fn left(socket: &TcpStream) {
    if net::tcp_await_sent(socket).is_ok() {
        while !net::tcp_is_sent(socket) {
            sleep(SENT_CHECK).await;
        }
    }
}

/// What ends a splice from outside: the socket's reset once nobody reads from it, idleness, an order.
async fn interrupted(socket: &TcpStream, eof: &SetOnce<()>, terms: Terms<'_>) -> Outcome {
    tokio::select! {
        () = async { eof.wait().await; reset_of(socket).await } => Outcome::NearReset,
        () = idle(terms.idle_timeout, || terms.progress.total()) => Outcome::Idle,
        () = terms.abort.cancelled() => Outcome::Aborted,
    }
}

/// Completes when what has `moved` stays the same for so long.
pub(crate) async fn idle(timeout: Option<Duration>, moved: impl Fn() -> u64) {
    let Some(limit) = timeout else { return std::future::pending().await };
    let (mut seen, mut quiet) = (moved(), 0);
    while quiet < IDLE_CHECKS {
        sleep(limit / IDLE_CHECKS).await;
        let now = moved();
        quiet = if now == seen { quiet + 1 } else { 0 };
        seen = now;
    }
}

async fn socket_to_flow(
    socket: &TcpStream,
    send: &mut FlowSend,
    first: Bytes,
    eof: &SetOnce<()>,
    terms: Terms<'_>,
) -> Result<(), Outcome> {
    let mut acknowledged = std::pin::pin!(send.acknowledged());
    tokio::select! {
        biased;
        pumped = pump_to_flow(socket, send, first, terms) => pumped?,
        stopped = &mut acknowledged => stopped.map_err(outcome)?,
    }
    // The only setter; nobody else could have.
    let _ = eof.set(());
    acknowledged.await.map_err(outcome)?;
    send.set_ended();
    Ok(())
}

/// The socket must have something to say, then the peer must have granted credit, then it must be this flow's turn in the session's ring:
/// only then is the socket read. So whoever waits holds nothing, however long.
async fn pump_to_flow(
    socket: &TcpStream,
    send: &mut FlowSend,
    mut first: Bytes,
    terms: Terms<'_>,
) -> Result<(), Outcome> {
    while !first.is_empty() {
        // What was read before may be more than the credit now.
        let (turn, len_max) = turn(socket, send).await?;
        let part = first.split_to(first.len().min(len_max));
        write_turn(socket, send, turn, part, terms.progress).await?;
    }
    loop {
        let (turn, read) = read_turn(socket, send, terms.buffer).await?;
        if read.is_empty() {
            send.finish();
            return Ok(());
        }
        write_turn(socket, send, turn, read, terms.progress).await?;
    }
}

/// One read within the credit; empty at the end of the stream.
async fn read_turn(
    socket: &TcpStream,
    send: &FlowSend,
    buffer: &ReadBuffer,
) -> Result<(Turn, Bytes), Outcome> {
    loop {
        let patience = if send.is_fresh() { CREDIT_IDLE_FRESH } else { CREDIT_IDLE };
        match timeout(patience, socket.readable()).await {
            Ok(ready) => ready.map_err(|_reset| Outcome::NearReset)?,
            Err(_elapsed) => {
                send.give_back();
                socket.readable().await.map_err(|_reset| Outcome::NearReset)?;
            }
        }
        let (turn, len_max) = turn(socket, send).await?;
        match buffer.try_read(socket, len_max) {
            Ok(read) => return Ok((turn, read)),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(_reset) => return Err(Outcome::NearReset),
        }
    }
}

/// Waits for credit and then for the flow's turn; returns what may be sent in it.
async fn turn(socket: &TcpStream, send: &FlowSend) -> Result<(Turn, usize), Outcome> {
    tokio::select! {
        biased;
        turn = async {
            let credit = send.credit().await;
            // Only this flow spends it, so it is still there afterwards.
            (send.turn().await, usize::try_from(credit).unwrap_or(TURN_BYTES).min(TURN_BYTES))
        } => Ok(turn),
        () = reset_of(socket) => Err(Outcome::NearReset),
    }
}

async fn write_turn(
    socket: &TcpStream,
    send: &mut FlowSend,
    turn: Turn,
    chunk: Bytes,
    progress: &Progress,
) -> Result<(), Outcome> {
    let before = send.sent_bytes();
    let ended = tokio::select! {
        biased;
        written = send.write(turn, chunk) => written.map_err(outcome),
        () = reset_of(socket) => Err(Outcome::NearReset),
    };
    progress.add_from_socket(send.sent_bytes() - before);
    ended
}

async fn flow_to_socket(
    socket: &TcpStream,
    recv: &mut FlowRecv,
    delivered: &SetOnce<()>,
    progress: &Progress,
) -> Result<(), Outcome> {
    let aborted = recv.aborted();
    let mut aborted = std::pin::pin!(aborted);
    let mut abort_seen = false;
    loop {
        write_held(socket, recv, progress)?;
        if recv.is_aborted() {
            left(socket).await;
            return Err(Outcome::FarReset);
        }
        if recv.is_finished() && recv.queue().is_empty() {
            // Fails when the peer has reset the connection, which the next read or write tells.
            let _ = net::tcp_finish(socket);
            // The only setter; nobody else could have.
            let _ = delivered.set(());
            return Ok(());
        }
        tokio::select! {
            biased;
            ready = socket.writable(), if !recv.queue().is_empty() => {
                ready.map_err(|_reset| Outcome::NearReset)?;
            }
            filled = recv.fill(), if !recv.is_finished() => filled.map_err(outcome)?,
            _after = &mut aborted, if !abort_seen => abort_seen = true,
        }
    }
}

/// Writes what is held until the socket takes no more.
fn write_held(socket: &TcpStream, recv: &mut FlowRecv, progress: &Progress) -> Result<(), Outcome> {
    while !recv.queue().is_empty() {
        let written = {
            let (slices, count) = recv.queue().slices();
            socket.try_write_vectored(&slices[..count])
        };
        match written {
            Ok(len) => {
                progress.add_to_socket(len as u64);
                recv.consume(len);
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                recv.compact();
                return Ok(());
            }
            Err(_reset) => return Err(Outcome::NearReset),
        }
    }
    Ok(())
}

/// Keeps the flow alive until the peer has delivered what was sent before the abort, and reset it.
async fn await_far_abort(send: &FlowSend, recv: &mut FlowRecv) {
    let delivered = async {
        while !recv.is_finished() {
            if recv.fill().await.is_err() {
                return;
            }
            recv.consume(recv.queue().len_bytes());
        }
        // Either way the peer is done with it.
        let _ = send.acknowledged().await;
    };
    if timeout(ABORT_LINGER + ABORT_LINGER / 2, delivered).await.is_err() {
        tracing::debug!("an aborted flow was reset before the peer had delivered it");
    }
}

/// Which side of a copy failed.
enum Side {
    From,
    To,
}

impl Side {
    fn other(self) -> Self {
        match self {
            Self::From => Self::To,
            Self::To => Self::From,
        }
    }
}

async fn socket_to_socket(
    from: &TcpStream,
    to: &TcpStream,
    first: Bytes,
    eof: &SetOnce<()>,
    buffer: &ReadBuffer,
    count: impl Fn(usize),
) -> Result<(), Side> {
    let mut chunk = first;
    loop {
        while !chunk.is_empty() {
            match to.try_write(&chunk) {
                Ok(len) => {
                    count(len);
                    drop(chunk.split_to(len));
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => tokio::select! {
                    ready = to.writable() => ready.map_err(|_reset| Side::To)?,
                    () = reset_of(from) => return Err(Side::From),
                },
                Err(_reset) => return Err(Side::To),
            }
        }
        chunk = match buffer.try_read(from, TURN_BYTES) {
            Ok(read) if read.is_empty() => break,
            Ok(read) => read,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                from.readable().await.map_err(|_reset| Side::From)?;
                continue;
            }
            Err(_reset) => return Err(Side::From),
        };
    }
    // The only setter; nobody else could have.
    let _ = eof.set(());
    // Fails when the peer has reset the connection, which the next read or write tells.
    let _ = net::tcp_finish(to);
    Ok(())
}

fn outcome(error: FlowError) -> Outcome {
    Outcome::from(&error)
}

/// A socket that is reset when dropped before its splice ended cleanly.
#[derive(Debug)]
struct AbortOnDrop(Option<TcpStream>);

impl AbortOnDrop {
    fn finished(mut self) {
        self.0 = None;
    }
}

impl std::ops::Deref for AbortOnDrop {
    type Target = TcpStream;

    fn deref(&self) -> &TcpStream {
        self.0.as_ref().expect("invariant: taken only when consumed")
    }
}

impl Drop for AbortOnDrop {
    fn drop(&mut self) {
        if let Some(socket) = &self.0 {
            // Fails when the connection is already gone.
            let _ = socket.set_zero_linger();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::AsyncWriteExt as _;

    #[tokio::test]
    async fn little_that_was_read_keeps_no_buffer_alive() {
        let listener = net::tcp_listen("127.0.0.1:0".parse().unwrap()).unwrap();
        let connecting = net::tcp_connect(listener.local_addr().unwrap(), None);
        let (mut far, accepted) = tokio::try_join!(connecting, listener.accept()).unwrap();
        let (near, _) = accepted;
        let buffer = ReadBuffer::default();
        let mut held = Vec::new();
        for _ in 0..10 {
            far.write_all(&[7; 100]).await.unwrap();
            near.readable().await.unwrap();
            held.push(buffer.try_read(&near, TURN_BYTES).unwrap());
        }
        assert!(held.iter().all(|read| !read.is_empty() && read.iter().all(|&byte| byte == 7)));
        // All of it is there for the next: nothing that is held is a part of it.
        assert_eq!(buffer.stream.lock().capacity(), TURN_BYTES);
    }
}
