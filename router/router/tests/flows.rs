//! Many flows at once, flows that fail, and what they leave behind.
#![allow(clippy::unwrap_used, reason = "a test stops at what it cannot unwrap")]

mod edges;
mod stopwatch;

use edges::{
    Network, accept, connect, connector, eventually, flow_open, hello, listen_on_loopback, listener,
};
use prost::Message as _;
use skein_core::Handle;
use skein_router::{
    flows::{Edge, Outcome},
    net,
    session::{INITIAL_CREDIT_BYTES, SESSION_BYTES},
};
use skein_wire::proto::session::{FlowReply, flow_reply, refused};
use std::{
    io,
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};
use stopwatch::Stopwatch;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
    task::JoinSet,
    time::{sleep, timeout},
};

const LIMIT: Duration = Duration::from_secs(60);

/// Ends a test that hangs.
async fn within<T>(what: impl Future<Output = T>) -> T {
    timeout(LIMIT, what).await.expect("the test hangs")
}

async fn echo(mut stream: TcpStream) -> io::Result<()> {
    let (mut read, mut write) = stream.split();
    tokio::io::copy(&mut read, &mut write).await?;
    write.shutdown().await
}

/// Echoes every connection for as long as it is polled.
async fn echo_server(target: &TcpListener) {
    let mut connections = JoinSet::new();
    loop {
        let (stream, _) = target.accept().await.unwrap();
        connections.spawn(echo(stream));
        while connections.try_join_next().is_some() {}
    }
}

/// Sends `bytes` and gets them back.
async fn ask(to: SocketAddr, bytes: &[u8]) -> io::Result<Vec<u8>> {
    let mut client = connect(to).await;
    client.write_all(bytes).await?;
    client.shutdown().await?;
    let mut answer = Vec::new();
    client.read_to_end(&mut answer).await?;
    Ok(answer)
}

#[tokio::test]
async fn unpaced_flows_share_and_none_starves() {
    const FLOWS: usize = 20;
    const STEPS: usize = 40;
    let (_network, target, entrance) = Network::service().await;
    let counts: Arc<Vec<AtomicU64>> = Arc::new((0..FLOWS).map(|_| AtomicU64::new(0)).collect());
    let mut tasks = JoinSet::new();
    for n in 0..FLOWS {
        let mut client = connect(entrance).await;
        let mut server = accept(&target).await;
        let counts = Arc::clone(&counts);
        tasks.spawn(async move {
            let chunk = vec![1; 256 << 10];
            while client.write_all(&chunk).await.is_ok() {}
        });
        tasks.spawn(async move {
            let mut buffer = vec![0; 256 << 10];
            while let Ok(len @ 1..) = server.read(&mut buffer).await {
                counts[n].fetch_add(len as u64, Ordering::Relaxed);
            }
        });
    }
    let snapshot = || counts.iter().map(|c| c.load(Ordering::Relaxed)).collect::<Vec<_>>();
    // Slow start and growing windows are not the subject.
    within(eventually(|| snapshot().iter().sum::<u64>() > 50 << 20)).await;
    let first = snapshot();
    let (mut last, mut quiet) = (first.clone(), [0; FLOWS]);
    for _ in 0..STEPS {
        let before: u64 = last.iter().sum();
        // A step is progress of the whole, so that a busy machine does not look like starvation.
        within(eventually(|| snapshot().iter().sum::<u64>() > before + (8 << 20))).await;
        let now = snapshot();
        for n in 0..FLOWS {
            quiet[n] = if now[n] == last[n] { quiet[n] + 1 } else { 0 };
            assert!(quiet[n] < 5, "flow {n} starves");
        }
        last = now;
    }
    let shares: Vec<u64> = last.iter().zip(&first).map(|(last, first)| last - first).collect();
    let (least, most) = (shares.iter().min().unwrap(), shares.iter().max().unwrap());
    assert!(*most <= 2 * least, "shares are uneven: {shares:?}");
    tasks.abort_all();
}

#[tokio::test]
async fn a_stalled_reader_does_not_stall_the_others() {
    let (_network, target, entrance) = Network::service().await;
    let mut stalled = connect(entrance).await;
    let _never_read = accept(&target).await;
    let chunk = vec![1; 1 << 20];
    while let Ok(written) = timeout(Duration::from_millis(500), stalled.write(&chunk)).await {
        written.unwrap();
    }
    let payload = vec![2; 4 << 20];
    let asks = (0..19).map(|_| ask(entrance, &payload));
    let answers = async {
        let mut set = JoinSet::new();
        for _ in 0..19 {
            set.spawn(echo(accept(&target).await));
        }
        set.join_all().await
    };
    let (answers, _) = within(futures_join(asks, answers)).await;
    assert!(answers.into_iter().all(|answer| answer.unwrap() == payload));
}

