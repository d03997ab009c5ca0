//! Two programs on two hosts, or on one, and what they see of each other's kernels.
#![allow(clippy::unwrap_used, reason = "a test stops at what it cannot unwrap")]

use super::{RETRY_US_MAX, UNSENT_BYTES_MAX, WINDOW_BYTES};
use crate::{Host, Net, Path, Process, TcpListener, TcpStream, UnixListener, UnixStream};
use parking_lot::Mutex;
use std::{io, net::SocketAddr, sync::Arc};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

const TICK_US: u64 = 2_000;
/// Everything is there after so long if nothing is in the way.
const SOON_MS: u64 = 500;
const LATENCY_MS: u64 = 10;

/// The outcome of a task, once it has ended.
struct Task<T>(Arc<Mutex<Option<T>>>);

impl<T> Task<T> {
    fn has_ended(&self) -> bool {
        self.0.lock().is_some()
    }

    fn outcome(&self) -> T {
        self.0.lock().take().expect("the task has ended")
    }
}

fn spawn<T: Send + 'static>(
    process: &Process,
    work: impl Future<Output = T> + Send + 'static,
) -> Task<T> {
    let outcome = Arc::new(Mutex::new(None));
    let told = Arc::clone(&outcome);
    process.handle().spawn(async move {
        let outcome = work.await;
        *told.lock() = Some(outcome);
    });
    Task(outcome)
}

struct Two {
    net: Net,
    client: Process,
    server: Process,
}

impl Two {
    fn new(path: Path) -> Self {
        let net = Net::new(1);
        net.set_default_path(path);
        let [client, server] = [1, 2].map(|n| Process::new(&net.host([10, 0, 0, n].into())));
        Self { net, client: client.unwrap(), server: server.unwrap() }
    }

    fn pass_ms(&mut self, ms: u64) {
        let until_us = self.net.now_us() + ms * 1_000;
        self.net.run_until(until_us, TICK_US, &mut [&mut self.client, &mut self.server]);
    }

    fn listen(&self) -> (TcpListener, SocketAddr) {
        let host = self.server.host();
        let listener = TcpListener::bind(host, SocketAddr::new(host.ip(), 80)).unwrap();
        let addr = listener.local_addr().unwrap();
        (listener, addr)
    }

    fn connect(&self, addr: SocketAddr) -> Task<io::Result<TcpStream>> {
        let host = self.client.host().clone();
        spawn(&self.client, async move { TcpStream::connect(&host, addr, None).await })
    }

    /// Both ends of a connection, the client's first.
    fn connected(&mut self) -> (TcpStream, TcpStream) {
        let (listener, addr) = self.listen();
        let accepting = spawn(&self.server, async move { listener.accept().await.unwrap().0 });
        let connecting = self.connect(addr);
        while !(connecting.has_ended() && accepting.has_ended()) {
            self.pass_ms(LATENCY_MS);
        }
        (connecting.outcome().unwrap(), accepting.outcome())
    }

    fn change_paths(&self, change: impl Fn(&mut Path)) {
        let (a, b) = (self.client.host(), self.server.host());
        self.net.change_path(a, b, &change);
        self.net.change_path(b, a, &change);
    }
}

fn pattern(len: usize) -> Vec<u8> {
    (0..len as u64).map(|n| (n.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56) as u8).collect()
}

/// What a stream brings, and how it ends.
async fn read(mut stream: TcpStream) -> (Vec<u8>, Result<(), io::ErrorKind>) {
    let mut bytes = Vec::new();
    let ended = stream.read_to_end(&mut bytes).await;
    (bytes, ended.map(drop).map_err(|error| error.kind()))
}

/// Writes as much of it as is taken at once.
fn fill(stream: &TcpStream, bytes: &[u8]) -> usize {
    let mut written = 0;
    while let Ok(len @ 1..) = stream.try_write(&bytes[written..]) {
        written += len;
    }
    written
}

