//! Simulated UDP.

use crate::{
    net::Host,
    world::{ANY, Event, HostId, Owner, World},
};
use std::{
    collections::VecDeque,
    future::poll_fn,
    io,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    task::{Context, Poll, Waker},
};

/// What a socket holds for a reader that does not read; as much as the router asks the kernel for.
const BUFFER_BYTES: usize = 4 << 20;

#[derive(Clone, Debug)]
pub(crate) struct Datagram {
    pub(crate) from: SocketAddr,
    pub(crate) to: SocketAddr,
    pub(crate) ecn: Option<u8>,
    pub(crate) bytes: Box<[u8]>,
}

#[derive(Debug)]
pub(crate) struct UdpState {
    pub(crate) host: HostId,
    pub(crate) owner: Owner,
    pub(crate) local: SocketAddr,
    /// The only one it talks to, if it is connected.
    pub(crate) peer: Option<SocketAddr>,
    /// What was sent last came back: nobody is there.
    is_refused: bool,
    queue: VecDeque<Datagram>,
    queued_bytes: usize,
    readers: Vec<Waker>,
}

impl World {
    fn udp_bind(&mut self, host: HostId, owner: Owner, addr: SocketAddr) -> io::Result<u64> {
        let ip = any_is_v4(addr.ip());
        if !self.owns(host, ip) {
            return Err(io::ErrorKind::AddrNotAvailable.into());
        }
        let port = if addr.port() == 0 { self.ephemeral(host) } else { addr.port() };
        if is_taken(self.hosts[host].udp.keys(), port, ip) {
            return Err(io::ErrorKind::AddrInUse.into());
        }
        let id = self.id();
        self.hosts[host].udp.insert((port, ip), id);
        self.udp.insert(
            id,
            UdpState {
                host,
                owner,
                local: SocketAddr::new(ip, port),
                peer: None,
                is_refused: false,
                queue: VecDeque::new(),
                queued_bytes: 0,
                readers: Vec::new(),
            },
        );
        Ok(id)
    }

    pub(crate) fn udp_close(&mut self, id: u64) {
        if let Some(mut socket) = self.udp.remove(&id) {
            self.hosts[socket.host].udp.remove(&(socket.local.port(), socket.local.ip()));
            self.wake(&mut socket.readers);
        }
    }

    fn udp_send(&mut self, id: u64, mut datagram: Datagram) {
        let Some(socket) = self.udp.get(&id) else { return };
        let (host, local) = (socket.host, socket.local);
        let to = datagram.to;
        let bound =
            if datagram.from.ip().is_unspecified() { local.ip() } else { datagram.from.ip() };
        datagram.from = SocketAddr::new(self.source_ip(host, bound, to.ip()), local.port());
        let Some(target) = self.host_at(host, to.ip()) else { return };
        if target == host {
            self.schedule(self.now_us, Event::Datagram { host, datagram });
            return;
        }
        let now_us = self.now_us;
        if let Some(nat) = &mut self.hosts[host].nat {
            datagram.from = nat.outward(now_us, local.port(), to);
        }
        self.datagrams_sent += 1;
        self.note(1, datagram.from, to, datagram.bytes.len());
        self.trace.note_bytes(&datagram.bytes);
        if let Some(watcher) = &self.watched.0 {
            watcher(now_us, self.hosts[host].ip, self.hosts[target].ip, &datagram.bytes);
        }
        let (path, rng) = self.path_and_rng(host, target);
        for due_us in path.datagram(now_us, datagram.bytes.len(), rng) {
            let datagram = datagram.clone();
            self.schedule(due_us, Event::Datagram { host: target, datagram });
        }
    }

    pub(crate) fn datagram_arrives(&mut self, host: HostId, mut datagram: Datagram) {
        let (now_us, state) = (self.now_us, &self.hosts[host]);
        if !state.is_up {
            return;
        }
        if let Some(nat) = state.nat.as_ref().filter(|nat| nat.public == datagram.to.ip()) {
            let Some(port) = nat.inward(now_us, datagram.to.port(), datagram.from) else { return };
            datagram.to = SocketAddr::new(state.ip, port);
        }
        let exact = (datagram.to.port(), datagram.to.ip());
        let any = (datagram.to.port(), ANY);
        let Some(id) = state.udp.get(&exact).or_else(|| state.udp.get(&any)).copied() else {
            return self.refuse(host, datagram.from, datagram.to);
        };
        self.note(2, datagram.from, datagram.to, datagram.bytes.len());
        self.datagrams_arrived += 1;
        let Some(socket) = self.udp.get_mut(&id) else { return };
        if socket.peer.is_some_and(|peer| peer != datagram.from) {
            return;
        }
        if socket.queued_bytes + datagram.bytes.len() > BUFFER_BYTES {
            return;
        }
        socket.queued_bytes += datagram.bytes.len();
        socket.queue.push_back(datagram);
        let mut readers = std::mem::take(&mut socket.readers);
        self.wake(&mut readers);
    }
}

impl World {
    /// Tells a connected socket of this host that nobody is there; over the network such news does not travel.
    fn refuse(&mut self, host: HostId, from: SocketAddr, to: SocketAddr) {
        let sender = |socket: &&mut UdpState| {
            let is_from = socket.host == host && socket.local.port() == from.port();
            is_from && socket.peer == Some(to)
        };
        let Some(socket) = self.udp.values_mut().find(sender) else { return };
        socket.is_refused = true;
        let mut readers = std::mem::take(&mut socket.readers);
        self.wake(&mut readers);
    }
}