/// Runs the asks side by side with the server.
async fn futures_join<T, U>(
    asks: impl Iterator<Item = impl Future<Output = T>>,
    server: impl Future<Output = U>,
) -> (Vec<T>, U) {
    let mut asks: Vec<_> = asks.map(|ask| Some(Box::pin(ask))).collect();
    let mut answers: Vec<Option<T>> = asks.iter().map(|_| None).collect();
    let all = std::future::poll_fn(|cx| {
        for (ask, answer) in asks.iter_mut().zip(&mut answers) {
            if let Some(running) = ask
                && let std::task::Poll::Ready(done) = running.as_mut().poll(cx)
            {
                *answer = Some(done);
                *ask = None;
            }
        }
        if asks.iter().all(Option::is_none) {
            std::task::Poll::Ready(())
        } else {
            std::task::Poll::Pending
        }
    });
    let ((), server) = tokio::join!(all, server);
    (answers.into_iter().flatten().collect(), server)
}

#[tokio::test]
async fn at_the_ceiling_new_flows_are_refused_and_later_accepted() {
    const FLOWS: u64 = 4;
    let mut network = Network::with_budget(2, FLOWS * INITIAL_CREDIT_BYTES + SESSION_BYTES * 4 / 3);
    let target = listen_on_loopback();
    network.expose(1, "echo", target.local_addr().unwrap()).await;
    let entrance = network.listen(0, "echo").await;
    let mut open = Vec::new();
    // One site gets three quarters. Idle flows give most of their credit back after a while, so it may take more than three.
    let refused = async {
        loop {
            let mut client = connect(entrance).await;
            client.write_all(b"x").await.unwrap();
            tokio::select! {
                server = accept(&target) => open.push((client, server)),
                end = client.read_u8() => return end.unwrap_err().kind(),
            }
        }
    };
    assert_eq!(within(refused).await, io::ErrorKind::ConnectionReset);
    assert!(open.len() as u64 >= FLOWS * 3 / 4);
    for edge in &network.edges {
        assert!(edge.budget.used_bytes() <= edge.budget.ceiling_bytes());
    }
    open.clear();
    within(eventually(|| network.edges.iter().all(edges::Edge::holds_nothing))).await;
    tokio::select! {
        () = echo_server(&target) => {}
        answer = within(ask(entrance, b"again")) => assert_eq!(answer.unwrap(), b"again"),
    }
}

#[tokio::test]
async fn flows_to_a_target_that_does_not_answer_leave_memory_for_others() {
    const WAITING: u64 = 24;
    let mut network = Network::with_budget(2, 40 * INITIAL_CREDIT_BYTES);
    let alive = listen_on_loopback();
    let (_dead, at) = edges::dead_target();
    let mut slow = connector("dead", at);
    slow.connect_timeout_ms = 60_000;
    let egress = network.edges[1].egress.clone();
    egress.configure(vec![slow, connector("echo", alive.local_addr().unwrap())]);
    egress.entries().wait_for(|entries| entries.len() == 2).await.unwrap();
    network.publish();
    let entrances = network.listen_all(0, &["dead", "echo"]).await;
    let mut waiting = Vec::new();
    for _ in 0..WAITING {
        let mut client = connect(entrances[0]).await;
        client.write_all(b"hello?").await.unwrap();
        waiting.push(client);
    }
    let active = |edge: usize| network.edges[edge].counters.active();
    let used = |edge: usize| network.edges[edge].budget.used_bytes();
    within(eventually(|| active(1) == WAITING)).await;
    // On both sides.
    for edge in [0, 1] {
        within(eventually(|| used(edge) <= WAITING * (17 << 10) + SESSION_BYTES)).await;
        assert_eq!(active(edge), WAITING);
    }
    let payload = vec![5; 1 << 20];
    tokio::select! {
        () = echo_server(&alive) => {}
        answer = within(ask(entrances[1], &payload)) => assert!(answer.unwrap() == payload),
    }
    assert!(active(1) >= WAITING);
}

#[tokio::test]
async fn idle_flows_give_their_credit_back_and_go_on() {
    let (network, target, entrance) = Network::service().await;
    let mut client = connect(entrance).await;
    let mut server = accept(&target).await;
    let used = || network.edges[1].budget.used_bytes();
    let idle = SESSION_BYTES..SESSION_BYTES + INITIAL_CREDIT_BYTES / 4;
    within(eventually(|| used() > SESSION_BYTES && idle.contains(&used()))).await;
    let payload = vec![3; 2 << 20];
    let (sent, mut got) = tokio::join!(client.write_all(&payload), async {
        let mut got = vec![0; payload.len()];
        server.read_exact(&mut got).await.unwrap();
        got
    });
    sent.unwrap();
    assert!(got == payload);
    got.clear();
}