#[test]
fn bytes_keep_their_order_on_a_path_that_does_all_it_can() {
    let mut two = Two::new(Path {
        jitter_us: 30_000,
        loss_permille: 50,
        burst_permille: 10,
        reorder_permille: 300,
        duplicate_permille: 300,
        rate_bytes_per_s: 1_000_000,
        ..Path::default()
    });
    let (client, mut server) = two.connected();
    let sent = pattern(2_000_000);
    let reading = spawn(&two.client, read(client));
    let bytes = sent.clone();
    let writing = spawn(&two.server, async move { server.write_all(&bytes).await });
    two.pass_ms(1_900);
    assert!(!reading.has_ended(), "two seconds' worth of bytes");
    two.pass_ms(120_000);
    writing.outcome().unwrap();
    let (read, ended) = reading.outcome();
    assert!(read == sent, "{} of {} bytes", read.len(), sent.len());
    assert_eq!(ended, Ok(()));
}

#[test]
fn a_connection_is_open_after_a_round_trip() {
    let mut two = Two::new(Path::default());
    let (_listener, addr) = two.listen();
    let connecting = two.connect(addr);
    two.pass_ms(2 * LATENCY_MS - 4);
    assert!(!connecting.has_ended());
    two.pass_ms(8);
    assert_eq!(connecting.outcome().unwrap().peer_addr().unwrap(), addr);
}

#[test]
fn each_direction_ends_on_its_own_and_then_nothing_is_left() {
    let mut two = Two::new(Path::default());
    let (mut client, mut server) = two.connected();
    let asking = spawn(&two.client, async move {
        client.write_all(b"question").await.unwrap();
        client.shutdown().await.unwrap();
        let again = client.write(b"more").await.map_err(|error| error.kind());
        (again, read(client).await)
    });
    let answering = spawn(&two.server, async move {
        let mut question = Vec::new();
        server.read_to_end(&mut question).await.unwrap();
        server.write_all(b"answer").await.unwrap();
        question
    });
    two.pass_ms(SOON_MS);
    assert_eq!(answering.outcome(), b"question");
    let (again, answer) = asking.outcome();
    assert_eq!(again, Err(io::ErrorKind::BrokenPipe));
    assert_eq!(answer, (b"answer".to_vec(), Ok(())));
    two.pass_ms(SOON_MS);
    assert_eq!(two.net.counts().conns, 0);
}

#[test]
fn what_was_written_arrives_after_the_program_has_let_go_or_been_killed() {
    for is_killed in [false, true] {
        let mut two = Two::new(Path::default());
        let (client, server) = two.connected();
        let written = fill(&server, &pattern(300_000));
        if is_killed {
            two.server.handle().spawn(async move {
                std::future::pending::<()>().await;
                drop(server);
            });
            two.pass_ms(LATENCY_MS);
            two.server = Process::new(two.server.host()).unwrap();
        } else {
            drop(server);
        }
        let reading = spawn(&two.client, read(client));
        two.pass_ms(2 * SOON_MS);
        let (read, ended) = reading.outcome();
        assert_eq!((read.len(), ended), (written, Ok(())));
    }
}

#[test]
fn a_reset_comes_of_an_abort_and_of_bytes_that_nobody_will_read() {
    let aborted = |_: &mut Two, _: &TcpStream, server: TcpStream| {
        server.set_zero_linger().unwrap();
        server.try_write(b"lost").unwrap();
    };
    let unread = |two: &mut Two, client: &TcpStream, server: TcpStream| {
        client.try_write(b"never read").unwrap();
        two.pass_ms(SOON_MS);
        drop(server);
    };
    let too_late = |two: &mut Two, client: &TcpStream, server: TcpStream| {
        drop(server);
        client.try_write(b"nobody is there").unwrap();
        two.pass_ms(SOON_MS);
    };
    let ends: [fn(&mut Two, &TcpStream, TcpStream); 3] = [aborted, unread, too_late];
    for (n, end) in ends.into_iter().enumerate() {
        let mut two = Two::new(Path::default());
        let (client, server) = two.connected();
        end(&mut two, &client, server);
        let reading = spawn(&two.client, async move {
            client.ready(tokio::io::Interest::ERROR).await.unwrap();
            (client.try_write(b"too late").map_err(|error| error.kind()), read(client).await.1)
        });
        two.pass_ms(SOON_MS);
        let reset = io::ErrorKind::ConnectionReset;
        assert_eq!(reading.outcome(), (Err(reset), Err(reset)), "case {n}");
        two.pass_ms(SOON_MS);
        assert_eq!(two.net.counts().conns, 0, "case {n}");
    }
}

