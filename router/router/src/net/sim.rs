//! The only maker of sockets, in simulation: the same functions, on the network of the simulated host whose process runs now.

use crate::clock;
use quinn::udp::{EcnCodepoint, RecvMeta, Transmit};
use skein_netsim::Host;
use std::{
    io::{self, IoSliceMut},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    path::Path,
    time::{Duration, Instant},
};

pub use skein_netsim::{TcpListener, TcpStream, UdpSocket, UnixStream};

/// A carrier whose data is not acknowledged for so long is dead; its link has noticed before.
const CARRIER_TIMEOUT: Duration = Duration::from_secs(20);
/// As many as the kernel takes at once.
const SEGMENTS_MAX: usize = 64;
/// More than any simulated host has.
const FLOW_DESCRIPTORS_MAX: usize = 100_000;

fn host() -> Host {
    skein_netsim::current().expect("invariant: sockets are made by simulated processes only")
}

/// Binds a UDP socket.
///
/// # Errors
/// The address is taken or another host's.
pub fn udp_bind(addr: SocketAddr) -> io::Result<UdpSocket> {
    UdpSocket::bind(&host(), addr)
}

/// Makes an unconnected ephemeral UDP socket that can reach `remote`.
///
/// # Errors
/// None.
pub fn udp_towards(remote: SocketAddr) -> io::Result<UdpSocket> {
    let any: IpAddr =
        if remote.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
    udp_bind(SocketAddr::new(any, 0))
}

/// Listens for TCP.
///
/// # Errors
/// The address is taken or another host's.
pub fn tcp_listen(addr: SocketAddr) -> io::Result<TcpListener> {
    TcpListener::bind(&host(), addr)
}

/// Binds UDP and TCP to the same port; port 0 takes one that is free for both.
///
/// # Errors
/// The address is taken or another host's.
pub fn port_pair(addr: SocketAddr) -> io::Result<(UdpSocket, TcpListener)> {
    let udp = udp_bind(addr)?;
    let tcp = tcp_listen(udp.local_addr()?)?;
    Ok((udp, tcp))
}

/// Opens a TCP connection, from `source` when given.
///
/// # Errors
/// Refused, unreachable or not answered.
///
/// # Cancel safety
/// Dropping the future closes the socket.
pub async fn tcp_connect(remote: SocketAddr, source: Option<IpAddr>) -> io::Result<TcpStream> {
    TcpStream::connect(&host(), remote, source).await
}

/// Connects to a Unix socket of this host: a controller's.
///
/// # Errors
/// Nobody listens.
///
/// # Cancel safety
/// Dropping the future closes the socket.
pub async fn connect_unix(path: &Path) -> io::Result<UnixStream> {
    UnixStream::connect(&host(), path).await
}

/// What every TCP socket that carries a flow gets: nothing here, flows are local to a host.
///
/// # Errors
/// None.
#[allow(clippy::unnecessary_wraps, reason = "the operating system's fails")]
pub fn tcp_flow_options(_stream: &TcpStream) -> io::Result<()> {
    Ok(())
}

/// What a TCP socket gets that carries a link: an end when nothing gets through.
///
/// # Errors
/// None.
#[allow(clippy::unnecessary_wraps, reason = "the operating system's fails")]
pub fn tcp_carrier_options(stream: &TcpStream) -> io::Result<()> {
    stream.set_timeout_us(u64::try_from(CARRIER_TIMEOUT.as_micros()).unwrap_or(u64::MAX));
    Ok(())
}

/// Acknowledges what has arrived at once, as simulated kernels always do.
pub fn tcp_acknowledge(_stream: &TcpStream) {}

/// Prepares a TCP socket for [`tcp_is_sent`].
///
/// # Errors
/// None.
#[allow(clippy::unnecessary_wraps, reason = "the operating system's fails")]
pub fn tcp_await_sent(_stream: &TcpStream) -> io::Result<()> {
    Ok(())
}