#[tokio::test]
async fn many_tiny_flows_leave_nothing_behind() {
    // Their connections linger in the kernel for a minute: more would slow down whatever connects on this machine after them.
    const FLOWS: usize = 4_000;
    const AT_A_TIME: usize = 50;
    let (network, target, entrance) = Network::service().await;
    let clients = async {
        let mut set = JoinSet::new();
        for _ in 0..FLOWS {
            if set.len() == AT_A_TIME {
                set.join_next().await.unwrap().unwrap();
            }
            set.spawn(async move { assert_eq!(ask(entrance, b"tiny").await.unwrap(), b"tiny") });
        }
        while let Some(done) = set.join_next().await {
            done.unwrap();
        }
    };
    tokio::select! {
        () = echo_server(&target) => {}
        done = timeout(4 * LIMIT, clients) => done.unwrap(),
    }
    let clean = || {
        network.edges.iter().all(|edge| {
            edge.counters.active() == 0 && edge.sessions.flow_count() == 0 && edge.holds_nothing()
        })
    };
    within(eventually(clean)).await;
    for (edge, side) in [(0, Edge::Ingress), (1, Edge::Egress)] {
        let ended = network.edges[edge].counters.ended(side, Outcome::Finished);
        assert_eq!(ended, FLOWS as u64, "{side:?}");
    }
    assert_eq!(network.edges[0].sessions.count(), 1);
}

#[tokio::test]
async fn a_session_takes_as_many_flows_at_once_as_come() {
    const FLOWS: usize = 3_000;
    // Not even half of what they could use if all of them did at once.
    let mut network = Network::with_budget(2, 1_000 * INITIAL_CREDIT_BYTES);
    let target = listen_on_loopback();
    network.expose(1, "echo", target.local_addr().unwrap()).await;
    let entrance = network.listen(0, "echo").await;
    let mut ends = Vec::new();
    for _ in 0..FLOWS {
        let client = connect(entrance).await;
        ends.push((client, within(accept(&target)).await));
    }
    assert_eq!(network.edges[0].sessions.count(), 1);
    assert_eq!(network.edges[0].sessions.flow_count(), FLOWS);
    for (client, server) in &mut ends {
        client.write_all(b"x").await.unwrap();
        assert_eq!(within(server.read_u8()).await.unwrap(), b'x');
    }
    drop(ends);
    within(eventually(|| network.edges[0].sessions.flow_count() == 0)).await;
}

#[tokio::test]
async fn a_peer_that_allows_no_flows_keeps_no_client_waiting() {
    let (network, _target, entrance) = Network::service().await;
    let endpoint = network.edges[1].restart_endpoint().await;
    // The control stream.
    network.edges[1].serve_streams(&endpoint, 1);
    let served = async {
        let connection = endpoint.accept().await.unwrap().await.unwrap();
        let (mut control, from_peer) = connection.accept_bi().await.unwrap();
        control.write_all(&hello()).await.unwrap();
        (connection, control, from_peer)
    };
    let mut client = connect(entrance).await;
    client.write_all(b"x").await.unwrap();
    let _session = within(served).await;
    let end = timeout(Duration::from_secs(20), client.read_u8()).await.unwrap().unwrap_err();
    assert_eq!(end.kind(), io::ErrorKind::ConnectionReset);
    // Nothing was handed over: it was not the loss of a session.
    assert_eq!(network.edges[0].counters.ended(Edge::Ingress, Outcome::Unreachable), 1);
}

/// Establishes a session on a bare connection; to be kept, since the session ends with it.
async fn say_hello(connection: &quinn::Connection) -> (quinn::SendStream, quinn::RecvStream) {
    let (control, mut from_peer) = send_hello(connection).await;
    assert!(within(from_peer.read_chunk(100, true)).await.unwrap().is_some());
    (control, from_peer)
}

async fn send_hello(connection: &quinn::Connection) -> (quinn::SendStream, quinn::RecvStream) {
    let (mut control, from_peer) = connection.open_bi().await.unwrap();
    control.write_all(&hello()).await.unwrap();
    (control, from_peer)
}

#[tokio::test]
async fn a_peer_gets_no_more_sessions_than_it_can_need_and_keeps_what_it_has() {
    const ALLOWED: usize = 16;
    let (mut network, _target, _) = Network::service().await;
    let mut kept = Vec::new();
    let dialler = network.rogue_dialler(0, 1);
    for _ in 0..ALLOWED {
        let connection = dialler.connect().await;
        let control = say_hello(&connection).await;
        kept.push((connection, control));
    }
    within(eventually(|| network.edges[1].sessions.count() == ALLOWED)).await;
    for _ in 0..3 {
        let connection = dialler.connect().await;
        let _control = send_hello(&connection).await;
        let reason = within(connection.closed()).await;
        assert!(reason.to_string().contains("too many sessions"), "{reason}");
    }
    assert!(kept.iter().all(|(connection, _)| connection.close_reason().is_none()));
}

#[tokio::test]
async fn what_nobody_reads_is_bounded_by_what_is_paid_for() {
    let mut network = Network::with_budget(2, 4 << 20);
    let connection = network.rogue(0, 1).await;
    // The first stream is the control stream, on which nothing comes, so that nobody reads the others.
    let _control = connection.open_bi().await.unwrap();
    let chunk = vec![1; 1 << 20];
    let mut streams = Vec::new();
    let mut sent = 0;
    for _ in 0..4 {
        let (mut send, recv) = connection.open_bi().await.unwrap();
        // Completes at once with what fits, or not at all.
        if let Ok(written) = timeout(Duration::from_millis(100), send.write(&chunk)).await {
            sent += written.unwrap() as u64;
        }
        streams.push((send, recv));
    }
    assert!((1..=SESSION_BYTES).contains(&sent), "{sent}");
}

