//! The only maker of sockets: nothing else in the crate names a constructor of one.

mod service;

pub(crate) use service::{Conversation, ServiceSocket, TargetSocket};

use crate::clock;
use nix::sys::socket::{setsockopt, sockopt};
use quinn::udp::{RecvMeta, Transmit, UdpSocketState};
use rustix::event::{self, PollFd, PollFlags, Timespec};
use skein_core::share_out_files;
use socket2::{Domain, Protocol, SockRef, Socket, TcpKeepalive, Type};
use std::{
    io::{self, IoSliceMut},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, Shutdown, SocketAddr, ToSocketAddrs as _},
    path::Path,
    time::{Duration, Instant},
};
use tokio::{io::Interest, net::TcpSocket};

pub use tokio::net::{TcpListener, TcpStream, UdpSocket, UnixStream};

/// Asked for in each direction: at 1 Gbit/s it covers 32 ms in which the process does not run.
const UDP_BUFFER_BYTES: usize = 4 << 20;
/// Connections the kernel completes before we accept; more than one poll's worth of a burst.
const TCP_BACKLOG: i32 = 1024;
/// How many ephemeral ports are tried until one is free for UDP and TCP alike.
const PAIR_ATTEMPTS: usize = 16;
/// What a flow's socket takes beyond what is on its way. Without a bound the kernel buffers megabytes for a reader that has stalled,
/// unseen by the router's budget; a bound of the whole send buffer would instead limit what can be on its way.
const UNSENT_BYTES_MAX: u32 = 256 << 10;
/// What a carrier's socket takes beyond what is on its way: a TLS record.
const CARRIER_UNSENT_BYTES_MAX: u32 = 16 << 10;
/// A carrier whose data is not acknowledged for so long is dead; its link has noticed before.
const CARRIER_TIMEOUT: Duration = Duration::from_secs(20);
/// First keepalive probe on an otherwise silent TCP connection.
const KEEPALIVE_IDLE: Duration = Duration::from_secs(60);
/// Between keepalive probes.
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(10);
/// Unanswered keepalive probes until the kernel resets the connection.
const KEEPALIVE_RETRIES: u32 = 5;

/// Binds a UDP socket with large buffers; `[::]` is dual-stack, and becomes `0.0.0.0` where IPv6 is off.
///
/// # Errors
/// Whatever the operating system says of the address.
pub fn udp_bind(addr: SocketAddr) -> io::Result<UdpSocket> {
    or_v4(addr, |addr| {
        let socket = Socket::new(Domain::for_address(addr), Type::DGRAM, Some(Protocol::UDP))?;
        if addr.is_ipv6() {
            socket.set_only_v6(!addr.ip().is_unspecified())?;
        }
        enlarge(&socket);
        socket.set_nonblocking(true)?;
        socket.bind(&addr.into())?;
        UdpSocket::from_std(socket.into())
    })
}

/// Makes an unconnected ephemeral UDP socket that can reach `remote`.
///
/// Unconnected, so that the kernel picks the source address anew for each packet when the network changes.
///
/// # Errors
/// Whatever the operating system says; usually that it has no IPv6.
pub fn udp_towards(remote: SocketAddr) -> io::Result<UdpSocket> {
    let any: IpAddr =
        if remote.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
    udp_bind(SocketAddr::new(any, 0))
}

/// Listens for TCP; `[::]` is dual-stack, and becomes `0.0.0.0` where IPv6 is off.
///
/// # Errors
/// Whatever the operating system says of the address.
pub fn tcp_listen(addr: SocketAddr) -> io::Result<TcpListener> {
    or_v4(addr, |addr| {
        let socket = Socket::new(Domain::for_address(addr), Type::STREAM, Some(Protocol::TCP))?;
        if addr.is_ipv6() {
            socket.set_only_v6(!addr.ip().is_unspecified())?;
        }
        socket.set_reuse_address(true)?;
        socket.set_nonblocking(true)?;
        socket.bind(&addr.into())?;
        socket.listen(TCP_BACKLOG)?;
        TcpListener::from_std(socket.into())
    })
}

/// Binds UDP and TCP to the same port; port 0 takes one that is free for both.
///
/// # Errors
/// Whatever the operating system says of the address.
pub fn port_pair(addr: SocketAddr) -> io::Result<(UdpSocket, TcpListener)> {
    for _ in 1..PAIR_ATTEMPTS {
        match try_port_pair(addr) {
            Err(e) if e.kind() == io::ErrorKind::AddrInUse && addr.port() == 0 => {}
            outcome => return outcome,
        }
    }
    try_port_pair(addr)
}

fn try_port_pair(addr: SocketAddr) -> io::Result<(UdpSocket, TcpListener)> {
    let udp = udp_bind(addr)?;
    let tcp = tcp_listen(udp.local_addr()?)?;
    Ok((udp, tcp))
}