/// Whether everything written has left.
#[must_use]
pub fn tcp_is_sent(stream: &TcpStream) -> bool {
    stream.unsent() == 0
}

/// Ends the stream in our direction; the peer reads on to the end.
///
/// # Errors
/// Only when the connection is already over.
pub fn tcp_finish(stream: &TcpStream) -> io::Result<()> {
    stream.finish()
}

/// Who sent a datagram, and which of our addresses it was sent to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Conversation {
    pub(crate) client: SocketAddr,
    pub(crate) local: IpAddr,
}

/// A datagram, in the buffer it was received into.
#[derive(Debug)]
pub(crate) struct Arrival {
    pub(crate) len: usize,
    pub(crate) with: Conversation,
    /// So many were dropped before it since the last one.
    pub(crate) dropped: u64,
}

/// The socket of a listener's UDP port.
#[derive(Debug)]
pub(crate) struct ServiceSocket(UdpSocket);

impl ServiceSocket {
    /// Binds.
    ///
    /// # Errors
    /// The address is taken or another host's.
    pub(crate) fn bind(addr: SocketAddr) -> io::Result<Self> {
        udp_bind(addr).map(Self)
    }

    pub(crate) fn local_addr(&self) -> io::Result<SocketAddr> {
        self.0.local_addr()
    }

    /// Waits until there is something to receive.
    ///
    /// # Errors
    /// The process was killed.
    ///
    /// # Cancel safety
    /// Cancel-safe.
    pub(crate) async fn readable(&self) -> io::Result<()> {
        self.0.readable().await
    }

    /// Receives one datagram into `buffer`.
    ///
    /// # Errors
    /// `WouldBlock` when there is none.
    pub(crate) fn try_recv(&self, buffer: &mut [u8]) -> io::Result<Arrival> {
        try_recv(&self.0, buffer)
    }

    /// Answers a client from the address it has sent to.
    ///
    /// # Errors
    /// The datagram is longer than UDP allows.
    pub(crate) fn try_send(&self, payload: &[u8], with: &Conversation) -> io::Result<()> {
        self.0.try_send_to(payload, with.client, Some(with.local), None)
    }
}

/// A socket towards a target, for one association.
#[derive(Debug)]
pub(crate) struct TargetSocket(UdpSocket);

impl TargetSocket {
    /// A socket that talks to `remote` alone, from `source` when given.
    ///
    /// # Errors
    /// The source is no address of the host.
    pub(crate) fn connect(remote: SocketAddr, source: Option<IpAddr>) -> io::Result<Self> {
        UdpSocket::connect(&host(), remote, source).map(Self)
    }

    /// Waits until there is something to receive, or an error to take.
    ///
    /// # Errors
    /// The process was killed.
    ///
    /// # Cancel safety
    /// Cancel-safe.
    pub(crate) async fn ready(&self) -> io::Result<()> {
        self.0.readable().await
    }

    /// Receives one datagram into `buffer`.
    ///
    /// # Errors
    /// `WouldBlock` when there is none.
    pub(crate) fn try_recv(&self, buffer: &mut [u8]) -> io::Result<Arrival> {
        try_recv(&self.0, buffer)
    }

    /// Sends a datagram.
    ///
    /// # Errors
    /// The datagram is longer than UDP allows.
    pub(crate) fn try_send(&self, payload: &[u8]) -> io::Result<()> {
        self.0.try_send(payload)
    }

    /// What the network said of datagrams that were sent, once.
    pub(crate) fn take_error(&self) -> Option<io::Error> {
        self.0.take_error()
    }
}

fn try_recv(socket: &UdpSocket, buffer: &mut [u8]) -> io::Result<Arrival> {
    let received = socket.try_receive(buffer)?;
    let with = Conversation { client: received.from, local: received.to };
    Ok(Arrival { len: received.len, with, dropped: 0 })
}