/// What comes of it without waiting, if anything does.
async fn at_once<T>(what: impl Future<Output = T>) -> Option<T> {
    let mut what = std::pin::pin!(what);
    std::future::poll_fn(|cx| match what.as_mut().poll(cx) {
        std::task::Poll::Ready(done) => std::task::Poll::Ready(Some(done)),
        std::task::Poll::Pending => std::task::Poll::Ready(None),
    })
    .await
}

#[tokio::test]
async fn flows_that_a_peer_opens_and_resets_permit_it_no_more() {
    const CYCLES: usize = 100;
    let (mut network, target, _) = Network::service().await;
    let connection = network.rogue(0, 1).await;
    let _control = say_hello(&connection).await;
    for _ in 0..CYCLES {
        let (mut send, recv) = connection.open_bi().await.unwrap();
        send.write_all(&flow_open("echo")).await.unwrap();
        let _server = within(accept(&target)).await;
        send.reset(0_u32.into()).unwrap();
        drop(recv);
    }
    within(eventually(|| network.edges[1].sessions.flow_count() == 0)).await;
    // On this thread nobody reads in between, so the last writes take all that QUIC permits.
    let (mut send, _recv) = connection.open_bi().await.unwrap();
    let (chunk, mut permitted) = (vec![1; 1 << 20], 0);
    while let Some(written) = at_once(send.write(&chunk)).await {
        permitted += written.unwrap() as u64;
    }
    let paid = network.edges[1].budget.used_bytes();
    assert!((1..=paid).contains(&permitted), "{permitted} of {paid}");
}

#[tokio::test]
async fn handshakes_of_one_router_leave_room_for_others() {
    const OF_ONE_ROUTER: usize = 16;
    let mut network = Network::new(3);
    let target = listen_on_loopback();
    network.expose(1, "echo", target.local_addr().unwrap()).await;
    let entrance = network.listen(2, "echo").await;
    let dialler = network.rogue_dialler(0, 1);
    // None says hello, so that they go on. Only the first two were not asked to show that they get answers.
    let mut kept = Vec::new();
    for _ in 0..OF_ONE_ROUTER {
        kept.push(within(dialler.dial()).await.unwrap());
    }
    tokio::select! {
        () = echo_server(&target) => {}
        refused = dialler.dial() => panic!("a further handshake ended: {refused:?}"),
        answer = within(ask(entrance, b"other")) => assert_eq!(answer.unwrap(), b"other"),
    }
}

#[tokio::test]
async fn a_site_has_as_many_sessions_as_it_may_hold_memory() {
    // Of three, one site gets two.
    let mut network = Network::with_budget(2, 3 * SESSION_BYTES);
    let dialler = network.rogue_dialler(0, 1);
    let mut connections = Vec::new();
    for _ in 0..3 {
        connections.push(dialler.connect().await);
    }
    let reason = within(connections[2].closed()).await;
    assert!(reason.to_string().contains("no memory for another session"), "{reason}");
    assert!(connections[..2].iter().all(|connection| connection.close_reason().is_none()));
}

#[tokio::test]
async fn a_session_that_begins_at_the_ceiling_does_with_what_it_has() {
    let (mut network, _target, _) = Network::service().await;
    let connection = network.rogue(0, 1).await;
    let budget = Arc::clone(&network.edges[1].budget);
    within(eventually(|| budget.used_bytes() == SESSION_BYTES)).await;
    budget.set_ceiling(0);
    let _control = say_hello(&connection).await;
    let (mut send, mut recv) = connection.open_bi().await.unwrap();
    send.write_all(&flow_open("echo")).await.unwrap();
    let reply = within(recv.read_to_end(1 << 10)).await.unwrap();
    let reply = FlowReply::decode_length_delimited(&*reply).unwrap();
    let Some(flow_reply::Outcome::Refused(refused)) = reply.outcome else {
        panic!("not refused: {reply:?}")
    };
    assert_eq!(refused.reason(), refused::Reason::Overloaded);
}

/// A session with a peer that takes a hello and little more, in which so many flows are to be refused.
async fn refused_in_silence(
    network: &mut Network,
    flows: usize,
) -> (quinn::Connection, quinn::SendStream, Vec<quinn::RecvStream>) {
    let connection = network.rogue_dialler(0, 1).taking(100).connect().await;
    let budget = Arc::clone(&network.edges[1].budget);
    within(eventually(|| budget.used_bytes() == SESSION_BYTES)).await;
    budget.set_ceiling(0);
    let (mut control, from_peer) = connection.open_bi().await.unwrap();
    control.write_all(&hello()).await.unwrap();
    let mut replies = vec![from_peer];
    for _ in 0..flows {
        let (mut send, reply) = within(connection.open_bi()).await.unwrap();
        send.write_all(&flow_open("echo")).await.unwrap();
        replies.push(reply);
    }
    (connection, control, replies)
}

