//! Sockets of UDP services: one for all clients of a listener, which answers from the address that was asked; one for each association
//! towards its target.

use super::udp_bind;
use nix::{
    cmsg_space,
    libc::{in_addr, in_pktinfo, in6_addr, in6_pktinfo},
    sys::socket::{
        ControlMessage, ControlMessageOwned, MsgFlags, SockaddrLike as _, SockaddrStorage, recvmsg,
        sendmsg, setsockopt, sockopt,
    },
};
use socket2::{Domain, Protocol, SockRef, Socket, Type};
use std::{
    io::{self, IoSlice, IoSliceMut},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    os::fd::AsRawFd as _,
    sync::atomic::{AtomicU32, Ordering},
};
use tokio::{io::Interest, net::UdpSocket};

/// Who sent a datagram, and which of our addresses it was sent to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Conversation {
    pub(crate) client: SocketAddr,
    /// Unspecified where the kernel did not say.
    pub(crate) local: IpAddr,
}

/// A datagram, in the buffer it was received into.
#[derive(Debug)]
pub(crate) struct Arrival {
    pub(crate) len: usize,
    pub(crate) with: Conversation,
    /// So many were dropped before it since the last one, for lack of room in the kernel.
    pub(crate) dropped: u64,
}

/// The socket of a listener's UDP port.
#[derive(Debug)]
pub(crate) struct ServiceSocket {
    socket: UdpSocket,
    dropped: AtomicU32,
}

/// A socket towards a target, for one association.
#[derive(Debug)]
pub(crate) struct TargetSocket {
    socket: UdpSocket,
    dropped: AtomicU32,
}

impl ServiceSocket {
    /// Binds; `[::]` is dual-stack, and becomes `0.0.0.0` where IPv6 is off.
    ///
    /// # Errors
    /// Whatever the operating system says of the address.
    pub(crate) fn bind(addr: SocketAddr) -> io::Result<Self> {
        let socket = udp_bind(addr)?;
        if socket.local_addr()?.is_ipv4() {
            setsockopt(&socket, sockopt::Ipv4PacketInfo, &true)?;
        } else {
            setsockopt(&socket, sockopt::Ipv6RecvPacketInfo, &true)?;
        }
        setsockopt(&socket, sockopt::RxqOvfl, &1)?;
        Ok(Self { socket, dropped: AtomicU32::new(0) })
    }

    pub(crate) fn local_addr(&self) -> io::Result<SocketAddr> {
        self.socket.local_addr()
    }

    /// Waits until there is something to receive.
    ///
    /// # Errors
    /// Only when the runtime shuts down.
    ///
    /// # Cancel safety
    /// Cancel-safe.
    pub(crate) async fn readable(&self) -> io::Result<()> {
        self.socket.readable().await
    }

    /// Receives one datagram into `buffer`, which must hold the largest.
    ///
    /// # Errors
    /// `WouldBlock` when there is none.
    pub(crate) fn try_recv(&self, buffer: &mut [u8]) -> io::Result<Arrival> {
        try_recv(&self.socket, &self.dropped, buffer)
    }

    /// Answers a client from the address it has sent to.
    ///
    /// # Errors
    /// Whatever the operating system says; `WouldBlock` when the socket is full.
    pub(crate) fn try_send(&self, payload: &[u8], with: &Conversation) -> io::Result<()> {
        let v4 = |ip: Ipv4Addr| in_pktinfo {
            ipi_ifindex: 0,
            ipi_spec_dst: in_addr { s_addr: u32::from_ne_bytes(ip.octets()) },
            ipi_addr: in_addr { s_addr: 0 },
        };
        let v6 = |ip: Ipv6Addr| in6_pktinfo {
            ipi6_addr: in6_addr { s6_addr: ip.octets() },
            ipi6_ifindex: 0,
        };
        let (info_v4, info_v6);
        let control: &[ControlMessage<'_>] = match with.local {
            ip if ip.is_unspecified() || ip.is_multicast() => &[],
            IpAddr::V4(ip) => {
                info_v4 = v4(ip);
                &[ControlMessage::Ipv4PacketInfo(&info_v4)]
            }
            IpAddr::V6(ip) => {
                info_v6 = v6(ip);
                &[ControlMessage::Ipv6PacketInfo(&info_v6)]
            }
        };
        let to = SockaddrStorage::from(with.client);
        let (fd, flags) = (self.socket.as_raw_fd(), MsgFlags::MSG_DONTWAIT);
        // Without asking the runtime whether the socket is ready, which does not know of a new one, and for which nobody waits.
        sendmsg(fd, &[IoSlice::new(payload)], control, flags, Some(&to))?;
        Ok(())
    }
}

