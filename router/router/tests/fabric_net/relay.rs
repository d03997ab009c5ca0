//! A path between two routers that can be cut, and a NAT that can forget its mapping.

use super::PATIENCE;
use parking_lot::Mutex;
use skein_router::net;
use std::{
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
};
use tokio::{
    net::{TcpListener, UdpSocket},
    sync::Notify,
    task::JoinSet,
    time::{self, Duration, Instant},
};

/// Passes datagrams to `target` and back, for one client at a time per mapping.
pub(crate) struct Relay {
    pub(crate) addr: SocketAddr,
    state: Arc<State>,
    _tasks: JoinSet<()>,
}

struct State {
    front: UdpSocket,
    target: SocketAddr,
    cut: AtomicBool,
    heals_with_tcp: AtomicBool,
    /// What a client's address may send and get, from its first datagram on.
    lifetime: Mutex<Option<Duration>>,
    /// It may get more.
    answers_pass: AtomicBool,
    /// Longer datagrams are lost.
    len_max: AtomicUsize,
    back: Mutex<Arc<UdpSocket>>,
    /// And since when.
    client: Mutex<Option<(SocketAddr, Instant)>>,
    rebound: Notify,
    tcp_reset: Notify,
}

fn any() -> SocketAddr {
    "127.0.0.1:0".parse().unwrap()
}

impl Relay {
    /// For UDP alone.
    pub(crate) fn new(target: SocketAddr) -> Self {
        Self::over(net::udp_bind(any()).unwrap(), target)
    }

    /// For TCP as well, which passes whatever happens to UDP.
    pub(crate) fn with_tcp(target: SocketAddr) -> Self {
        Self::to_both(target, target)
    }

    /// UDP leads to the one, TCP to the other.
    pub(crate) fn to_both(udp_target: SocketAddr, tcp_target: SocketAddr) -> Self {
        let (udp, tcp) = net::port_pair(any()).unwrap();
        let mut relay = Self::over(udp, udp_target);
        relay._tasks.spawn(pass_tcp(Arc::clone(&relay.state), tcp, tcp_target));
        relay
    }

    fn over(front: UdpSocket, target: SocketAddr) -> Self {
        let addr = front.local_addr().unwrap();
        let state = Arc::new(State {
            front,
            target,
            cut: AtomicBool::new(false),
            heals_with_tcp: AtomicBool::new(false),
            lifetime: Mutex::default(),
            answers_pass: AtomicBool::new(false),
            len_max: AtomicUsize::new(usize::MAX),
            back: Mutex::new(Arc::new(net::udp_bind(any()).unwrap())),
            client: Mutex::default(),
            rebound: Notify::new(),
            tcp_reset: Notify::new(),
        });
        let mut tasks = JoinSet::new();
        tasks.spawn(forward(Arc::clone(&state)));
        tasks.spawn(backward(Arc::clone(&state)));
        Self { addr, state, _tasks: tasks }
    }

    /// Loses everything from now on, or nothing.
    pub(crate) fn cut(&self, cut: bool) {
        self.state.cut.store(cut, Ordering::Relaxed);
    }

    /// Loses everything until the next TCP connection comes.
    pub(crate) fn cut_until_tcp(&self) {
        self.state.heals_with_tcp.store(true, Ordering::Relaxed);
        self.cut(true);
    }

    /// From now on loses what a client sends and gets when it has done so for this long, until it comes from another address: as a firewall
    /// does that takes against a flow once it has looked into it.
    pub(crate) fn kill_after(&self, lifetime: Duration) {
        *self.state.lifetime.lock() = Some(lifetime);
    }

    /// The same for what a client sends alone.
    pub(crate) fn kill_sent_after(&self, lifetime: Duration) {
        self.state.answers_pass.store(true, Ordering::Relaxed);
        self.kill_after(lifetime);
    }

    /// Ends every TCP connection there is.
    pub(crate) fn reset_tcp(&self) {
        self.state.tcp_reset.notify_waiters();
    }

    /// Loses what is longer.
    pub(crate) fn set_len_max(&self, len_max: usize) {
        self.state.len_max.store(len_max, Ordering::Relaxed);
    }

    /// Gives the client another address towards the target, as a NAT does that has lost its state.
    pub(crate) fn rebind(&self) -> SocketAddr {
        let back = Arc::new(net::udp_bind(any()).unwrap());
        let addr = back.local_addr().unwrap();
        *self.state.back.lock() = back;
        self.state.rebound.notify_one();
        addr
    }
}

impl State {
    fn passes(&self, len: usize) -> bool {
        !self.cut.load(Ordering::Relaxed) && len <= self.len_max.load(Ordering::Relaxed)
    }

    fn lives(&self, since: Instant) -> bool {
        self.lifetime.lock().is_none_or(|lifetime| since.elapsed() <= lifetime)
    }
}

async fn pass_tcp(state: Arc<State>, listener: TcpListener, target: SocketAddr) {
    let mut connections = JoinSet::new();
    loop {
        let (mut client, _) = listener.accept().await.unwrap();
        if state.heals_with_tcp.swap(false, Ordering::Relaxed) {
            state.cut.store(false, Ordering::Relaxed);
        }
        let state = Arc::clone(&state);
        connections.spawn(async move {
            let mut server = net::tcp_connect(target, None).await.unwrap();
            for stream in [&client, &server] {
                stream.set_nodelay(true).unwrap();
            }
            tokio::select! {
                // Either end may go away at any time.
                ended = tokio::io::copy_bidirectional(&mut client, &mut server) => drop(ended),
                () = state.tcp_reset.notified() => {}
            }
        });
    }
}

async fn forward(state: Arc<State>) {
    let mut buffer = vec![0; 65_536];
    loop {
        let Ok((n, from)) = state.front.recv_from(&mut buffer).await else { continue };
        let since = {
            let mut client = state.client.lock();
            let (_, since) =
                client.take_if(|(addr, _)| *addr == from).unwrap_or_else(|| (from, Instant::now()));
            *client = Some((from, since));
            since
        };
        let back = Arc::clone(&state.back.lock());
        if state.passes(n) && state.lives(since) {
            time::timeout(PATIENCE, back.send_to(&buffer[..n], state.target))
                .await
                .unwrap()
                .unwrap();
        }
    }
}

async fn backward(state: Arc<State>) {
    let mut buffer = vec![0; 65_536];
    loop {
        let back = Arc::clone(&state.back.lock());
        let n = tokio::select! {
            received = back.recv_from(&mut buffer) => received.map_or(0, |(n, _)| n),
            () = state.rebound.notified() => continue,
        };
        let client = *state.client.lock();
        if let Some((client, since)) = client
            && state.passes(n)
            && (state.lives(since) || state.answers_pass.load(Ordering::Relaxed))
        {
            state.front.send_to(&buffer[..n], client).await.unwrap();
        }
    }
}