#[tokio::test]
async fn refusals_that_nobody_takes_are_bounded_and_hold_up_no_drain() {
    const FLOWS: usize = 300;
    let (mut network, _target, _) = Network::service().await;
    let (_connection, _control, mut replies) = refused_in_silence(&mut network, FLOWS).await;
    let last = replies.last_mut().unwrap().received_reset();
    assert_eq!(within(last).await.unwrap(), Some(1_u32.into()));
    let drain = network.edges[1].egress.drain(skein_router::clock::now());
    timeout(Duration::from_secs(10), drain).await.expect("the drain waits for the peer");
}

#[tokio::test]
async fn a_peer_that_takes_no_reply_loses_its_session() {
    let (mut network, _target, _) = Network::service().await;
    let (connection, _control, _replies) = refused_in_silence(&mut network, 4).await;
    // The first has been written, and the next waits for room.
    within(eventually(|| connection.stats().frame_rx.stream > 1)).await;
    tokio::time::pause();
    tokio::time::advance(Duration::from_secs(31)).await;
    tokio::time::resume();
    let reason = within(connection.closed()).await;
    assert!(reason.to_string().contains("the peer takes nothing"), "{reason}");
}

#[tokio::test]
async fn a_peer_that_exceeds_its_credit_loses_its_session() {
    let (mut network, target, _) = Network::service().await;
    let connection = network.rogue(0, 1).await;
    let _control = say_hello(&connection).await;
    let (mut send, _recv) = connection.open_bi().await.unwrap();
    send.write_all(&flow_open("echo")).await.unwrap();
    let _never_reads = accept(&target).await;
    let chunk = vec![1; 1 << 20];
    let error = within(async {
        loop {
            if let Err(error) = send.write_all(&chunk).await {
                return error;
            }
        }
    });
    let quinn::WriteError::ConnectionLost(reason) = error.await else {
        panic!("only the flow died")
    };
    assert!(reason.to_string().contains("the peer broke the protocol"), "{reason}");
    assert_eq!(network.edges[1].counters.protocol_violations.total(), 1);
}

#[tokio::test]
async fn a_connector_whose_target_is_gone_withdraws_until_it_is_back() {
    let (network, target, entrance) = Network::service().await;
    let entries = network.edges[1].egress.entries();
    let port = target.local_addr().unwrap();
    drop(target);
    let mut client = connect(entrance).await;
    within(client.read_u8()).await.unwrap_err();
    within(eventually(|| entries.borrow().is_empty())).await;
    let status = || network.edges[1].egress.status()[0].clone();
    assert!(!status().advertised && !status().targets[0].healthy);
    assert_ne!(status().targets[0].error, "");
    let _target = net::tcp_listen(port).unwrap();
    within(eventually(|| !entries.borrow().is_empty())).await;
    assert!(status().advertised && status().targets[0].healthy);
}

#[tokio::test]
async fn a_candidate_that_refuses_costs_no_flow() {
    let mut network = Network::new(3);
    let (dead, alive) = (listen_on_loopback(), listen_on_loopback());
    network.expose(1, "echo", dead.local_addr().unwrap()).await;
    network.expose(2, "echo", alive.local_addr().unwrap()).await;
    let entrance = network.listen(0, "echo").await;
    drop(dead);
    for _ in 0..10 {
        tokio::select! {
            () = echo_server(&alive) => {}
            answer = within(ask(entrance, b"hello")) => assert_eq!(answer.unwrap(), b"hello"),
        }
    }
}

#[tokio::test]
async fn first_bytes_survive_from_a_remote_that_refuses_to_a_local_target() {
    let mut network = Network::new(2);
    let (dead, alive) = (listen_on_loopback(), listen_on_loopback());
    network.expose(1, "echo", dead.local_addr().unwrap()).await;
    let entrance = network.listen(0, "echo").await;
    drop(dead);
    network.edges[1].cut();
    // Connects and writes before the ingress runs again, so that it reads the bytes before its first attempt.
    let mut client = std::net::TcpStream::connect(entrance).unwrap();
    io::Write::write_all(&mut client, b"hello").unwrap();
    client.set_nonblocking(true).unwrap();
    let mut client = TcpStream::from_std(client).unwrap();
    // The session cannot come about until the local target is there; then the remote refuses.
    network.expose(0, "echo", alive.local_addr().unwrap()).await;
    network.edges[1].mend();
    client.shutdown().await.unwrap();
    let mut answer = Vec::new();
    tokio::select! {
        () = echo_server(&alive) => {}
        read = within(client.read_to_end(&mut answer)) => drop(read.unwrap()),
    }
    assert_eq!(answer, b"hello");
    assert_eq!(network.edges[0].counters.retries.total(), 1);
}

