//! What client and server see through Skein is what they see directly: each case is played both ways and compared.
#![allow(clippy::unwrap_used, reason = "a test stops at what it cannot unwrap")]

mod edges;

use edges::{Network, accept, connect, listen_on_loopback};
use std::{io, time::Duration};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    time::{sleep, timeout},
};

const LIMIT: Duration = Duration::from_secs(30);

/// How a connection ended for whoever read from it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum End {
    Open,
    Eof,
    Reset,
    BrokenPipe,
}

/// What one side saw.
#[derive(Clone, PartialEq, Eq, Debug)]
struct Seen {
    bytes: Vec<u8>,
    end: End,
}

impl Seen {
    fn open(bytes: Vec<u8>) -> Self {
        Self { bytes, end: End::Open }
    }
}

fn end_of(error: &io::Error) -> End {
    match error.kind() {
        io::ErrorKind::ConnectionReset => End::Reset,
        io::ErrorKind::BrokenPipe => End::BrokenPipe,
        other => panic!("unexpected end: {other}"),
    }
}

/// Reads until the end.
async fn read_all(stream: &mut TcpStream) -> Seen {
    let mut bytes = Vec::new();
    let mut buffer = vec![0; 64 << 10];
    loop {
        match stream.read(&mut buffer).await {
            Ok(0) => return Seen { bytes, end: End::Eof },
            Ok(len) => bytes.extend_from_slice(&buffer[..len]),
            Err(error) => return Seen { bytes, end: end_of(&error) },
        }
    }
}

async fn read_exactly(stream: &mut TcpStream, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    stream.read_exact(&mut bytes).await.unwrap();
    bytes
}

/// Writes until that fails.
async fn write_to_death(stream: &mut TcpStream) -> End {
    loop {
        if let Err(error) = stream.write_all(b"x").await {
            return end_of(&error);
        }
        sleep(Duration::from_millis(1)).await;
    }
}

fn reset(stream: TcpStream) {
    stream.set_zero_linger().unwrap();
    drop(stream);
}

fn pattern(len: usize, salt: u8) -> Vec<u8> {
    (0..len).map(|i| u8::try_from(i % 251).unwrap() ^ salt).collect()
}

#[derive(Clone, Copy, Debug)]
enum Case {
    RequestResponse,
    ServerFirst,
    HalfCloseByClient,
    HalfCloseByServer,
    HalfCloseCrossing,
    ResetByClient,
    ResetByServer,
    ResetByClientAfterHalfClose,
    ResetByServerAfterHalfClose,
    ResetByClientAfterServerHalfClosed,
    ZeroBytes,
    AcceptAndClose,
    CloseWithUnreadData,
    ResponseThenReset,
    PingPong,
    LargeBothWays,
    SlowReader,
}

const CASES: [Case; 17] = [
    Case::RequestResponse,
    Case::ServerFirst,
    Case::HalfCloseByClient,
    Case::HalfCloseByServer,
    Case::HalfCloseCrossing,
    Case::ResetByClient,
    Case::ResetByServer,
    Case::ResetByClientAfterHalfClose,
    Case::ResetByServerAfterHalfClose,
    Case::ResetByClientAfterServerHalfClosed,
    Case::ZeroBytes,
    Case::AcceptAndClose,
    Case::CloseWithUnreadData,
    Case::ResponseThenReset,
    Case::PingPong,
    Case::LargeBothWays,
    Case::SlowReader,
];

/// Plays a case and tells what (client, server) saw.
async fn play(case: Case, client: TcpStream, server: TcpStream) -> (Seen, Seen) {
    match case {
        Case::RequestResponse => request_response(client, server).await,
        Case::ServerFirst => server_first(client, server).await,
        Case::HalfCloseByClient => half_close_by_client(client, server).await,
        Case::HalfCloseByServer => half_close_by_server(client, server).await,
        Case::HalfCloseCrossing => half_close_crossing(client, server).await,
        Case::ResetByClient => reset_by_client(client, server).await,
        Case::ResetByServer => reset_by_server(client, server).await,
        Case::ResetByClientAfterHalfClose => reset_by_client_after_half_close(client, server).await,
        Case::ResetByServerAfterHalfClose => reset_by_server_after_half_close(client, server).await,
        Case::ResetByClientAfterServerHalfClosed => {
            reset_by_client_after_server_half_closed(client, server).await
        }
        Case::ZeroBytes => zero_bytes(client, server).await,
        Case::AcceptAndClose => accept_and_close(client, server).await,
        Case::CloseWithUnreadData => close_with_unread_data(client, server).await,
        Case::ResponseThenReset => response_then_reset(client, server).await,
        Case::PingPong => ping_pong(client, server).await,
        Case::LargeBothWays => large_both_ways(client, server).await,
        Case::SlowReader => slow_reader(client, server).await,
    }
}

