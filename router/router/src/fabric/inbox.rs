//! Frames for this router, between the readers of sockets and the end-to-end endpoint.

use super::pool::{BUFFER_BYTES, Pool};
use parking_lot::Mutex;
use quinn::udp::{EcnCodepoint, RecvMeta};
use skein_core::{Handle, Pin, vaddr};
use std::{
    collections::VecDeque,
    io::IoSliceMut,
    task::{Context, Poll, Waker},
};

/// Memory of waiting frames: 32 ms at 1 Gbit/s, as much as the socket in front holds.
const WAITING_BYTES_MAX: usize = 4 << 20;
/// Below this a buffer's frames are copied, so that small packets do not hold large buffers.
const COPY_BELOW_BYTES: usize = 16 << 10;

/// Consecutive frames of one source and pin in a buffer.
#[derive(Clone, Copy, Debug)]
pub(super) struct Run {
    pub(super) source: Handle,
    pub(super) pin: Pin,
    pub(super) start: usize,
    pub(super) end: usize,
    /// Length of each frame but the last.
    pub(super) stride: usize,
    /// Header to cut off each frame.
    pub(super) header_len: usize,
}

#[derive(Debug)]
struct Delivery {
    buffer: Box<[u8]>,
    /// Counted against the limit.
    cost: usize,
    ecn: Option<EcnCodepoint>,
    runs: VecDeque<Run>,
}

/// Received end-to-end packets in order of arrival.
#[derive(Debug, Default)]
pub(super) struct Inbox(Mutex<Waiting>);

#[derive(Debug, Default)]
struct Waiting {
    deliveries: VecDeque<Delivery>,
    bytes: usize,
    waker: Option<Waker>,
}

impl Inbox {
    /// Queues the runs of a buffer and leaves another one in its place; `false` when there was no room for them.
    pub(super) fn push(
        &self,
        buffer: &mut Box<[u8]>,
        runs: &mut VecDeque<Run>,
        ecn: Option<EcnCodepoint>,
        pool: &Pool,
    ) -> bool {
        let used = runs.iter().map(|run| run.end - run.start).sum::<usize>();
        let cost = if used < COPY_BELOW_BYTES { used } else { BUFFER_BYTES };
        let mut waiting = self.0.lock();
        if waiting.bytes + cost > WAITING_BYTES_MAX {
            return false;
        }
        waiting.bytes += cost;
        let buffer = if used < COPY_BELOW_BYTES {
            copied(buffer, runs)
        } else {
            std::mem::replace(buffer, pool.take_one())
        };
        waiting.deliveries.push_back(Delivery { buffer, cost, ecn, runs: std::mem::take(runs) });
        if let Some(waker) = waiting.waker.take() {
            waker.wake();
        }
        true
    }

