//! Claims: connections of sites that redeem a token, passed on to the controller without a look inside.
//!
//! The router owns the port, the controller the secrets: TLS ends at the controller, so a code never appears here.

use crate::{gate::Gate, link::Claim, net};
use skein_trust::{CLAIM_REQUEST_LEN_MAX, CLAIM_RESPONSE_LEN_MAX};
use std::{io, path::PathBuf, sync::Arc, time::Duration};
use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _},
    time,
};

/// Claims at a time, in all and from one place. A person redeems a token; more at once than this is no person.
const CLAIMS_MAX: usize = 64;
const CLAIMS_PER_SOURCE_MAX: usize = 16;
/// A claim is one request and one answer; the controller gives up before.
const CLAIM_TIMEOUT: Duration = Duration::from_secs(30);
/// What TLS adds to a claim's messages, generously: handshake, certificates, record headers.
const TLS_OVERHEAD_MAX: usize = 64 << 10;

/// Passes claims on, within bounds.
#[derive(Clone, Debug)]
pub(crate) struct Claims {
    running: Arc<Gate>,
}

impl Claims {
    pub(crate) fn new() -> Self {
        Self { running: Gate::new(CLAIMS_MAX, CLAIMS_PER_SOURCE_MAX) }
    }

    /// Joins the claim and the controller's socket until both are done or the bounds are reached; when there are too many, the
    /// oldest of those from the same place gives way.
    ///
    /// # Cancel safety
    /// Dropping it aborts the claim; the redeemer may repeat it.
    pub(crate) async fn pass_on(&self, claim: Claim, socket: PathBuf) {
        let slot = self.running.enter(match &claim {
            Claim::Tcp { remote, .. } => remote.ip(),
            Claim::Quic { connection, .. } => connection.remote_address().ip(),
        });
        let joined = async {
            let controller = net::connect_unix(&socket).await?;
            match claim {
                Claim::Tcp { stream, head, remote } => {
                    tracing::debug!(%remote, "claim over TCP");
                    let (recv, send) = stream.into_split();
                    join(io::Cursor::new(head).chain(recv), send, controller).await
                }
                Claim::Quic { connection, send, recv } => {
                    tracing::debug!(remote = %connection.remote_address(), "claim over QUIC");
                    let joined = join(recv, send, controller).await;
                    // The answer is on its way: the redeemer closes when it has read it.
                    connection.closed().await;
                    joined
                }
            }
        };
        let outcome = tokio::select! {
            outcome = time::timeout(CLAIM_TIMEOUT, joined) => outcome, // dropped, both ends close
            () = slot.evicted() => return tracing::info!("a claim gave way to others from the same network"),
        };
        match outcome {
            Ok(Ok(())) => tracing::info!("a claim was passed on"),
            Ok(Err(error)) if is_expected(&error) => {
                tracing::debug!(%error, "a claim ended early");
            }
            Ok(Err(error)) => tracing::info!(%error, "a claim could not be passed on"),
            Err(_elapsed) => tracing::info!("a claim took too long"),
        }
    }
}

/// A redeemer tries several ways at once and drops all but the first to answer.
fn is_expected(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::ConnectionReset
            | io::ErrorKind::ConnectionAborted
            | io::ErrorKind::BrokenPipe
            | io::ErrorKind::NotConnected
            | io::ErrorKind::UnexpectedEof
    )
}

async fn join(
    from_redeemer: impl AsyncRead + Unpin,
    to_redeemer: impl AsyncWrite + Unpin,
    controller: net::UnixStream,
) -> io::Result<()> {
    let (from_controller, to_controller) = controller.into_split();
    tokio::try_join!(
        copy(from_redeemer, to_controller, CLAIM_REQUEST_LEN_MAX + TLS_OVERHEAD_MAX),
        copy(from_controller, to_redeemer, CLAIM_RESPONSE_LEN_MAX + TLS_OVERHEAD_MAX),
    )?;
    Ok(())
}

async fn copy(
    from: impl AsyncRead + Unpin,
    mut to: impl AsyncWrite + Unpin,
    len_max: usize,
) -> io::Result<()> {
    let len_max = u64::try_from(len_max).unwrap_or(u64::MAX);
    let copied = tokio::io::copy(&mut from.take(len_max), &mut to).await?;
    if copied == len_max {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "more bytes than a claim takes"));
    }
    // The other end may have closed already, which is its right after the last byte.
    match to.shutdown().await {
        Err(error) if error.kind() != io::ErrorKind::NotConnected => Err(error),
        Ok(()) | Err(_) => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::Path;
    use tokio::{net::UnixListener, task::JoinSet};

    async fn redeemer(socket: &Path, tasks: &mut JoinSet<()>) -> net::TcpStream {
        let listener = net::tcp_listen("127.0.0.1:0".parse().unwrap()).unwrap();
        let redeemer = net::tcp_connect(listener.local_addr().unwrap(), None).await.unwrap();
        let (stream, remote) = listener.accept().await.unwrap();
        let claim = Claim::Tcp { stream, head: b"first ".to_vec(), remote };
        let socket = socket.to_owned();
        tasks.spawn(async move { Claims::new().pass_on(claim, socket).await });
        redeemer
    }

    #[tokio::test]
    async fn bytes_pass_both_ways_and_ends_with_them() {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("claim.sock");
        let controller = UnixListener::bind(&socket).unwrap();
        let mut tasks = JoinSet::new();
        let mut redeemer = redeemer(&socket, &mut tasks).await;
        redeemer.write_all(b"then").await.unwrap();
        redeemer.shutdown().await.unwrap();
        let (mut stream, _) = controller.accept().await.unwrap();
        let mut request = String::new();
        stream.read_to_string(&mut request).await.unwrap();
        assert_eq!(request, "first then");
        stream.write_all(b"answer").await.unwrap();
        drop(stream);
        let mut answer = String::new();
        redeemer.read_to_string(&mut answer).await.unwrap();
        assert_eq!(answer, "answer");
        tasks.join_next().await.unwrap().unwrap();
    }

    #[tokio::test]
    async fn a_claim_without_end_is_cut() {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("claim.sock");
        let controller = UnixListener::bind(&socket).unwrap();
        let mut tasks = JoinSet::new();
        let mut redeemer = redeemer(&socket, &mut tasks).await;
        let received = async {
            let (mut stream, _) = controller.accept().await.unwrap();
            // Reads until the router has had enough, however that ends.
            let (mut bytes, mut buffer) = (0, vec![0; 16 << 10]);
            while let Ok(n @ 1..) = stream.read(&mut buffer).await {
                bytes += n;
            }
            bytes
        };
        let flood = vec![0; CLAIM_REQUEST_LEN_MAX + 2 * TLS_OVERHEAD_MAX];
        let sent = async {
            // The write may or may not fail, depending on what the kernel buffers; the read sees the end.
            drop(redeemer.write_all(&flood).await);
            redeemer.read(&mut [0]).await
        };
        let both = async { tokio::join!(received, sent) };
        let cut_after = CLAIM_TIMEOUT / 6;
        let (received, end) = time::timeout(cut_after, both).await.expect("it goes on");
        assert_eq!(received, CLAIM_REQUEST_LEN_MAX + TLS_OVERHEAD_MAX);
        assert!(matches!(end, Ok(0) | Err(_)), "{end:?}");
        while let Some(task) = tasks.join_next().await {
            task.unwrap();
        }
    }
}
