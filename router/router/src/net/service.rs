//! Sockets of UDP services: one for all clients of a listener, which answers from the address that was asked; one for each association
//! towards its target.

use super::{or_v4, udp_bind};
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
};
use tokio::{io::Interest, net::UdpSocket};

/// Who sent a datagram, and which of our addresses it was sent to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Conversation {
    pub(crate) client: SocketAddr,
    /// Unspecified where the kernel did not say.
    pub(crate) local: IpAddr,
}

/// The socket of a listener's UDP port.
#[derive(Debug)]
pub(crate) struct ServiceSocket(UdpSocket);

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
        Ok(Self(socket))
    }

    pub(crate) fn local_addr(&self) -> io::Result<SocketAddr> {
        self.0.local_addr()
    }

    /// Waits until there is something to receive.
    ///
    /// # Errors
    /// Only when the runtime shuts down.
    ///
    /// # Cancel safety
    /// Cancel-safe.
    pub(crate) async fn readable(&self) -> io::Result<()> {
        self.0.readable().await
    }

    /// Receives one datagram into `buffer`, which must hold the largest.
    ///
    /// # Errors
    /// `WouldBlock` when there is none.
    pub(crate) fn try_recv(&self, buffer: &mut [u8]) -> io::Result<(usize, Conversation)> {
        self.0.try_io(Interest::READABLE, || {
            let mut control = cmsg_space!(in6_pktinfo, in_pktinfo);
            let mut slices = [IoSliceMut::new(buffer)];
            let fd = self.0.as_raw_fd();
            let flags = MsgFlags::MSG_DONTWAIT;
            let message = recvmsg::<SockaddrStorage>(fd, &mut slices, Some(&mut control), flags)?;
            let client = message.address.as_ref().and_then(socket_addr);
            let client = client.ok_or(io::ErrorKind::InvalidData)?;
            let mut local = IpAddr::V4(Ipv4Addr::UNSPECIFIED);
            for control in message.cmsgs()? {
                match control {
                    ControlMessageOwned::Ipv4PacketInfo(info) => {
                        local = Ipv4Addr::from(info.ipi_spec_dst.s_addr.to_ne_bytes()).into();
                    }
                    ControlMessageOwned::Ipv6PacketInfo(info) => {
                        local = Ipv6Addr::from(info.ipi6_addr.s6_addr).into();
                    }
                    _ => {}
                }
            }
            Ok((message.bytes, Conversation { client, local }))
        })
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
        let (fd, flags) = (self.0.as_raw_fd(), MsgFlags::MSG_DONTWAIT);
        // Without asking the runtime whether the socket is ready, which does not know of a new one, and for which nobody waits.
        sendmsg(fd, &[IoSlice::new(payload)], control, flags, Some(&to))?;
        Ok(())
    }
}

fn socket_addr(address: &SockaddrStorage) -> Option<SocketAddr> {
    if let Some(v4) = address.as_sockaddr_in() {
        return Some(SocketAddr::new(v4.ip().into(), v4.port()));
    }
    debug_assert!(address.family().is_some());
    let v6 = address.as_sockaddr_in6()?;
    Some(std::net::SocketAddrV6::new(v6.ip(), v6.port(), v6.flowinfo(), v6.scope_id()).into())
}

/// Makes a UDP socket that talks to `remote` alone, from `source` when given. Only what comes from there is received, and what the network
/// says of it (ICMP) becomes an error of the next call.
///
/// # Errors
/// Whatever the operating system says.
pub(crate) fn udp_connect(remote: SocketAddr, source: Option<IpAddr>) -> io::Result<UdpSocket> {
    let any: IpAddr =
        if remote.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
    let from = SocketAddr::new(source.unwrap_or(any), 0);
    // With buffers as the kernel gives them: there may be as many of these sockets as there are clients.
    or_v4(from, |from| {
        let socket = Socket::new(Domain::for_address(from), Type::DGRAM, Some(Protocol::UDP))?;
        socket.set_nonblocking(true)?;
        if source.is_some() {
            socket.bind(&from.into())?;
        }
        socket.connect(&remote.into())?;
        UdpSocket::from_std(socket.into())
    })
}

/// Sends a datagram on a socket that is connected.
///
/// # Errors
/// Whatever the operating system says; `WouldBlock` when the socket is full.
pub(crate) fn udp_try_send(socket: &UdpSocket, payload: &[u8]) -> io::Result<()> {
    // Without asking the runtime, as above.
    SockRef::from(socket).send(payload).map(|_len| ())
}

/// What the network said of datagrams that were sent on a socket that is connected, once.
pub(crate) fn udp_take_error(socket: &UdpSocket) -> Option<io::Error> {
    let take =
        || SockRef::from(socket).take_error()?.ok_or_else(|| io::ErrorKind::WouldBlock.into());
    // In the runtime's terms, so that it waits for the next one afterwards.
    socket.try_io(Interest::ERROR, take).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Asks from a socket of its own and expects the answer from where it asked.
    async fn asks(listen: &str, local: &str) {
        let service = ServiceSocket::bind(listen.parse().unwrap()).unwrap();
        let port = service.local_addr().unwrap().port();
        let remote = SocketAddr::new(local.parse().unwrap(), port);
        let client = udp_connect(remote, None).unwrap();
        for payload in [&b""[..], b"question", &[7; 65_507]] {
            client.send(payload).await.unwrap();
            let mut buffer = vec![0; 65_536];
            let (len, with) = loop {
                service.readable().await.unwrap();
                match service.try_recv(&mut buffer) {
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                    outcome => break outcome.unwrap(),
                }
            };
            assert_eq!(&buffer[..len], payload);
            service.try_send(&buffer[..len], &with).unwrap();
            // A socket that is connected takes nothing from elsewhere.
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
    async fn a_target_that_is_not_there_is_an_error_of_the_next_call() {
        let gone = udp_bind("127.0.0.1:0".parse().unwrap()).unwrap().local_addr().unwrap();
        let socket = udp_connect(gone, Some("127.0.0.8".parse().unwrap())).unwrap();
        assert_eq!(socket.local_addr().unwrap().ip(), IpAddr::from([127, 0, 0, 8]));
        socket.send(b"x").await.unwrap();
        let error = socket.recv(&mut [0; 8]).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::ConnectionRefused);
    }
}