async fn request_response(mut client: TcpStream, mut server: TcpStream) -> (Seen, Seen) {
    client.write_all(b"request").await.unwrap();
    let request = read_exactly(&mut server, 7).await;
    server.write_all(b"response").await.unwrap();
    let response = read_exactly(&mut client, 8).await;
    drop(client);
    let rest = read_all(&mut server).await;
    (Seen::open(response), Seen { bytes: request, end: rest.end })
}

async fn server_first(mut client: TcpStream, mut server: TcpStream) -> (Seen, Seen) {
    server.write_all(b"220 ready\r\n").await.unwrap();
    let banner = read_exactly(&mut client, 11).await;
    client.write_all(b"QUIT\r\n").await.unwrap();
    let quit = read_exactly(&mut server, 6).await;
    drop(server);
    let rest = read_all(&mut client).await;
    (Seen { bytes: banner, end: rest.end }, Seen::open(quit))
}

async fn half_close_by_client(mut client: TcpStream, mut server: TcpStream) -> (Seen, Seen) {
    client.write_all(&pattern(300_000, 1)).await.unwrap();
    client.shutdown().await.unwrap();
    let at_server = read_all(&mut server).await;
    server.write_all(&pattern(300_000, 2)).await.unwrap();
    drop(server);
    (read_all(&mut client).await, at_server)
}

async fn half_close_by_server(mut client: TcpStream, mut server: TcpStream) -> (Seen, Seen) {
    server.write_all(&pattern(300_000, 1)).await.unwrap();
    server.shutdown().await.unwrap();
    let at_client = read_all(&mut client).await;
    client.write_all(&pattern(300_000, 2)).await.unwrap();
    drop(client);
    (at_client, read_all(&mut server).await)
}

async fn half_close_crossing(mut client: TcpStream, mut server: TcpStream) -> (Seen, Seen) {
    client.write_all(&pattern(10_000, 1)).await.unwrap();
    server.write_all(&pattern(10_000, 2)).await.unwrap();
    client.shutdown().await.unwrap();
    server.shutdown().await.unwrap();
    (read_all(&mut client).await, read_all(&mut server).await)
}

async fn reset_by_client(mut client: TcpStream, mut server: TcpStream) -> (Seen, Seen) {
    client.write_all(&[1; 1000]).await.unwrap();
    let got = read_exactly(&mut server, 1000).await;
    reset(client);
    let rest = read_all(&mut server).await;
    (Seen::open(Vec::new()), Seen { bytes: got, end: rest.end })
}

async fn reset_by_server(mut client: TcpStream, mut server: TcpStream) -> (Seen, Seen) {
    server.write_all(&[1; 1000]).await.unwrap();
    let got = read_exactly(&mut client, 1000).await;
    reset(server);
    let rest = read_all(&mut client).await;
    (Seen { bytes: got, end: rest.end }, Seen::open(Vec::new()))
}

async fn reset_by_client_after_half_close(
    mut client: TcpStream,
    mut server: TcpStream,
) -> (Seen, Seen) {
    client.write_all(b"all").await.unwrap();
    client.shutdown().await.unwrap();
    let got = read_all(&mut server).await;
    reset(client);
    let end = write_to_death(&mut server).await;
    (Seen::open(Vec::new()), Seen { end, ..got })
}

async fn reset_by_server_after_half_close(
    mut client: TcpStream,
    mut server: TcpStream,
) -> (Seen, Seen) {
    server.write_all(b"all").await.unwrap();
    server.shutdown().await.unwrap();
    let got = read_all(&mut client).await;
    reset(server);
    let end = write_to_death(&mut client).await;
    (Seen { end, ..got }, Seen::open(Vec::new()))
}

async fn reset_by_client_after_server_half_closed(
    mut client: TcpStream,
    mut server: TcpStream,
) -> (Seen, Seen) {
    server.write_all(b"all").await.unwrap();
    server.shutdown().await.unwrap();
    let got = read_all(&mut client).await;
    reset(client);
    (got, read_all(&mut server).await)
}

async fn zero_bytes(client: TcpStream, mut server: TcpStream) -> (Seen, Seen) {
    drop(client);
    (Seen::open(Vec::new()), read_all(&mut server).await)
}

async fn accept_and_close(mut client: TcpStream, server: TcpStream) -> (Seen, Seen) {
    drop(server);
    (read_all(&mut client).await, Seen::open(Vec::new()))
}

async fn close_with_unread_data(mut client: TcpStream, mut server: TcpStream) -> (Seen, Seen) {
    client.write_all(&[1; 10_000]).await.unwrap();
    let got = read_exactly(&mut server, 10).await;
    server.peek(&mut [0]).await.unwrap();
    drop(server);
    (read_all(&mut client).await, Seen::open(got))
}