/// Opens a TCP connection, from `source` when given.
///
/// # Errors
/// Whatever the operating system or the remote says.
///
/// # Cancel safety
/// Dropping the future closes the socket.
pub async fn tcp_connect(remote: SocketAddr, source: Option<IpAddr>) -> io::Result<TcpStream> {
    let socket = if remote.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() }?;
    if let Some(source) = source {
        // The port is chosen with the remote known, so that one source has its 28,000 towards every target and not once for all of them.
        setsockopt(&socket, sockopt::IpBindAddressNoPort, &true)?;
        socket.bind(SocketAddr::new(source, 0))?;
    }
    socket.connect(remote).await
}

/// Connects to a Unix socket of this host: a controller's.
///
/// # Errors
/// Whatever the operating system says; usually that nobody listens.
///
/// # Cancel safety
/// Dropping the future closes the socket.
pub async fn connect_unix(path: &Path) -> io::Result<UnixStream> {
    UnixStream::connect(path).await
}

/// What every TCP socket that carries a flow gets: no Nagle delay, keepalive, little unsent data in the kernel.
///
/// # Errors
/// Only when the socket is already dead.
pub fn tcp_flow_options(stream: &TcpStream) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let keepalive = TcpKeepalive::new()
        .with_time(KEEPALIVE_IDLE)
        .with_interval(KEEPALIVE_INTERVAL)
        .with_retries(KEEPALIVE_RETRIES);
    let socket = SockRef::from(stream);
    socket.set_tcp_notsent_lowat(UNSENT_BYTES_MAX)?;
    socket.set_tcp_keepalive(&keepalive)
}

/// What a TCP socket gets that carries a link: no Nagle delay, hardly any unsent data in the kernel, which would only wait there,
/// and an end when nothing gets through.
///
/// # Errors
/// Only when the socket is already dead.
pub fn tcp_carrier_options(stream: &TcpStream) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let socket = SockRef::from(stream);
    socket.set_tcp_notsent_lowat(CARRIER_UNSENT_BYTES_MAX)?;
    socket.set_tcp_user_timeout(Some(CARRIER_TIMEOUT))
}

/// Acknowledges what has arrived at once, instead of waiting for something to send along with it.
pub fn tcp_acknowledge(stream: &TcpStream) {
    // Fails on a socket that is dead, of which whoever reads it hears next.
    let _ = SockRef::from(stream).set_tcp_quickack(true);
}

/// Prepares a TCP socket for [`tcp_is_sent`]; it will hardly be written to any more.
///
/// # Errors
/// Only when the socket is already dead.
pub fn tcp_await_sent(stream: &TcpStream) -> io::Result<()> {
    SockRef::from(stream).set_tcp_notsent_lowat(1)
}

/// Whether everything written has left, so that a reset comes after it; also where nothing can leave any more.
///
/// What has left and not been acknowledged yet does not count, since the reset follows it on the same way.
#[must_use]
pub fn tcp_is_sent(stream: &TcpStream) -> bool {
    let mut asked = [PollFd::new(stream, PollFlags::OUT)];
    // "Writable" is a question of how much is unsent, as set above; an error is reported as an event as well.
    event::poll(&mut asked, Some(&Timespec::default())).map_or(true, |ready| ready > 0)
}

/// Resolves `host:port` to all its addresses.
///
/// # Errors
/// When the name does not resolve or the text is not `host:port`.
///
/// # Cancel safety
/// Cancel-safe; a resolver thread may run on for a while.
pub async fn resolve(endpoint: &str) -> io::Result<Vec<SocketAddr>> {
    Ok(tokio::net::lookup_host(endpoint).await?.collect())
}

/// Resolves `host:port` to all its addresses, and tells when that was known: whoever asked may look much later.
///
/// # Cancel safety
/// Cancel-safe; a resolver thread may run on for a while.
pub async fn look_up(endpoint: String) -> (Instant, io::Result<Vec<SocketAddr>>) {
    let resolve = move || {
        let resolved = endpoint.to_socket_addrs().map(Iterator::collect);
        (clock::now(), resolved)
    };
    let resolved = tokio::task::spawn_blocking(resolve).await;
    resolved.unwrap_or_else(|ended| (clock::now(), Err(io::Error::other(ended))))
}

/// Ends the stream in our direction; the peer reads on to the end.
///
/// # Errors
/// Only when the connection is already over.
pub fn tcp_finish(stream: &TcpStream) -> io::Result<()> {
    SockRef::from(stream).shutdown(Shutdown::Write)
}

/// A UDP socket that takes and gives datagrams in batches, with ECN and the address they came to.
#[derive(Debug)]
pub(crate) struct BatchSocket {
    socket: UdpSocket,
    state: UdpSocketState,
}