#[tokio::test]
async fn a_candidate_that_dies_unnoticed_costs_no_new_flow() {
    let mut network = Network::new(3);
    let targets = [listen_on_loopback(), listen_on_loopback()];
    network.expose(1, "echo", targets[0].local_addr().unwrap()).await;
    network.expose(2, "echo", targets[1].local_addr().unwrap()).await;
    let entrance = network.listen(0, "echo").await;
    tokio::select! {
        () = echo_server(&targets[0]) => {}
        () = echo_server(&targets[1]) => {}
        () = within(async {
            for _ in 0..10 {
                assert_eq!(ask(entrance, b"before").await.unwrap(), b"before");
            }
            network.edges[1].cut();
            let mut asks: JoinSet<_> = (0..10).map(|_| ask(entrance, b"during")).collect();
            sleep(Duration::from_millis(300)).await;
            network.unreachable.insert(network.edges[1].local.router);
            network.publish();
            while let Some(answer) = asks.join_next().await {
                assert_eq!(answer.unwrap().unwrap(), b"during");
            }
        }) => {}
    }
}

#[tokio::test]
async fn a_lost_session_is_a_reset_never_an_end() {
    let (network, target, entrance) = Network::service().await;
    let mut client = connect(entrance).await;
    let mut server = accept(&target).await;
    client.write_all(b"x").await.unwrap();
    server.read_u8().await.unwrap();
    network.trust_all_but(&[network.edges[0].local.site]);
    for stream in [&mut client, &mut server] {
        let end = within(stream.read_u8()).await.unwrap_err();
        assert_eq!(end.kind(), io::ErrorKind::ConnectionReset);
    }
}

/// Sends `len` bytes over a flow that is open.
async fn push(client: &mut TcpStream, server: &mut TcpStream, len: usize) {
    let (payload, mut got) = (vec![4; len], vec![0; len]);
    let (sent, read) = tokio::join!(client.write_all(&payload), server.read_exact(&mut got));
    sent.unwrap();
    read.unwrap();
    assert!(got == payload);
}

#[tokio::test]
async fn new_flows_get_packets_of_the_size_that_the_path_has_now() {
    const LEN: usize = 256 << 10;
    let (mut network, target, entrance) = Network::service().await;
    let (mut client, mut server) = (connect(entrance).await, accept(&target).await);
    for edge in &network.edges {
        edge.set_mtu(1_300);
    }
    network.publish();
    let oversized = |network: &Network| network.edges.iter().map(|edge| edge.oversized()).sum();
    let before: u64 = oversized(&network);
    within(push(&mut client, &mut server, LEN)).await;
    assert!(oversized(&network) > before, "the old session was opened with larger packets");
    // The flow that runs keeps its session, new ones get another.
    within(eventually(|| network.edges[0].sessions.count() == 2)).await;
    let before: u64 = oversized(&network);
    for _ in 0..3 {
        let (mut client, mut server) = (connect(entrance).await, accept(&target).await);
        within(push(&mut client, &mut server, LEN)).await;
    }
    // Acknowledgements of the old session are small.
    assert_eq!(oversized(&network), before);
    within(push(&mut client, &mut server, LEN)).await;
    assert!(oversized(&network) > before);
    drop((client, server));
    within(eventually(|| network.edges[0].sessions.count() == 1)).await;
    within(eventually(|| network.edges[1].sessions.count() == 1)).await;
}

#[tokio::test]
async fn a_path_that_flaps_between_two_sizes_needs_two_sessions() {
    const LEN: usize = 256 << 10;
    let (mut network, target, entrance) = Network::service().await;
    let mut running = vec![(connect(entrance).await, accept(&target).await)];
    for mtu in [2_800, 1_452].repeat(5) {
        for edge in &network.edges {
            edge.set_mtu(mtu);
        }
        network.publish();
        let session_fits = async {
            loop {
                let oversized = || network.edges[0].oversized();
                let (mut client, mut server) = (connect(entrance).await, accept(&target).await);
                let (before, sent_before) = (oversized(), network.edges[0].sent());
                push(&mut client, &mut server, LEN).await;
                let packets = network.edges[0].sent() - sent_before;
                // Of another size are also those that are too small, and so too many.
                if oversized() == before && packets * u64::from(mtu) < LEN as u64 * 5 / 4 {
                    return (client, server);
                }
            }
        };
        running.push(within(session_fits).await);
    }
    assert_eq!(network.edges[0].sessions.count(), 2);
    for (mut client, mut server) in running {
        within(push(&mut client, &mut server, LEN)).await;
    }
}

#[tokio::test]
async fn a_reset_while_writes_are_blocked_arrives_without_waiting_for_what_was_never_sent() {
    const FLOWS: usize = 8;
    let (network, target, entrance) = Network::service().await;
    let mut flows = Vec::new();
    for _ in 0..FLOWS {
        flows.push((connect(entrance).await, accept(&target).await));
    }
    // More than the session's windows take.
    network.edges[1].cut();
    let sent_before = network.edges[0].sent();
    let chunk = vec![6; 256 << 10];
    for (client, _) in &mut flows {
        within(client.write_all(&chunk)).await.unwrap();
    }
    within(eventually(|| network.edges[0].sent() > sent_before + 30)).await;
    let mut servers = Vec::new();
    for (client, server) in flows {
        client.set_zero_linger().unwrap();
        drop(client);
        servers.push(server);
    }
    network.edges[1].mend();
    let mended = Stopwatch::start();
    for mut server in servers {
        let mut sink = Vec::new();
        let end = within(server.read_to_end(&mut sink)).await.unwrap_err();
        assert_eq!(end.kind(), io::ErrorKind::ConnectionReset);
    }
    // Whoever waits for bytes that never come takes longer.
    mended.assert_within(Duration::from_millis(1_900));
}