async fn response_then_reset(mut client: TcpStream, mut server: TcpStream) -> (Seen, Seen) {
    client.write_all(&[1; 10_000]).await.unwrap();
    let got = read_exactly(&mut server, 10).await;
    server.peek(&mut [0]).await.unwrap();
    server.write_all(b"413 too large").await.unwrap();
    drop(server);
    (read_all(&mut client).await, Seen::open(got))
}

async fn ping_pong(mut client: TcpStream, mut server: TcpStream) -> (Seen, Seen) {
    let (mut at_client, mut at_server) = (Vec::new(), Vec::new());
    for i in 0..200_u8 {
        client.write_all(&[i]).await.unwrap();
        at_server.extend(read_exactly(&mut server, 1).await);
        server.write_all(&[!i]).await.unwrap();
        at_client.extend(read_exactly(&mut client, 1).await);
    }
    (Seen::open(at_client), Seen::open(at_server))
}

async fn large_both_ways(client: TcpStream, server: TcpStream) -> (Seen, Seen) {
    let (mut client_read, mut client_write) = client.into_split();
    let (mut server_read, mut server_write) = server.into_split();
    let (up, down) = (pattern(4 << 20, 3), pattern(4 << 20, 4));
    let (mut at_client, mut at_server) = (Vec::new(), Vec::new());
    let (a, b, c, d) = tokio::join!(
        async {
            client_write.write_all(&up).await?;
            client_write.shutdown().await
        },
        async {
            server_write.write_all(&down).await?;
            server_write.shutdown().await
        },
        client_read.read_to_end(&mut at_client),
        server_read.read_to_end(&mut at_server),
    );
    a.and(b).and(c).and(d).unwrap();
    assert!(at_client == down && at_server == up);
    (Seen { bytes: Vec::new(), end: End::Eof }, Seen { bytes: Vec::new(), end: End::Eof })
}

async fn slow_reader(mut client: TcpStream, mut server: TcpStream) -> (Seen, Seen) {
    // Whoever writes is stopped before long, and nothing is lost.
    let chunk = vec![7; 1 << 20];
    let mut written = 0;
    while let Ok(len) = timeout(Duration::from_millis(500), client.write(&chunk)).await {
        written += len.unwrap();
        assert!(written < 200 << 20, "no backpressure");
    }
    client.shutdown().await.unwrap();
    let at_server = read_all(&mut server).await;
    assert_eq!(at_server.bytes.len(), written);
    (Seen::open(Vec::new()), Seen { bytes: Vec::new(), end: at_server.end })
}

#[tokio::test]
async fn through_skein_is_as_direct() {
    let direct = listen_on_loopback();
    let (network, target, entrance) = Network::service().await;
    for case in CASES {
        let client = connect(direct.local_addr().unwrap()).await;
        let (server, _) = direct.accept().await.unwrap();
        let expected = timeout(LIMIT, play(case, client, server)).await;
        let expected = expected.unwrap_or_else(|_| panic!("{case:?} hangs even directly"));
        let through = async {
            let client = connect(entrance).await;
            let server = accept(&target).await;
            play(case, client, server).await
        };
        let seen = timeout(LIMIT, through).await.unwrap_or_else(|_| panic!("{case:?} hangs"));
        assert_eq!(seen, expected, "{case:?}");
    }
    let settled = edges::eventually(|| network.edges.iter().all(|e| e.counters.active() == 0));
    timeout(LIMIT, settled).await.expect("flows are left over");
}

#[tokio::test]
async fn the_same_holds_where_the_flow_leaves_at_its_ingress() {
    let direct = listen_on_loopback();
    let mut network = Network::new(1);
    let target = listen_on_loopback();
    network.expose(0, "echo", target.local_addr().unwrap()).await;
    let entrance = network.listen(0, "echo").await;
    for case in CASES {
        let client = connect(direct.local_addr().unwrap()).await;
        let (server, _) = direct.accept().await.unwrap();
        let expected = timeout(LIMIT, play(case, client, server)).await.unwrap();
        let client = connect(entrance).await;
        let server = accept(&target).await;
        let seen = timeout(LIMIT, play(case, client, server)).await;
        assert_eq!(seen.unwrap_or_else(|_| panic!("{case:?} hangs")), expected, "{case:?}");
    }
}

#[tokio::test]
async fn a_refused_target_is_a_reset_with_no_bytes() {
    let (_network, target, entrance) = Network::service().await;
    drop(target);
    let mut client = connect(entrance).await;
    client.write_all(b"hello").await.unwrap();
    let seen = timeout(LIMIT, read_all(&mut client)).await.unwrap();
    assert_eq!(seen, Seen { bytes: Vec::new(), end: End::Reset });
}