#[test]
fn what_came_before_a_reset_is_read_before_it() {
    let mut two = Two::new(Path::default());
    let (client, server) = two.connected();
    server.try_write(b"first").unwrap();
    two.pass_ms(SOON_MS);
    server.set_zero_linger().unwrap();
    drop(server);
    two.pass_ms(SOON_MS);
    let reading = spawn(&two.client, read(client));
    two.pass_ms(SOON_MS);
    assert_eq!(reading.outcome(), (b"first".to_vec(), Err(io::ErrorKind::ConnectionReset)));
}

#[test]
fn a_reader_that_does_not_read_holds_the_writer_back() {
    let mut two = Two::new(Path::default());
    let (client, server) = two.connected();
    let bytes = pattern(1_000_000);
    let mut written = fill(&server, &bytes);
    two.pass_ms(SOON_MS);
    written += fill(&server, &bytes[written..]);
    assert_eq!(written, WINDOW_BYTES + UNSENT_BYTES_MAX);
    assert_eq!(server.unsent(), UNSENT_BYTES_MAX);
    // A window is told anew when it is worth it.
    let mut buffer = bytes::BytesMut::new();
    let mut read = |most: usize| {
        let mut left = most;
        while left > 0 {
            left -= client.try_read_buf(&mut bytes::BufMut::limit(&mut buffer, left)).unwrap();
        }
    };
    read(WINDOW_BYTES / 4 - 1);
    two.pass_ms(SOON_MS);
    assert_eq!(fill(&server, &bytes[written..]), 0);
    read(1);
    two.pass_ms(SOON_MS);
    assert_eq!(fill(&server, &bytes[written..]), WINDOW_BYTES / 4);
    read(WINDOW_BYTES);
    two.pass_ms(SOON_MS);
    assert_eq!(server.unsent(), 0);
    assert!(buffer == bytes[..WINDOW_BYTES + WINDOW_BYTES / 4]);
}

#[test]
fn what_is_lost_is_sent_again_soon_after_the_path_is_back() {
    for cut_ms in [300, 5_000, 60_000] {
        let mut two = Two::new(Path::default());
        let (client, mut server) = two.connected();
        let sent = pattern(300_000);
        let reading = spawn(&two.client, read(client));
        let bytes = sent.clone();
        let writing = spawn(&two.server, async move { server.write_all(&bytes).await });
        two.pass_ms(4);
        two.change_paths(|path| path.is_cut = true);
        two.pass_ms(cut_ms);
        assert!(!reading.has_ended());
        two.change_paths(|path| path.is_cut = false);
        // It waits as long as it has waited before, but no longer than that.
        two.pass_ms(cut_ms.min(RETRY_US_MAX / 1_000) + SOON_MS);
        writing.outcome().unwrap();
        let (read, ended) = reading.outcome();
        assert!(read == sent, "{} of {} bytes after {cut_ms} ms", read.len(), sent.len());
        assert_eq!(ended, Ok(()));
    }
}

#[test]
fn a_window_that_cannot_be_told_is_told_when_the_path_is_back() {
    let mut two = Two::new(Path::default());
    let (client, server) = two.connected();
    let written = fill(&server, &pattern(WINDOW_BYTES + UNSENT_BYTES_MAX));
    two.pass_ms(SOON_MS);
    let (a, b) = (two.client.host().clone(), two.server.host().clone());
    two.net.change_path(&a, &b, |path| path.is_cut = true);
    let reading = spawn(&two.client, read(client));
    two.pass_ms(10 * SOON_MS);
    assert_eq!(server.unsent(), written - WINDOW_BYTES, "nobody has said that there is room");
    two.net.change_path(&a, &b, |path| path.is_cut = false);
    two.pass_ms(RETRY_US_MAX / 1_000 + SOON_MS);
    assert_eq!(server.unsent(), 0);
    drop(server);
    two.pass_ms(SOON_MS);
    assert_eq!(reading.outcome().0.len(), written);
}