#[tokio::test]
async fn a_session_with_a_boot_that_is_gone_ends_as_soon_as_the_network_says_so() {
    let (mut network, target, entrance) = Network::service().await;
    let mut client = connect(entrance).await;
    let mut server = accept(&target).await;
    // Until it is answered, another session would be tried.
    server.write_all(b"x").await.unwrap();
    within(client.read_u8()).await.unwrap();
    network.edges[1].cut();
    // The next boot announces another handle.
    network.edges[1].handle = Handle(77);
    network.publish();
    // Well before the idle timeout of 45 s, and what follows the loss of all paths.
    let end = timeout(Duration::from_secs(10), client.read_u8()).await.unwrap().unwrap_err();
    assert_eq!(end.kind(), io::ErrorKind::ConnectionReset);
    let lost = || network.edges[0].counters.ended(Edge::Ingress, Outcome::SessionLost);
    within(eventually(|| lost() == 1 && network.edges[0].sessions.count() == 0)).await;
}

#[tokio::test]
async fn an_answer_is_delivered_to_a_slow_client_before_the_reset_after_it() {
    const LEN: usize = 200 << 10;
    let (network, target, entrance) = Network::service().await;
    let client = tokio::net::TcpSocket::new_v4().unwrap();
    client.set_recv_buffer_size(32 << 10).unwrap();
    let mut client = client.connect(entrance).await.unwrap();
    let mut server = accept(&target).await;
    server.write_all(&vec![7; LEN]).await.unwrap();
    // All of it is in the kernel of the ingress, and little of it has left.
    let received = || network.edges[0].counters.bytes_received.total();
    within(eventually(|| received() == LEN as u64)).await;
    server.set_zero_linger().unwrap();
    drop(server);
    sleep(Duration::from_millis(200)).await;
    let mut answer = Vec::new();
    let end = within(client.read_to_end(&mut answer)).await.unwrap_err();
    assert_eq!(end.kind(), io::ErrorKind::ConnectionReset);
    assert_eq!(answer.len(), LEN);
    let outcomes = || network.edges[0].counters.ended(Edge::Ingress, Outcome::FarReset);
    within(eventually(|| outcomes() == 1)).await;
}

#[tokio::test]
async fn a_narrowed_scope_resets_the_flows_it_excludes_and_no_others() {
    // The guest consumes, then provides.
    for (guest, provider) in [(0, 1), (1, 1)] {
        let mut network = Network::new(2);
        network.trust_as_guest(guest, &["kept", "lost"]);
        let targets = [listen_on_loopback(), listen_on_loopback()];
        let at = targets.each_ref().map(|target| target.local_addr().unwrap());
        let egress = network.edges[provider].egress.clone();
        egress.configure(vec![connector("kept", at[0]), connector("lost", at[1])]);
        egress.entries().wait_for(|entries| entries.len() == 2).await.unwrap();
        network.publish();
        let entrances = network.listen_all(0, &["kept", "lost"]).await;
        let (mut kept, mut lost) = (connect(entrances[0]).await, connect(entrances[1]).await);
        let mut server = accept(&targets[0]).await;
        let mut gone = accept(&targets[1]).await;
        network.trust_as_guest(guest, &["kept"]);
        for stream in [&mut lost, &mut gone] {
            let end = within(stream.read_u8()).await.unwrap_err();
            assert_eq!(end.kind(), io::ErrorKind::ConnectionReset);
        }
        within(push(&mut kept, &mut server, 1)).await;
    }
}

#[tokio::test]
async fn flows_wait_for_a_path_and_listeners_close_without_one() {
    let (mut network, target, entrance) = Network::service().await;
    let router = network.edges[1].local.router;
    let mut running = connect(entrance).await;
    let mut server = accept(&target).await;
    network.unreachable.insert(router);
    network.publish();
    // Within the two seconds for which the socket stays open.
    let waiting = connect(entrance).await;
    let open = |network: &Network| !network.edges[0].ingress.status()[0].ports[0].bound.is_empty();
    within(eventually(|| !open(&network))).await;
    network.unreachable.clear();
    network.publish();
    drop(within(accept(&target)).await);
    drop(waiting);
    within(eventually(|| open(&network))).await;
    running.write_all(b"x").await.unwrap();
    assert_eq!(within(server.read_u8()).await.unwrap(), b'x');
}

