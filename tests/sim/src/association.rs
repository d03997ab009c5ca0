//! Clients and targets of UDP services: every datagram says whose it is and which, and all the rest of it follows from that.

use crate::flow::Desk;
use crate::scenario::AssociationPlan;
use bytes::{Buf as _, BufMut as _};
use parking_lot::Mutex;
use skein_netsim::{Host, UdpSocket};
use std::{collections::BTreeSet, io, net::SocketAddr, time::Duration};
use tokio::time;

/// What a datagram begins with: association, direction, number, number of the answer.
pub(crate) const HEAD_LEN: usize = 13;
/// Longest that there is.
const DATAGRAM_LEN_MAX: usize = 65_507;
/// Direction of an answer.
const ANSWER: u8 = 1;
/// Complaints that are kept.
const WRONGS_MAX: usize = 5;

/// What both ends of an association have seen.
#[derive(Clone, Debug, Default)]
pub(crate) struct Talk {
    /// Datagrams that the client has sent: the number of the next.
    pub(crate) sent: u32,
    /// The first number that was sent when all was well again.
    since_healed: Option<u32>,
    /// When one of those was answered.
    pub(crate) answered_ms: Option<u64>,
    /// The client has said all that it wanted, and heard an answer in the end.
    pub(crate) is_over: bool,
    /// Sites and ports that datagrams came from at targets, with their numbers.
    arrived: BTreeSet<(usize, u16, u32)>,
    /// Answers of targets so far.
    answers: u32,
    /// Those that the client has heard.
    pub(crate) heard: BTreeSet<u32>,
}

/// All associations, and what must not have happened.
#[derive(Debug)]
pub(crate) struct Talks {
    talks: Mutex<Vec<Talk>>,
    wrongs: Mutex<Vec<String>>,
    healed_ms: u64,
}

impl Talks {
    pub(crate) fn new(count: usize, healed_ms: u64) -> Self {
        Self {
            talks: Mutex::new(vec![Talk::default(); count]),
            wrongs: Mutex::default(),
            healed_ms,
        }
    }

    pub(crate) fn all(&self) -> Vec<Talk> {
        self.talks.lock().clone()
    }

    /// What was wrong with datagrams that arrived.
    pub(crate) fn wrongs(&self) -> Vec<String> {
        self.wrongs.lock().clone()
    }

    fn complain(&self, what: String) {
        let mut wrongs = self.wrongs.lock();
        if wrongs.len() < WRONGS_MAX {
            wrongs.push(what);
        }
    }

    fn next(&self, index: usize, now_ms: u64) -> u32 {
        let talk = &mut self.talks.lock()[index];
        let number = talk.sent;
        talk.sent += 1;
        if now_ms >= self.healed_ms {
            talk.since_healed.get_or_insert(number);
        }
        number
    }

    /// A datagram has come to a target; returns the number of the answer.
    fn arrived(&self, head: Head, site: usize, from: SocketAddr) -> u32 {
        let mut talks = self.talks.lock();
        let talk = &mut talks[usize::from(head.association)];
        if head.number >= talk.sent {
            self.complain(format!("{head:?} was never sent, and came to site {site}"));
        }
        if !talk.arrived.insert((site, from.port(), head.number)) {
            self.complain(format!("{head:?} came twice to site {site}"));
        }
        talk.answers += 1;
        talk.answers
    }

    /// An answer has come to the client.
    fn heard(&self, index: usize, head: Head, now_ms: u64) {
        let mut talks = self.talks.lock();
        let talk = &mut talks[index];
        if usize::from(head.association) != index || head.direction != ANSWER {
            self.complain(format!("association {index} heard {head:?}"));
            return;
        }
        if head.answer > talk.answers || head.number >= talk.sent {
            self.complain(format!("{head:?} was never said"));
        }
        if !talk.heard.insert(head.answer) {
            self.complain(format!("{head:?} was heard twice"));
        }
        if talk.since_healed.is_some_and(|first| head.number >= first) {
            talk.answered_ms.get_or_insert(now_ms);
        }
    }
}

/// The beginning of a datagram.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Head {
    association: u16,
    direction: u8,
    number: u32,
    answer: u32,
}

/// A datagram of so many bytes.
fn datagram(head: Head, len: usize) -> Vec<u8> {
    let len = len.clamp(HEAD_LEN, DATAGRAM_LEN_MAX);
    let mut bytes = Vec::with_capacity(len);
    bytes.put_u16(head.association);
    bytes.put_u8(head.direction);
    bytes.put_u32(head.number);
    bytes.put_u32(head.answer);
    bytes.put_u16(len as u16);
    let salt = u64::from(head.association) << 40
        | u64::from(head.direction) << 32
        | u64::from(head.number) ^ u64::from(head.answer).rotate_left(16);
    // Every bit of it must reach every byte: a change of the head is then seen in the rest.
    let salt = (salt ^ salt >> 32).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let salt = (salt ^ salt >> 29).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let salt = salt ^ salt >> 32;
    bytes.extend(
        (HEAD_LEN as u64..len as u64).map(|n| ((n ^ salt).wrapping_mul(salt | 1) >> 40) as u8),
    );
    bytes
}