#[test]
fn what_was_held_up_once_does_not_count_against_a_timeout_later() {
    let mut two = Two::new(Path::default());
    let (client, server) = two.connected();
    client.set_timeout_us(2_000_000);
    assert_eq!(fill(&server, &pattern(WINDOW_BYTES)), WINDOW_BYTES);
    two.pass_ms(SOON_MS);
    let reading = spawn(&two.client, async move {
        let mut buffer = bytes::BufMut::limit(Vec::new(), WINDOW_BYTES);
        (client.try_read_buf(&mut buffer).unwrap(), client)
    });
    two.change_paths(|path| path.is_cut = true);
    two.pass_ms(SOON_MS);
    two.change_paths(|path| path.is_cut = false);
    two.pass_ms(10 * SOON_MS);
    let (read, client) = reading.outcome();
    assert_eq!(read, WINDOW_BYTES);
    two.change_paths(|path| path.is_cut = true);
    client.try_write(b"hello").unwrap();
    two.pass_ms(SOON_MS);
    two.change_paths(|path| path.is_cut = false);
    two.pass_ms(2 * SOON_MS);
    assert_eq!(client.unsent(), 0);
    let mut heard = Vec::new();
    assert_eq!(server.try_read_buf(&mut bytes::BufMut::limit(&mut heard, 9)).unwrap(), 5);
}

#[test]
fn only_who_has_a_timeout_gives_up() {
    let mut two = Two::new(Path::default());
    let (client, server) = two.connected();
    client.set_timeout_us(2_000_000);
    two.change_paths(|path| path.is_cut = true);
    for stream in [&client, &server] {
        stream.try_write(b"hello").unwrap();
    }
    let [reading, other] = [(&two.client, client), (&two.server, server)]
        .map(|(process, stream)| spawn(process, read(stream)));
    two.pass_ms(1_900);
    assert!(!reading.has_ended());
    two.pass_ms(RETRY_US_MAX / 1_000);
    assert_eq!(reading.outcome(), (Vec::new(), Err(io::ErrorKind::TimedOut)));
    two.pass_ms(60_000);
    assert!(!other.has_ended(), "nobody has told it");
    two.change_paths(|path| path.is_cut = false);
    two.pass_ms(RETRY_US_MAX / 1_000 + SOON_MS);
    assert_eq!(other.outcome().1, Err(io::ErrorKind::ConnectionReset), "nobody knows it any more");
}

#[test]
fn a_connection_to_nobody_fails_as_it_does_everywhere() {
    let mut two = Two::new(Path::default());
    let server = two.server.host().clone();
    let kind = |task: Task<io::Result<TcpStream>>| task.outcome().unwrap_err().kind();
    let refused = two.connect(SocketAddr::new(server.ip(), 81));
    let unknown = two.connect(([10, 0, 0, 9], 80).into());
    two.pass_ms(SOON_MS);
    assert_eq!(kind(refused), io::ErrorKind::ConnectionRefused);
    assert_eq!(kind(unknown), io::ErrorKind::HostUnreachable);

    let (listener, addr) = two.listen();
    server.lose_power();
    let dead = two.connect(addr);
    two.pass_ms(60_000);
    assert!(!dead.has_ended(), "it asks for a minute");
    two.pass_ms(5_000);
    assert_eq!(kind(dead), io::ErrorKind::TimedOut);

    let slow = two.connect(addr);
    two.pass_ms(5_000);
    server.power_on();
    two.pass_ms(5_000);
    assert_eq!(kind(slow), io::ErrorKind::ConnectionRefused, "its listener is gone with the power");
    drop(listener);
    let (_listener, addr) = two.listen();
    let back = two.connect(addr);
    two.pass_ms(SOON_MS);
    assert!(back.outcome().is_ok());
}

#[test]
fn who_connects_from_a_host_that_loses_power_is_told() {
    let mut two = Two::new(Path::default());
    let (_listener, addr) = two.listen();
    two.change_paths(|path| path.is_cut = true);
    let connecting = two.connect(addr);
    two.pass_ms(2_000);
    two.client.host().clone().lose_power();
    two.pass_ms(SOON_MS);
    let kind = connecting.outcome().map(drop).map_err(|error| error.kind());
    assert_eq!(kind, Err(io::ErrorKind::ConnectionAborted));
}

#[test]
fn a_connection_is_made_when_the_path_is_back() {
    let mut two = Two::new(Path::default());
    let (_listener, addr) = two.listen();
    two.change_paths(|path| path.is_cut = true);
    let connecting = two.connect(addr);
    two.pass_ms(2_000);
    assert!(!connecting.has_ended());
    two.change_paths(|path| path.is_cut = false);
    two.pass_ms(1_000 + SOON_MS);
    assert!(connecting.outcome().is_ok());
}