/// A UDP socket that takes and gives datagrams in batches, with ECN and the address they came to.
#[derive(Debug)]
pub(crate) struct BatchSocket(UdpSocket);

impl BatchSocket {
    /// Takes over a socket.
    ///
    /// # Errors
    /// None.
    #[allow(clippy::unnecessary_wraps, reason = "the operating system's fails")]
    pub(crate) fn new(socket: UdpSocket) -> io::Result<Self> {
        Ok(Self(socket))
    }

    /// Waits until there is something to receive.
    ///
    /// # Errors
    /// The process was killed.
    ///
    /// # Cancel safety
    /// Cancel-safe.
    pub(crate) async fn readable(&self) -> io::Result<()> {
        self.0.readable().await
    }

    /// There is always room to send.
    ///
    /// # Errors
    /// None.
    ///
    /// # Cancel safety
    /// Cancel-safe.
    pub(crate) async fn writable(&self) -> io::Result<()> {
        tokio::task::yield_now().await;
        Ok(())
    }

    /// Fills buffers and returns how many; `WouldBlock` when there is nothing.
    pub(crate) fn recv(
        &self,
        buffers: &mut [IoSliceMut<'_>],
        metas: &mut [RecvMeta],
    ) -> io::Result<usize> {
        let mut filled = 0;
        for (buffer, meta) in buffers.iter_mut().zip(metas) {
            let received = match self.0.try_receive(buffer) {
                Err(_) if filled > 0 => break,
                outcome => outcome?,
            };
            *meta = RecvMeta {
                addr: received.from,
                len: received.len,
                stride: received.len,
                ecn: received.ecn.and_then(EcnCodepoint::from_bits),
                dst_ip: Some(received.to),
            };
            filled += 1;
        }
        Ok(filled)
    }

    /// Sends.
    pub(crate) fn try_send(&self, transmit: &Transmit<'_>) -> io::Result<()> {
        let len = transmit.segment_size.unwrap_or(transmit.contents.len()).max(1);
        let ecn = transmit.ecn.map(|ecn| ecn as u8);
        for datagram in transmit.contents.chunks(len) {
            self.0.try_send_to(datagram, transmit.destination, transmit.src_ip, ecn)?;
        }
        Ok(())
    }

    pub(crate) fn local_addr(&self) -> io::Result<SocketAddr> {
        self.0.local_addr()
    }

    #[allow(clippy::unused_self, reason = "the operating system's asks the socket")]
    pub(crate) fn segments_max(&self) -> usize {
        SEGMENTS_MAX
    }

    #[allow(clippy::unused_self, reason = "the operating system's asks the socket")]
    pub(crate) fn may_fragment(&self) -> bool {
        false
    }
}

/// Resolves `host:port` as this host's resolver does.
///
/// # Errors
/// When the name does not resolve or the text is not `host:port`.
#[allow(clippy::unused_async, reason = "a real resolver takes its time")]
pub async fn resolve(endpoint: &str) -> io::Result<Vec<SocketAddr>> {
    host().resolve(endpoint)
}

/// Resolves `host:port` as this host's resolver does, and tells when that was known.
///
/// # Cancel safety
/// Cancel-safe.
#[allow(clippy::unused_async, reason = "a real resolver takes its time")]
pub async fn look_up(endpoint: String) -> (Instant, io::Result<Vec<SocketAddr>>) {
    (clock::now(), host().resolve(&endpoint))
}

/// Descriptors that flows may take.
#[must_use]
pub fn flow_descriptors_max() -> usize {
    FLOW_DESCRIPTORS_MAX
}

/// Whether this process or host lacked descriptors or memory: never.
#[must_use]
pub fn is_exhaustion(_error: &io::Error) -> bool {
    false
}

/// Whether a connect found no free local port.
#[must_use]
pub fn is_out_of_ports(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::AddrNotAvailable | io::ErrorKind::AddrInUse)
}