/// Receives one datagram; `dropped` is what the kernel last said of how many it has dropped in all.
fn try_recv(socket: &UdpSocket, dropped: &AtomicU32, buffer: &mut [u8]) -> io::Result<Arrival> {
    socket.try_io(Interest::READABLE, || {
        let mut control = cmsg_space!(in6_pktinfo, in_pktinfo, u32);
        let mut slices = [IoSliceMut::new(buffer)];
        let (fd, flags) = (socket.as_raw_fd(), MsgFlags::MSG_DONTWAIT);
        let message = recvmsg::<SockaddrStorage>(fd, &mut slices, Some(&mut control), flags)?;
        let client = message.address.as_ref().and_then(socket_addr);
        let client = client.ok_or(io::ErrorKind::InvalidData)?;
        let (mut local, mut dropped_now) = (IpAddr::V4(Ipv4Addr::UNSPECIFIED), 0);
        for control in message.cmsgs()? {
            match control {
                ControlMessageOwned::Ipv4PacketInfo(info) => {
                    local = Ipv4Addr::from(info.ipi_spec_dst.s_addr.to_ne_bytes()).into();
                }
                ControlMessageOwned::Ipv6PacketInfo(info) => {
                    local = Ipv6Addr::from(info.ipi6_addr.s6_addr).into();
                }
                ControlMessageOwned::RxqOvfl(all) => {
                    dropped_now = all.wrapping_sub(dropped.swap(all, Ordering::Relaxed));
                }
                _ => {}
            }
        }
        let with = Conversation { client, local };
        Ok(Arrival { len: message.bytes, with, dropped: dropped_now.into() })
    })
}

fn socket_addr(address: &SockaddrStorage) -> Option<SocketAddr> {
    if let Some(v4) = address.as_sockaddr_in() {
        return Some(SocketAddr::new(v4.ip().into(), v4.port()));
    }
    debug_assert!(address.family().is_some());
    let v6 = address.as_sockaddr_in6()?;
    Some(std::net::SocketAddrV6::new(v6.ip(), v6.port(), v6.flowinfo(), v6.scope_id()).into())
}

impl TargetSocket {
    /// A socket that talks to `remote` alone, from `source` when given. Only what comes from there is received, and what the network says
    /// of it (ICMP) becomes an error.
    ///
    /// # Errors
    /// Whatever the operating system says.
    pub(crate) fn connect(remote: SocketAddr, source: Option<IpAddr>) -> io::Result<Self> {
        // With buffers as the kernel gives them: there may be as many of these sockets as there are clients.
        let domain = Domain::for_address(remote);
        let socket = Socket::new(domain, Type::DGRAM, Some(Protocol::UDP))?;
        socket.set_nonblocking(true)?;
        if let Some(source) = source {
            socket.bind(&SocketAddr::new(source, 0).into())?;
        }
        socket.connect(&remote.into())?;
        setsockopt(&socket, sockopt::RxqOvfl, &1)?;
        let socket = UdpSocket::from_std(socket.into())?;
        Ok(Self { socket, dropped: AtomicU32::new(0) })
    }

    /// Waits until there is something to receive, or an error to take.
    ///
    /// # Errors
    /// Only when the runtime shuts down.
    ///
    /// # Cancel safety
    /// Cancel-safe.
    pub(crate) async fn ready(&self) -> io::Result<()> {
        self.socket.ready(Interest::READABLE | Interest::ERROR).await.map(drop)
    }