#[test]
fn a_host_without_power_says_nothing_and_resets_when_it_is_back() {
    let mut two = Two::new(Path::default());
    let (client, server) = two.connected();
    let host = two.server.host().clone();
    host.lose_power();
    drop(server);
    two.server = Process::new(&host).unwrap();
    client.try_write(b"hello").unwrap();
    let reading = spawn(&two.client, read(client));
    two.pass_ms(30_000);
    assert!(!reading.has_ended());
    host.power_on();
    two.pass_ms(RETRY_US_MAX / 1_000 + SOON_MS);
    assert_eq!(reading.outcome(), (Vec::new(), Err(io::ErrorKind::ConnectionReset)));
    assert_eq!(two.net.counts().conns, 0);
}

#[test]
fn who_waits_to_be_accepted_is_reset_when_the_listener_closes() {
    let mut two = Two::new(Path::default());
    let (listener, addr) = two.listen();
    let connecting = two.connect(addr);
    two.pass_ms(SOON_MS);
    let reading = spawn(&two.client, read(connecting.outcome().unwrap()));
    two.pass_ms(SOON_MS);
    assert!(!reading.has_ended());
    drop(listener);
    two.pass_ms(SOON_MS);
    assert_eq!(reading.outcome().1, Err(io::ErrorKind::ConnectionReset));
}

#[test]
fn who_gives_up_connecting_leaves_nothing() {
    let mut two = Two::new(Path::default());
    let (listener, addr) = two.listen();
    let host = two.client.host().clone();
    let accepting =
        spawn(&two.server, async move { read(listener.accept().await.unwrap().0).await });
    let task =
        two.client.handle().spawn(async move { TcpStream::connect(&host, addr, None).await });
    two.pass_ms(LATENCY_MS);
    task.abort();
    two.pass_ms(SOON_MS);
    assert_eq!(accepting.outcome().1, Err(io::ErrorKind::ConnectionReset));
    assert_eq!(two.net.counts().conns, 0);
}

#[test]
fn a_nat_that_forgets_ends_connections_through_it() {
    let mut two = Two::new(Path::default());
    let public: std::net::IpAddr = [198, 51, 100, 1].into();
    two.client.host().put_behind_nat(public, 30_000_000);
    let (client, server) = two.connected();
    assert_eq!(server.peer_addr().unwrap().ip(), public);
    two.client.host().rebind_nat();
    client.try_write(b"hello").unwrap();
    let reading = spawn(&two.client, read(client));
    let other = spawn(&two.server, read(server));
    two.pass_ms(SOON_MS);
    assert_eq!(reading.outcome().1, Err(io::ErrorKind::ConnectionReset));
    assert!(!other.has_ended(), "nothing finds its way to it");
}

#[test]
fn a_unix_socket_is_a_connection_within_a_host() {
    let mut two = Two::new(Path::default());
    let (host, path): (Host, _) = (two.server.host().clone(), std::path::Path::new("/socket"));
    let nobody = {
        let host = host.clone();
        spawn(&two.server, async move { UnixStream::connect(&host, path).await })
    };
    two.pass_ms(SOON_MS);
    assert_eq!(nobody.outcome().unwrap_err().kind(), io::ErrorKind::ConnectionRefused);

    let listener = UnixListener::bind(&host, path).unwrap();
    assert_eq!(UnixListener::bind(&host, path).unwrap_err().kind(), io::ErrorKind::AddrInUse);
    let answering = spawn(&two.server, async move {
        let (mut recv, mut send) = listener.accept().await.unwrap().into_split();
        tokio::io::copy(&mut recv, &mut send).await.unwrap()
    });
    let asking = spawn(&two.server, async move {
        let mut stream = UnixStream::connect(&host, path).await.unwrap();
        stream.write_all(b"echo").await.unwrap();
        stream.shutdown().await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        answer
    });
    two.pass_ms(SOON_MS);
    assert_eq!((answering.outcome(), asking.outcome().as_str()), (4, "echo"));
    assert_eq!(two.net.counts().conns, 0);
}