impl BatchSocket {
    /// Takes over a socket.
    ///
    /// # Errors
    /// When the operating system refuses an option it must have.
    pub(crate) fn new(socket: UdpSocket) -> io::Result<Self> {
        let state = UdpSocketState::new((&socket).into())?;
        Ok(Self { socket, state })
    }

    /// Waits until there may be something to receive.
    ///
    /// # Errors
    /// Only when the runtime shuts down.
    ///
    /// # Cancel safety
    /// Cancel-safe.
    pub(crate) async fn readable(&self) -> io::Result<()> {
        self.socket.readable().await
    }

    /// Waits until there may be room to send.
    ///
    /// # Errors
    /// Only when the runtime shuts down.
    ///
    /// # Cancel safety
    /// Cancel-safe.
    pub(crate) async fn writable(&self) -> io::Result<()> {
        self.socket.writable().await
    }

    /// Fills buffers and returns how many; `WouldBlock` when there is nothing.
    pub(crate) fn recv(
        &self,
        buffers: &mut [IoSliceMut<'_>],
        metas: &mut [RecvMeta],
    ) -> io::Result<usize> {
        self.socket
            .try_io(Interest::READABLE, || self.state.recv((&self.socket).into(), buffers, metas))
    }

    /// Sends; `WouldBlock` when there is no room.
    pub(crate) fn try_send(&self, transmit: &Transmit<'_>) -> io::Result<()> {
        self.socket.try_io(Interest::WRITABLE, || self.state.send((&self.socket).into(), transmit))
    }

    pub(crate) fn local_addr(&self) -> io::Result<SocketAddr> {
        self.socket.local_addr()
    }

    pub(crate) fn segments_max(&self) -> usize {
        self.state.max_gso_segments()
    }

    pub(crate) fn may_fragment(&self) -> bool {
        self.state.may_fragment()
    }
}

/// Descriptors that flows may take, of those that this process may have.
#[must_use]
pub fn flow_descriptors_max() -> usize {
    use rustix::process::{Resource, getrlimit};
    share_out_files(getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX)).flows
}

/// Whether this process or host lacked descriptors or memory, and will until some are free.
#[must_use]
pub fn is_exhaustion(error: &io::Error) -> bool {
    use rustix::io::Errno;
    let exhausted = [Errno::MFILE, Errno::NFILE, Errno::NOMEM, Errno::NOBUFS];
    exhausted.iter().any(|errno| error.raw_os_error() == Some(errno.raw_os_error()))
}

/// Whether a connect found no free local port.
#[must_use]
pub fn is_out_of_ports(error: &io::Error) -> bool {
    // The latter when the source address was given.
    matches!(error.kind(), io::ErrorKind::AddrNotAvailable | io::ErrorKind::AddrInUse)
}

fn or_v4<T>(addr: SocketAddr, bind: impl Fn(SocketAddr) -> io::Result<T>) -> io::Result<T> {
    match bind(addr) {
        Err(e) if addr.ip() == IpAddr::V6(Ipv6Addr::UNSPECIFIED) && is_without_ipv6(&e) => {
            bind(SocketAddr::new(Ipv4Addr::UNSPECIFIED.into(), addr.port()))
        }
        outcome => outcome,
    }
}

fn is_without_ipv6(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::AddrNotAvailable
        || error.raw_os_error() == Some(rustix::io::Errno::AFNOSUPPORT.raw_os_error())
}

/// The kernel grants at most `net.core.{r,w}mem_max`; `doctor` tells when that is little.
fn enlarge(socket: &Socket) {
    for outcome in [
        socket.set_recv_buffer_size(UDP_BUFFER_BYTES),
        socket.set_send_buffer_size(UDP_BUFFER_BYTES),
    ] {
        if let Err(error) = outcome {
            tracing::debug!(%error, "UDP socket keeps its default buffer");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_pair_has_one_port() {
        let (udp, tcp) = port_pair("127.0.0.1:0".parse().unwrap()).unwrap();
        assert_eq!(udp.local_addr().unwrap(), tcp.local_addr().unwrap());
        let taken = port_pair(udp.local_addr().unwrap()).unwrap_err();
        assert_eq!(taken.kind(), io::ErrorKind::AddrInUse);
    }

    #[tokio::test]
    async fn tcp_connects_from_the_given_source() {
        let listener = tcp_listen("127.0.0.1:0".parse().unwrap()).unwrap();
        let source: IpAddr = "127.0.0.9".parse().unwrap();
        let client = tcp_connect(listener.local_addr().unwrap(), Some(source)).await.unwrap();
        tcp_flow_options(&client).unwrap();
        let (_, peer) = listener.accept().await.unwrap();
        assert_eq!(peer.ip(), source);
        let late = nix::sys::socket::getsockopt(&client, sockopt::IpBindAddressNoPort).unwrap();
        assert!(late, "a port of its own for every target");
    }
}
