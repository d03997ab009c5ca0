//! An HTTP server that paces a checksummed file, and a client that watches for stalls.

use std::{
    convert::Infallible,
    net::SocketAddr,
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use aws_lc_rs::digest::{Context, SHA256};
use bytes::Bytes;
use data_encoding::HEXLOWER;
use http_body_util::{BodyExt as _, Empty, StreamBody};
use hyper::{
    Request, Response,
    body::{Frame, Incoming},
    service::service_fn,
};
use hyper_util::rt::TokioIo;
use tokio::{net::TcpListener, sync::mpsc, task::JoinSet};
use tokio_stream::wrappers::ReceiverStream;

use crate::{clock, error::Failure, net, progress::Progress};

/// One step of the pacing: small enough that a stall of milliseconds shows.
const BLOCK_LEN: usize = 256 * 1024;
/// Blocks between the generator and the socket: the socket decides how fast it goes.
const BLOCKS_QUEUED: usize = 2;
/// Clients at once: one download and the health checks of the router.
const CLIENTS_MAX: usize = 16;
/// Longest silence before the download is given up; flows wait up to 30 s for a path.
const SILENCE_MAX: Duration = Duration::from_secs(40);

/// Serves one file of pseudo-random bytes.
#[derive(Debug)]
pub(super) struct Server {
    addr: SocketAddr,
    len: u64,
    sent: Arc<Mutex<Option<String>>>,
    /// Ends with the server.
    _tasks: JoinSet<()>,
}

impl Server {
    /// Serves `len` bytes, paced to take `duration`.
    pub(super) async fn start(len: u64, duration: Duration) -> Result<Self, Failure> {
        let failed = |error| Failure::new("cannot start the server of the demo").because(error);
        let listener = net::listen_loopback().await.map_err(failed)?;
        let addr = listener.local_addr().map_err(failed)?;
        let sent = Arc::new(Mutex::new(None));
        let mut tasks = JoinSet::new();
        tasks.spawn(serve(listener, File { len, duration, sent: sent.clone() }));
        Ok(Self { addr, len, sent, _tasks: tasks })
    }

    pub(super) fn port(&self) -> u16 {
        self.addr.port()
    }

    pub(super) fn len(&self) -> u64 {
        self.len
    }

    /// Checksum of what was sent last; empty before.
    pub(super) fn sha256(&self) -> String {
        self.sent.lock().expect("invariant: no holder panics").clone().unwrap_or_default()
    }
}

#[derive(Clone)]
struct File {
    len: u64,
    duration: Duration,
    sent: Arc<Mutex<Option<String>>>,
}

async fn serve(listener: TcpListener, file: File) {
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            // cancel-safe
            accepted = listener.accept() => {
                let Ok((stream, _)) = accepted else { continue };
                if connections.len() >= CLIENTS_MAX {
                    continue;
                }
                let file = file.clone();
                connections.spawn(async move {
                    let service = service_fn(move |_: Request<Incoming>| {
                        let file = file.clone();
                        async move { Ok::<_, Infallible>(respond(file)) }
                    });
                    let connection = hyper::server::conn::http1::Builder::new()
                        .serve_connection(TokioIo::new(stream), service);
                    // A health check hangs up without a request; the download's outcome is judged by its client.
                    let _ = connection.await;
                });
            }
            // cancel-safe
            Some(_) = connections.join_next() => {}
        }
    }
}

type Blocks = StreamBody<ReceiverStream<Result<Frame<Bytes>, Infallible>>>;

fn respond(file: File) -> Response<WithGenerator> {
    let (sender, receiver) = mpsc::channel(BLOCKS_QUEUED);
    let len = file.len;
    let mut generator = JoinSet::new();
    generator.spawn(generate(file, sender));
    let body = WithGenerator {
        body: StreamBody::new(ReceiverStream::new(receiver)),
        _generator: generator,
    };
    let mut response = Response::new(body);
    response.headers_mut().insert(http::header::CONTENT_LENGTH, len.into());
    response
}

/// A body that owns the task that fills it.
struct WithGenerator {
    body: Blocks,
    _generator: JoinSet<()>,
}

impl hyper::body::Body for WithGenerator {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: std::pin::Pin<&mut Self>,
        context: &mut std::task::Context<'_>,
    ) -> std::task::Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        std::pin::Pin::new(&mut self.body).poll_frame(context)
    }
}