    /// Fills the endpoint's buffers with packets, their headers cut off; one run, one buffer.
    pub(super) fn poll(
        &self,
        cx: &mut Context<'_>,
        bufs: &mut [IoSliceMut<'_>],
        metas: &mut [RecvMeta],
        pool: &Pool,
    ) -> Poll<usize> {
        let mut waiting = self.0.lock();
        let mut filled = 0;
        while filled < bufs.len().min(metas.len()) {
            let Some(delivery) = waiting.deliveries.front_mut() else { break };
            if let Some(meta) = delivery.fill(&mut bufs[filled]) {
                metas[filled] = meta;
                filled += 1;
            }
            if delivery.runs.is_empty()
                && let Some(done) = waiting.deliveries.pop_front()
            {
                waiting.bytes -= done.cost;
                pool.give([done.buffer]);
            }
        }
        if filled == 0 {
            waiting.waker = Some(cx.waker().clone());
            return Poll::Pending;
        }
        Poll::Ready(filled)
    }
}

/// The bytes of `runs` on their own.
fn copied(buffer: &[u8], runs: &mut VecDeque<Run>) -> Box<[u8]> {
    let mut copy = Vec::with_capacity(runs.iter().map(|run| run.end - run.start).sum());
    for run in runs {
        let start = copy.len();
        copy.extend_from_slice(&buffer[run.start..run.end]);
        *run = Run { start, end: copy.len(), ..*run };
    }
    copy.into_boxed_slice()
}

impl Delivery {
    /// Moves as many packets of the first run as fit into `out`; `None` when the run's next packet is larger than `out`.
    fn fill(&mut self, out: &mut [u8]) -> Option<RecvMeta> {
        let run = self.runs.front_mut()?;
        let (mut len, mut stride) = (0, 0);
        while run.start < run.end {
            let end = (run.start + run.stride).min(run.end);
            let packet = &self.buffer[run.start + run.header_len..end];
            let Some(room) = out.get_mut(len..len + packet.len()) else { break };
            room.copy_from_slice(packet);
            len += packet.len();
            stride = stride.max(packet.len());
            run.start = end;
        }
        let Run { source, pin, .. } = *run;
        if len == 0 || run.start >= run.end {
            self.runs.pop_front();
        }
        (len > 0).then(|| RecvMeta {
            addr: vaddr(source, pin),
            len,
            stride,
            ecn: self.ecn,
            dst_ip: None,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::task::Waker;

    fn run(source: u32, start: usize, end: usize) -> Run {
        Run { source: Handle(source), pin: Pin(0), start, end, stride: 40, header_len: 32 }
    }

    fn drain(inbox: &Inbox, pool: &Pool, buf_len: usize) -> Vec<(Handle, usize, Vec<u8>)> {
        let mut out = Vec::new();
        let mut cx = Context::from_waker(Waker::noop());
        loop {
            let mut bufs = [vec![0; buf_len], vec![0; buf_len]];
            let mut slices = bufs.each_mut().map(|buf| IoSliceMut::new(buf));
            let mut metas = [RecvMeta::default(); 2];
            let Poll::Ready(n) = inbox.poll(&mut cx, &mut slices, &mut metas, pool) else {
                return out;
            };
            for (buf, meta) in bufs.iter().zip(&metas[..n]) {
                let (source, _) = skein_core::parse_vaddr(&meta.addr).unwrap();
                out.push((source, meta.stride, buf[..meta.len].to_vec()));
            }
        }
    }

    #[test]
    fn runs_come_out_by_source_without_headers() {
        for (size, buf_len) in [(200, 100), (BUFFER_BYTES, 100), (200, 8)] {
            let (inbox, pool) = (Inbox::default(), Pool::default());
            let mut buffer: Box<[u8]> = (0..=250).cycle().take(size).collect();
            let mut runs = VecDeque::from([run(1, 0, 80), run(2, 80, 155)]);
            assert!(inbox.push(&mut buffer, &mut runs, None, &pool));
            let out = drain(&inbox, &pool, buf_len);
            let joined = |source| {
                let of = out.iter().filter(|(from, ..)| *from == Handle(source));
                of.flat_map(|(_, _, bytes)| bytes.clone()).collect::<Vec<u8>>()
            };
            assert_eq!(joined(1), (32..40).chain(72..80).collect::<Vec<u8>>());
            assert_eq!(joined(2), (112..120).chain(152..155).collect::<Vec<u8>>());
            assert!(out.iter().all(|(_, stride, bytes)| bytes.len() <= buf_len && *stride <= 8));
            assert_eq!(inbox.0.lock().bytes, 0);
        }
    }

    #[test]
    fn packets_too_large_for_the_endpoint_are_skipped_and_the_queue_is_bounded() {
        let (inbox, pool) = (Inbox::default(), Pool::default());
        let mut buffer: Box<[u8]> = vec![7; BUFFER_BYTES].into();
        let big = Run { stride: 20_000, ..run(1, 0, 20_000) };
        assert!(inbox.push(&mut buffer, &mut VecDeque::from([big]), None, &pool));
        assert!(drain(&inbox, &pool, 1_472).is_empty());
        let pushed = (0..1_000)
            .filter(|_| inbox.push(&mut buffer, &mut VecDeque::from([big]), None, &pool))
            .count();
        assert_eq!(pushed, WAITING_BYTES_MAX / BUFFER_BYTES);
    }
}