/// Whose it is, if every byte of it is right.
fn read(bytes: &[u8]) -> Option<Head> {
    let mut rest = bytes.get(..HEAD_LEN)?;
    let head = Head {
        association: rest.get_u16(),
        direction: rest.get_u8(),
        number: rest.get_u32(),
        answer: rest.get_u32(),
    };
    (datagram(head, bytes.len()) == bytes).then_some(head)
}

impl Desk {
    /// Answers as the target of a site for an address, for as long as the socket lives.
    pub(crate) async fn answer(self, site: usize, address: usize, socket: UdpSocket) {
        let mut buffer = vec![0; DATAGRAM_LEN_MAX];
        while socket.readable().await.is_ok() {
            let Ok(received) = socket.try_receive(&mut buffer) else { continue };
            let bytes = &buffer[..received.len];
            let of_address = |head: &Head| {
                self.associations
                    .get(usize::from(head.association))
                    .is_some_and(|plan| plan.address == address)
            };
            let Some(head) = read(bytes).filter(of_address).filter(|head| head.direction != ANSWER)
            else {
                let shown = &bytes[..bytes.len().min(HEAD_LEN)];
                let len = bytes.len();
                self.talks.complain(format!("site {site} was sent {len} wrong bytes: {shown:?}"));
                continue;
            };
            let answer = self.talks.arrived(head, site, received.from);
            let bytes = datagram(Head { direction: ANSWER, answer, ..head }, bytes.len());
            // The socket may be gone, which is seen above.
            let _ = socket.try_send_to(&bytes, received.from, None, None);
        }
    }

    /// Talks as a client, until it has said everything and was answered when all was well again.
    pub(crate) async fn converse(self, index: usize, host: Host, entrance: SocketAddr) {
        let plan = self.associations[index].clone();
        time::sleep(Duration::from_millis(plan.at_ms)).await;
        let local = SocketAddr::new(entrance.ip(), 0);
        let mut socket = None;
        loop {
            let number = self.talks.next(index, self.now_ms());
            if socket.is_none() {
                // A host that has lost power has closed it.
                socket = UdpSocket::bind(&host, local).ok();
            }
            let association = u16::try_from(index).unwrap_or(u16::MAX);
            let head = Head { association, direction: 0, number, answer: 0 };
            let next = time::Instant::now() + Duration::from_millis(plan.wait_ms(number));
            if let Some(open) = &socket {
                let bytes = datagram(head, plan.len_of(number));
                // The socket may be gone, which is seen below.
                let _ = open.try_send_to(&bytes, entrance, None, None);
                if time::timeout_at(next, self.listen(index, open, entrance)).await.is_ok() {
                    socket = None;
                }
            }
            time::sleep_until(next).await;
            let mut talks = self.talks.talks.lock();
            if talks[index].sent >= plan.count && talks[index].answered_ms.is_some() {
                talks[index].is_over = true;
                return;
            }
        }
    }

    /// Hears answers, until the socket is gone.
    async fn listen(&self, index: usize, socket: &UdpSocket, entrance: SocketAddr) {
        let mut buffer = vec![0; DATAGRAM_LEN_MAX];
        while socket.readable().await.is_ok() {
            let received = match socket.try_receive(&mut buffer) {
                Ok(received) => received,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => continue,
                Err(_) => return,
            };
            match read(&buffer[..received.len]) {
                Some(head) if received.from == entrance => {
                    self.talks.heard(index, head, self.now_ms());
                }
                _ => {
                    let (len, from) = (received.len, received.from);
                    let what = format!("association {index} heard {len} wrong bytes from {from}");
                    self.talks.complain(what);
                }
            }
        }
    }
}

impl AssociationPlan {
    /// Length of the datagram of this number.
    fn len_of(&self, number: u32) -> usize {
        let spread = u64::from(number).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32;
        HEAD_LEN + spread as usize % self.len_max.max(1)
    }

    /// How long the client waits after it.
    fn wait_ms(&self, number: u32) -> u64 {
        // Longer than an association lives when nothing passes, now and then.
        let pauses = self.pause_ms > 0 && number % 16 == 15;
        if pauses { self.pause_ms } else { self.every_ms }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_datagram_tells_whose_it_is_and_whether_it_is_whole() {
        let head = Head { association: 3, direction: 1, number: 70_000, answer: 9 };
        for len in [HEAD_LEN, 100, 1_200, 65_507] {
            let mut bytes = datagram(head, len);
            assert_eq!((bytes.len(), read(&bytes)), (len, Some(head)));
            bytes.truncate(len - 1);
            assert_eq!(read(&bytes), None, "cut");
        }
        for at in [0, 5, 11, 50, 99] {
            let mut bytes = datagram(head, 100);
            bytes[at] ^= 4;
            assert_eq!(read(&bytes), None, "byte {at} changed");
        }
    }
}