async fn generate(file: File, sender: mpsc::Sender<Result<Frame<Bytes>, Infallible>>) {
    let began = clock::instant();
    let mut sum = Context::new(&SHA256);
    let mut random = XorShift(0x9e37_79b9_7f4a_7c15);
    let mut done = 0_u64;
    while done < file.len {
        let len = (file.len - done).min(BLOCK_LEN as u64);
        let block = random.block(usize::try_from(len).expect("invariant: at most one block"));
        sum.update(&block);
        done += len;
        if done == file.len {
            // Before the last block: with it the response is complete, and this task is dropped.
            let sum = HEXLOWER.encode(sum.clone().finish().as_ref());
            *file.sent.lock().expect("invariant: no holder panics") = Some(sum);
        }
        if sender.send(Ok(Frame::data(block))).await.is_err() {
            return;
        }
        // Towards an absolute time: after a stall the rest catches up.
        let due = began + file.duration.mul_f64(done as f64 / file.len as f64);
        clock::sleep(due.saturating_duration_since(clock::instant())).await;
    }
}

/// Marsaglia's xorshift64: bytes no compression or repetition hides a fault in.
struct XorShift(u64);

impl XorShift {
    fn block(&mut self, len: usize) -> Bytes {
        let mut block = Vec::with_capacity(len + 8);
        while block.len() < len {
            self.0 ^= self.0 << 13;
            self.0 ^= self.0 >> 7;
            self.0 ^= self.0 << 17;
            block.extend_from_slice(&self.0.to_le_bytes());
        }
        block.truncate(len);
        block.into()
    }
}

/// A running download.
pub(super) struct Download {
    body: Incoming,
    sum: Option<Context>,
    done: u64,
    len: u64,
    last: Instant,
    stall: Duration,
    /// Drives the connection; ends with the download.
    _connection: JoinSet<()>,
}

impl Download {
    pub(super) async fn start(endpoint: &str, len: u64) -> Result<Self, Failure> {
        let failed = || Failure::new(format_args!("cannot download from {endpoint}"));
        let addr: SocketAddr = endpoint.parse().map_err(|error| failed().because(error))?;
        let stream = net::connect_tcp(addr).await.map_err(|error| failed().because(error))?;
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
            .await
            .map_err(|error| failed().because(error))?;
        let mut tasks = JoinSet::new();
        tasks.spawn(async move {
            // The body reports the same error.
            let _ = connection.await;
        });
        let request = Request::get("/file")
            .header(http::header::HOST, super::ADDRESS)
            .body(Empty::<Bytes>::new())
            .map_err(|error| failed().because(error))?;
        let response = tokio::time::timeout(SILENCE_MAX, sender.send_request(request))
            .await
            .map_err(|_| Failure::timeout("the server does not answer"))?
            .map_err(|error| failed().because(error))?;
        Ok(Self {
            body: response.into_body(),
            sum: Some(Context::new(&SHA256)),
            done: 0,
            len,
            last: clock::instant(),
            stall: Duration::ZERO,
            _connection: tasks,
        })
    }

    /// Reads until `target` bytes have come.
    pub(super) async fn read_to(
        &mut self,
        target: u64,
        progress: &mut Progress,
    ) -> Result<(), Failure> {
        while self.done < target {
            let frame = tokio::time::timeout(SILENCE_MAX, self.body.frame())
                .await
                .map_err(|_| Failure::timeout("the download stalls"))?;
            let frame = frame
                .ok_or_else(|| Failure::new("the download ended early").because(self.position()))?
                .map_err(|error| Failure::new("the download broke").because(error))?;
            let Ok(data) = frame.into_data() else { continue };
            let now = clock::instant();
            self.stall = self.stall.max(now.saturating_duration_since(self.last));
            self.last = now;
            if let Some(sum) = &mut self.sum {
                sum.update(&data);
            }
            self.done += data.len() as u64;
            progress.step(format!("downloading, {} %", self.done * 10 / self.len * 10));
        }
        Ok(())
    }

    /// The longest time without a byte.
    pub(super) fn stall(&self) -> Duration {
        self.stall
    }

    /// Begins to look for the longest stall anew.
    pub(super) fn forget_stall(&mut self) {
        self.stall = Duration::ZERO;
        self.last = clock::instant();
    }

    /// Checksum of what has come.
    pub(super) fn sha256(&mut self) -> String {
        self.sum.take().map(|sum| HEXLOWER.encode(sum.finish().as_ref())).unwrap_or_default()
    }

    fn position(&self) -> String {
        format!("{} of {} bytes came", self.done, self.len)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::args::{Format, Global};

    #[tokio::test]
    async fn what_is_sent_arrives() {
        let global = Global {
            namespace: "default".into(),
            output: Format::Table,
            quiet: true,
            verbose: false,
        };
        let len = 3 * BLOCK_LEN as u64 + 17;
        let server = Server::start(len, Duration::from_millis(50)).await.unwrap();
        let endpoint = format!("127.0.0.1:{}", server.port());
        let mut download = Download::start(&endpoint, len).await.unwrap();
        let mut progress = Progress::start(&global, "test");
        download.read_to(len, &mut progress).await.unwrap();
        assert_eq!(download.sha256(), server.sha256());
        assert!(download.stall() > Duration::ZERO);
    }
}