    /// Receives one datagram into `buffer`, which must hold the largest.
    ///
    /// # Errors
    /// `WouldBlock` when there is none; what the network says of those sent.
    pub(crate) fn try_recv(&self, buffer: &mut [u8]) -> io::Result<Arrival> {
        try_recv(&self.socket, &self.dropped, buffer)
    }

    /// Sends a datagram.
    ///
    /// # Errors
    /// Whatever the operating system says; `WouldBlock` when the socket is full.
    pub(crate) fn try_send(&self, payload: &[u8]) -> io::Result<()> {
        // Without asking the runtime, as above.
        SockRef::from(&self.socket).send(payload).map(|_len| ())
    }

    /// What the network said of datagrams that were sent, once.
    pub(crate) fn take_error(&self) -> Option<io::Error> {
        let socket = SockRef::from(&self.socket);
        let take = || socket.take_error()?.ok_or_else(|| io::ErrorKind::WouldBlock.into());
        // In the runtime's terms, so that it waits for the next one afterwards.
        self.socket.try_io(Interest::ERROR, take).ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn next(socket: &ServiceSocket, buffer: &mut [u8]) -> Arrival {
        loop {
            socket.readable().await.unwrap();
            match socket.try_recv(buffer) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                outcome => return outcome.unwrap(),
            }
        }
    }

    /// Asks from a socket of its own and expects the answer from where it asked.
    async fn asks(listen: &str, local: &str) {
        let service = ServiceSocket::bind(listen.parse().unwrap()).unwrap();
        let port = service.local_addr().unwrap().port();
        let client = TargetSocket::connect(SocketAddr::new(local.parse().unwrap(), port), None);
        // A socket that is connected takes nothing from elsewhere.
        let client = client.unwrap().socket;
        for payload in [&b""[..], b"question", &[7; 65_507]] {
            client.send(payload).await.unwrap();
            let mut buffer = vec![0; 65_536];
            let Arrival { len, with, .. } = next(&service, &mut buffer).await;
            assert_eq!(&buffer[..len], payload);
            service.try_send(&buffer[..len], &with).unwrap();
            assert_eq!(client.recv(&mut buffer).await.unwrap(), payload.len());
        }
    }

    #[tokio::test]
    async fn answers_come_from_the_address_that_was_asked() {
        asks("127.0.0.1:0", "127.0.0.1").await;
        asks("0.0.0.0:0", "127.0.0.7").await;
        asks("[::]:0", "127.0.0.9").await;
        asks("[::]:0", "::1").await;
    }

    #[tokio::test]
    async fn what_the_kernel_drops_is_known() {
        let service = ServiceSocket::bind("127.0.0.1:0".parse().unwrap()).unwrap();
        SockRef::from(&service.socket).set_recv_buffer_size(4 << 10).unwrap();
        let client = TargetSocket::connect(service.local_addr().unwrap(), None).unwrap();
        const SENT: u64 = 100;
        for _ in 0..SENT {
            client.try_send(&[1; 1_000]).unwrap();
        }
        let (mut buffer, mut known) = (vec![0; 2_000], 0);
        service.readable().await.unwrap();
        while let Ok(arrival) = service.try_recv(&mut buffer) {
            known += 1 + arrival.dropped;
        }
        assert!(known < SENT, "told with the next that arrives");
        client.try_send(b"last").unwrap();
        let last = next(&service, &mut buffer).await;
        assert_eq!((known + last.dropped, last.len), (SENT, 4));
    }

    #[tokio::test]
    async fn a_target_that_is_not_there_is_an_error() {
        let gone = udp_bind("127.0.0.1:0".parse().unwrap()).unwrap().local_addr().unwrap();
        let socket = TargetSocket::connect(gone, Some("127.0.0.8".parse().unwrap())).unwrap();
        assert_eq!(socket.socket.local_addr().unwrap().ip(), IpAddr::from([127, 0, 0, 8]));
        socket.try_send(b"x").unwrap();
        let error = loop {
            socket.ready().await.unwrap();
            if let Some(error) = socket.take_error() {
                break error;
            }
        };
        assert_eq!(error.kind(), io::ErrorKind::ConnectionRefused);
    }
}