/// There is no IPv6 here; a socket for both families is one for IPv4, as on a host without.
pub(crate) fn any_is_v4(ip: IpAddr) -> IpAddr {
    if ip.is_unspecified() { Ipv4Addr::UNSPECIFIED.into() } else { ip }
}

/// Whether somebody has the port at an address that includes `ip`, or that `ip` includes.
pub(crate) fn is_taken<'a>(
    bound: impl IntoIterator<Item = &'a (u16, IpAddr)>,
    port: u16,
    ip: IpAddr,
) -> bool {
    bound.into_iter().any(|(taken, at)| {
        *taken == port && (*at == ip || at.is_unspecified() || ip.is_unspecified())
    })
}

/// What a socket received.
#[derive(Clone, Copy, Debug)]
pub struct Received {
    /// Bytes.
    pub len: usize,
    /// From where.
    pub from: SocketAddr,
    /// To which of the host's addresses.
    pub to: IpAddr,
    /// Its ECN bits.
    pub ecn: Option<u8>,
}

/// A UDP socket.
#[derive(Debug)]
pub struct UdpSocket {
    host: Host,
    id: u64,
    local: SocketAddr,
}

impl UdpSocket {
    /// Binds a socket of `host`.
    ///
    /// # Errors
    /// The address is another host's, or taken.
    pub fn bind(host: &Host, addr: SocketAddr) -> io::Result<Self> {
        host.net.with(|world| {
            let id = world.udp_bind(host.id, host.owner, addr)?;
            Ok(Self { host: host.clone(), id, local: world.udp[&id].local })
        })
    }

    /// A socket of `host` that talks to `remote` alone, from `source` when given.
    ///
    /// # Errors
    /// The source is no address of the host.
    pub fn connect(host: &Host, remote: SocketAddr, source: Option<IpAddr>) -> io::Result<Self> {
        let socket = Self::bind(host, SocketAddr::new(source.unwrap_or(ANY), 0))?;
        host.net.with(|world| {
            if let Some(state) = world.udp.get_mut(&socket.id) {
                state.peer = Some(remote);
            }
        });
        Ok(socket)
    }

    /// Sends a datagram to the only one it talks to.
    ///
    /// # Errors
    /// It is not connected, or the datagram is longer than UDP allows.
    pub fn try_send(&self, bytes: &[u8]) -> io::Result<()> {
        let peer = self.host.net.with(|world| world.udp.get(&self.id).and_then(|s| s.peer));
        self.try_send_to(bytes, peer.ok_or(io::ErrorKind::NotConnected)?, None, None)
    }

    /// What the network said of datagrams that were sent, once.
    #[must_use]
    pub fn take_error(&self) -> Option<io::Error> {
        self.host.net.with(|world| {
            let socket = world.udp.get_mut(&self.id)?;
            let is_refused = std::mem::take(&mut socket.is_refused);
            is_refused.then(|| io::ErrorKind::ConnectionRefused.into())
        })
    }

    /// Sends a datagram; from `source` if it is an address of the host.
    ///
    /// # Errors
    /// The datagram is longer than UDP allows.
    pub fn try_send_to(
        &self,
        bytes: &[u8],
        to: SocketAddr,
        source: Option<IpAddr>,
        ecn: Option<u8>,
    ) -> io::Result<()> {
        if bytes.len() > 65_507 {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let from = SocketAddr::new(source.unwrap_or(ANY), 0);
        let to = SocketAddr::new(to.ip().to_canonical(), to.port());
        let datagram = Datagram { from, to, ecn, bytes: bytes.into() };
        self.host.net.with(|world| world.udp_send(self.id, datagram));
        Ok(())
    }

    /// Receives a datagram and who sent it; what does not fit is cut.
    ///
    /// # Errors
    /// `WouldBlock` when there is none.
    pub fn try_receive(&self, buffer: &mut [u8]) -> io::Result<Received> {
        self.host.net.with(|world| {
            let socket = world.udp.get_mut(&self.id).ok_or(io::ErrorKind::NotConnected)?;
            let datagram = socket.queue.pop_front().ok_or(io::ErrorKind::WouldBlock)?;
            socket.queued_bytes -= datagram.bytes.len();
            let len = datagram.bytes.len().min(buffer.len());
            buffer[..len].copy_from_slice(&datagram.bytes[..len]);
            let (from, to) = (datagram.from, datagram.to.ip());
            Ok(Received { len, from, to, ecn: datagram.ecn })
        })
    }

    /// Waits until there is something to receive, or an error to take.
    ///
    /// # Errors
    /// The process was killed.
    ///
    /// # Cancel safety
    /// Cancel-safe.
    pub async fn readable(&self) -> io::Result<()> {
        poll_fn(|cx| self.poll_readable(cx)).await
    }

    /// As [`readable`](Self::readable), to be polled.
    pub fn poll_readable(&self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.host.net.with(|world| match world.udp.get_mut(&self.id) {
            None => Poll::Ready(Err(io::ErrorKind::NotConnected.into())),
            Some(socket) if !socket.queue.is_empty() || socket.is_refused => Poll::Ready(Ok(())),
            Some(socket) => {
                crate::net::register(&mut socket.readers, cx);
                Poll::Pending
            }
        })
    }

    /// Where it is bound.
    ///
    /// # Errors
    /// None; sockets of an operating system have some.
    pub fn local_addr(&self) -> io::Result<SocketAddr> {
        Ok(self.local)
    }
}

impl Drop for UdpSocket {
    fn drop(&mut self) {
        self.host.net.with(|world| world.udp_close(self.id));
    }
}
