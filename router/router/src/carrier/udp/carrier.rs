//! One neighbour behind a UDP port: where it is, and whether it has moved.

use super::UdpPort;
use crate::{carrier::Remote, fabric::FrameLink};
use parking_lot::Mutex;
use quinn::udp::{EcnCodepoint, RecvMeta, Transmit};
use rand::{Rng as _, SeedableRng as _, rngs::StdRng};
use skein_wire::frame::{CONTROL_LEN, Control, HEADER_LEN};
use std::{
    io,
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

/// Largest batch of a UDP socket: an IPv4 datagram's payload.
const BATCH_BYTES_MAX: usize = 65_507;
/// An address that is not proven gets at most this many times the bytes that came from it.
const UNPROVEN_FACTOR: u64 = 3;
/// Length of an unpadded control frame.
const CONTROL_FRAME_LEN: u64 = (HEADER_LEN + CONTROL_LEN) as u64;

/// Frames to one neighbour through a port.
#[derive(Debug)]
pub(crate) struct UdpCarrier {
    port: Arc<UdpPort>,
    remote: Mutex<Remote>,
    moving: Mutex<Moving>,
}

/// Where the neighbour may have moved.
#[derive(Debug)]
struct Moving {
    /// Of challenges: whoever has seen any number of them must not know the next.
    random: StdRng,
    unproven: Option<Unproven>,
}

/// An address from which authentic frames came, but which has not answered a challenge.
#[derive(Debug)]
struct Unproven {
    addr: SocketAddr,
    local_ip: Option<IpAddr>,
    nonce: [u8; CONTROL_LEN],
    bytes_received: u64,
    bytes_sent: u64,
}

impl UdpCarrier {
    /// `seed` is secret and used for nothing else: challenges are drawn from it.
    pub(crate) fn new(port: Arc<UdpPort>, remote: Remote, seed: [u8; 32]) -> Self {
        let moving = Moving { random: StdRng::from_seed(seed), unproven: None };
        Self { port, remote: Mutex::new(remote), moving: Mutex::new(moving) }
    }

    pub(crate) fn port(&self) -> &Arc<UdpPort> {
        &self.port
    }

    pub(crate) fn remote(&self) -> SocketAddr {
        self.remote.lock().addr
    }

    pub(in crate::carrier) fn send(
        &self,
        frames: &[u8],
        stride: usize,
        ecn: Option<EcnCodepoint>,
    ) -> io::Result<usize> {
        let Remote { addr, local_ip } = *self.remote.lock();
        let per_batch = self.port.segments_max().min(BATCH_BYTES_MAX / stride.max(1)).max(1);
        send_batches(frames.chunks(per_batch * stride), |batch| {
            self.port.try_send(&Transmit {
                destination: addr,
                ecn,
                contents: batch,
                segment_size: (batch.len() > stride).then_some(stride),
                src_ip: local_ip,
            })
        })
    }

    pub(in crate::carrier) fn attach(&self, link: &Arc<FrameLink>) {
        self.port.attach(self.remote(), link);
    }

    pub(in crate::carrier) fn detach(&self, link: &FrameLink) {
        self.port.remove(link);
        self.port.detach(&self.remote(), link);
        if let Some(unproven) = self.moving.lock().unproven.take() {
            self.port.detach(&unproven.addr, link);
        }
    }

    pub(in crate::carrier) fn arrived(
        &self,
        link: &Arc<FrameLink>,
        bytes: usize,
        by_key: bool,
        meta: &RecvMeta,
    ) {
        if self.remote() != meta.addr {
            self.address_seen(link, bytes, meta);
        } else if by_key {
            self.port.suggest(meta.addr, link);
        }
    }

    /// Authentic frames came from an address that is not the neighbour's: its NAT may have given it a new one.
    ///
    /// Frames go there only after a challenge was echoed from there: until then somebody may be replaying the neighbour's frames
    /// from elsewhere, or making us flood a victim.
    #[cold]
    fn address_seen(&self, link: &Arc<FrameLink>, bytes: usize, meta: &RecvMeta) {
        let mut moving = self.moving.lock();
        let Moving { random, unproven } = &mut *moving;
        if unproven.as_ref().is_none_or(|unproven| unproven.addr != meta.addr) {
            if let Some(old) = unproven.replace(Unproven::new(meta, random)) {
                self.port.detach(&old.addr, link);
            }
            self.port.suggest(meta.addr, link);
        }
        let Some(unproven) = unproven.as_mut() else { return };
        unproven.bytes_received = unproven.bytes_received.saturating_add(bytes as u64);
        let budget = UNPROVEN_FACTOR.saturating_mul(unproven.bytes_received);
        if unproven.bytes_sent + CONTROL_FRAME_LEN > budget {
            return;
        }
        unproven.bytes_sent += CONTROL_FRAME_LEN;
        let frame = link.control_frame(Control::Challenge(unproven.nonce), 0);
        self.send_to(&frame, unproven.addr, unproven.local_ip);
    }

    pub(in crate::carrier) fn echoed(
        &self,
        link: &Arc<FrameLink>,
        nonce: [u8; CONTROL_LEN],
        meta: &RecvMeta,
    ) {
        let mut moving = self.moving.lock();
        let proven = moving
            .unproven
            .as_ref()
            .is_some_and(|unproven| unproven.addr == meta.addr && unproven.nonce == nonce);
        if !proven {
            return;
        }
        moving.unproven = None;
        let new = Remote { addr: meta.addr, local_ip: meta.dst_ip };
        let old = std::mem::replace(&mut *self.remote.lock(), new);
        self.port.detach(&old.addr, link);
        self.port.attach(meta.addr, link);
        tracing::info!(link = %link.id(), "the neighbour's address changed");
    }

    /// Sends one frame to an address that is not (yet) the neighbour's.
    fn send_to(&self, frame: &[u8], addr: SocketAddr, local_ip: Option<IpAddr>) {
        let transmit = Transmit {
            destination: addr,
            ecn: None,
            contents: frame,
            segment_size: None,
            src_ip: local_ip,
        };
        if let Err(error) = self.port.try_send(&transmit) {
            tracing::trace!(%error, "challenge not sent");
        }
    }
}

impl Unproven {
    fn new(meta: &RecvMeta, random: &mut StdRng) -> Self {
        let nonce = random.random();
        Self { addr: meta.addr, local_ip: meta.dst_ip, nonce, bytes_received: 0, bytes_sent: 0 }
    }
}

/// Sends batch after batch and returns how many bytes were taken. Once something was, what finds the socket full is lost:
/// told to wait, the caller would send everything again.
fn send_batches<'a>(
    batches: impl Iterator<Item = &'a [u8]>,
    mut send: impl FnMut(&[u8]) -> io::Result<()>,
) -> io::Result<usize> {
    let mut taken = 0;
    for batch in batches {
        match send(batch) {
            Ok(()) => taken += batch.len(),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock && taken > 0 => break,
            Err(error) => return Err(error),
        }
    }
    Ok(taken)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_batch_taken_in_part_is_not_sent_again() {
        let frames = [7; 10];
        let mut room = 2;
        let mut send = |batch: &[u8]| {
            assert!(batch.len() <= 4);
            if room == 0 {
                return Err(io::ErrorKind::WouldBlock.into());
            }
            room -= 1;
            Ok(())
        };
        assert_eq!(send_batches(frames.chunks(4), &mut send).unwrap(), 8);
        let error = send_batches(frames.chunks(4), &mut send).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::WouldBlock, "nothing was taken: wait");
    }
}
