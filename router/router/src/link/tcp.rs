//! TCP on the router's port: claims, told by the protocol their TLS handshake offers. Nothing is decrypted here.

use super::{
    Claim, Inner, LinkEvent,
    accept::{FIRST_BYTE_TIMEOUT, PREAUTH_TIMEOUT, offers_claim},
};
use crate::gate::Gate;
use std::{io, net::SocketAddr, sync::Arc, time::Duration};
use tokio::{
    io::AsyncReadExt as _,
    net::{TcpListener, TcpStream},
    time,
};

/// Longest beginning of a TLS handshake; post-quantum ones take 2 KiB.
const HEAD_BYTES_MAX: usize = 64 << 10;
/// Read at a time.
const READ_BYTES: usize = 4 << 10;
/// After `accept` failed, for want of file descriptors or memory.
const PAUSE: Duration = Duration::from_millis(100);

/// Accepts for ever; connections that are undecided take a slot of `undecided`.
pub(super) async fn accept(inner: &Arc<Inner>, listener: TcpListener, undecided: Arc<Gate>) {
    loop {
        let (stream, remote) = match listener.accept().await {
            Ok(accepted) => accepted,
            Err(error) => {
                tracing::debug!(%error, "accept failed");
                time::sleep(PAUSE).await;
                continue;
            }
        };
        let slot = undecided.enter(remote.ip());
        let inner_of_task = Arc::clone(inner);
        inner.spawn(async move {
            let inner = inner_of_task;
            let decided = tokio::select! {
                decided = time::timeout(PREAUTH_TIMEOUT, decide(stream)) => decided, // dropped, it closes
                () = slot.evicted() => Ok(Err(io::ErrorKind::ConnectionAborted.into())),
                () = inner.stop.cancelled() => return, // cancel-safe
            };
            match decided {
                Ok(Ok((stream, head))) => {
                    let claim = Claim::Tcp { stream, head, remote };
                    // Who waits to be handed over still takes its slot.
                    tokio::select! {
                        () = inner.report(LinkEvent::Claim(claim)) => {} // dropped, the claim is closed
                        () = slot.evicted() => refused(&inner, remote, &io::ErrorKind::ConnectionAborted.into()),
                    }
                }
                Ok(Err(error)) => refused(&inner, remote, &error),
                Err(_) => refused(&inner, remote, &io::ErrorKind::TimedOut.into()),
            }
        });
    }
}

fn refused(inner: &Inner, remote: SocketAddr, error: &io::Error) {
    tracing::debug!(%remote, %error, "TCP connection refused");
    inner.fabric.counters().connections_refused.add(1);
}

/// Reads until the handshake shows what the client wants; returns what was read.
///
/// Links over TCP (`skein-link/1`) will branch off here.
async fn decide(mut stream: TcpStream) -> io::Result<(TcpStream, Vec<u8>)> {
    let mut acceptor = rustls::server::Acceptor::default();
    let (mut head, mut buffer) = (Vec::new(), [0; READ_BYTES]);
    loop {
        let read = stream.read(&mut buffer);
        let n = match head.len() {
            0 => time::timeout(FIRST_BYTE_TIMEOUT, read)
                .await
                .map_err(|_| io::ErrorKind::TimedOut)??,
            _ => read.await?,
        };
        if n == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let mut unread = &buffer[..n];
        head.extend_from_slice(unread);
        while !unread.is_empty() {
            if acceptor.read_tls(&mut unread)? == 0 {
                break;
            }
        }
        match acceptor.accept() {
            Ok(Some(accepted)) => {
                let is_claim = accepted.client_hello().alpn().is_some_and(offers_claim);
                return if is_claim { Ok((stream, head)) } else { Err(not_a_claim()) };
            }
            Ok(None) if head.len() < HEAD_BYTES_MAX => {}
            Ok(None) | Err(_) => return Err(not_a_claim()),
        }
    }
}

fn not_a_claim() -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, "not a claim")
}