#[tokio::test]
async fn a_withdrawn_address_closes_its_listener_and_spares_running_flows() {
    let (mut network, target, entrance) = Network::service().await;
    let mut client = connect(entrance).await;
    let mut server = accept(&target).await;
    let mut config = connector("echo", target.local_addr().unwrap());
    config.draining = true;
    network.edges[1].egress.configure(vec![config.clone()]);
    network.publish();
    let closed = || network.edges[0].ingress.status()[0].ports[0].bound.is_empty();
    within(eventually(closed)).await;
    client.write_all(b"x").await.unwrap();
    assert_eq!(within(server.read_u8()).await.unwrap(), b'x');
    assert_eq!(network.edges[1].egress.status()[0].flows_active, 1);
    config.reset = true;
    network.edges[1].egress.configure(vec![config]);
    let end = within(client.read_u8()).await.unwrap_err();
    assert_eq!(end.kind(), io::ErrorKind::ConnectionReset);
}

#[tokio::test]
async fn an_egress_with_as_many_flows_as_it_may_have_costs_no_flow() {
    const FLOWS: usize = 4;
    let mut network = Network::new(3);
    let targets = [listen_on_loopback(), listen_on_loopback()];
    for (edge, target) in [1, 2].into_iter().zip(&targets) {
        network.expose(edge, "echo", target.local_addr().unwrap()).await;
    }
    let entrance = network.listen(0, "echo").await;
    // Of these one site gets three.
    network.edges[1].limit.set_flows_max(FLOWS);
    let mut served = [0, 0];
    let mut open = Vec::new();
    for _ in 0..4 * FLOWS {
        let client = connect(entrance).await;
        let accepted = async {
            tokio::select! {
                server = accept(&targets[0]) => (0, server),
                server = accept(&targets[1]) => (1, server),
            }
        };
        let (by, server) = within(accepted).await;
        served[by] += 1;
        open.push((client, server));
    }
    assert_eq!(served, [FLOWS - 1, 3 * FLOWS + 1]);
    assert!(network.edges[1].counters.ended(Edge::Egress, Outcome::Refused) > 0);
}

#[tokio::test]
async fn a_changed_connector_stays_advertised_and_keeps_its_flows() {
    let (network, target, entrance) = Network::service().await;
    let mut client = connect(entrance).await;
    let mut server = accept(&target).await;
    let egress = &network.edges[1].egress;
    let entries = egress.entries();
    let mut config = connector("echo", target.local_addr().unwrap());
    // A setting, then the targets: none of the new ones was ever asked.
    config.cost = 7;
    egress.configure(vec![config.clone()]);
    assert_eq!(entries.borrow()[0].cost, 7);
    config.targets = vec!["127.0.0.2".into(), "127.0.0.3".into()];
    egress.configure(vec![config.clone()]);
    assert_eq!(entries.borrow().len(), 1);
    assert_eq!(egress.status()[0].flows_active, 1);
    client.write_all(b"x").await.unwrap();
    assert_eq!(within(server.read_u8()).await.unwrap(), b'x');
    // The check of the new ones fails, and that counts; the flow goes on all the same.
    within(eventually(|| entries.borrow().is_empty())).await;
    client.write_all(b"y").await.unwrap();
    assert_eq!(within(server.read_u8()).await.unwrap(), b'y');
    // The end of the service is that of all its flows.
    (config.draining, config.reset) = (true, true);
    egress.configure(vec![config]);
    let end = within(client.read_u8()).await.unwrap_err();
    assert_eq!(end.kind(), io::ErrorKind::ConnectionReset);
}

#[tokio::test]
async fn a_taken_port_is_reported_with_its_holder_and_the_fallback_used() {
    let mut network = Network::new(1);
    let target = listen_on_loopback();
    network.expose(0, "echo", target.local_addr().unwrap()).await;
    // No other test takes a port here while it is free.
    let own = "127.0.0.4:0".parse().unwrap();
    let held = net::tcp_listen(own).unwrap();
    let mut config = listener("echo");
    config.host = own.ip().to_string();
    config.ports[0].local_port = held.local_addr().unwrap().port().into();
    let ingress = network.edges[0].ingress.clone();
    ingress.configure(vec![config.clone()]);
    let port = || ingress.status()[0].ports[0].clone();
    within(eventually(|| port().error.contains("is held by"))).await;

    let free = net::tcp_listen(own).unwrap();
    config.ports[0].fallback_port = free.local_addr().unwrap().port().into();
    drop(free);
    ingress.configure(vec![config]);
    within(eventually(|| !port().bound.is_empty())).await;
    assert!(port().fallback);
}

#[tokio::test]
async fn a_drain_lets_flows_end_and_resets_the_rest() {
    let (network, target, entrance) = Network::service().await;
    let mut client = connect(entrance).await;
    let server = accept(&target).await;
    let edge = &network.edges[0];
    let deadline = skein_router::clock::now() + Duration::from_millis(200);
    assert_eq!(within(edge.ingress.drain(deadline)).await, 1);
    let end = within(client.read_u8()).await.unwrap_err();
    assert_eq!(end.kind(), io::ErrorKind::ConnectionReset);
    drop(server);
    let deadline = skein_router::clock::now() + LIMIT;
    assert_eq!(within(network.edges[1].egress.drain(deadline)).await, 0);
    for edge in &network.edges {
        within(edge.sessions.close(deadline)).await;
    }
    assert_eq!(network.edges[0].sessions.count(), 0);
}
