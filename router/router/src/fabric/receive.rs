//! What a socket received: hop QUIC, frames for this router, frames in transit, all possibly in one buffer.

use super::{Fabric, FrameLink, forwarding::Forwarding, fragment::PacketId, inbox::Run};
use crate::carrier::Port;
use quinn::udp::{EcnCodepoint, RecvMeta};
use skein_core::Label;
use skein_wire::frame::{self, FragmentHead, FrameKind, Header, OpenError};
use std::{collections::VecDeque, sync::Arc, time::Instant};

/// One received buffer being taken apart.
struct Sorting<'a> {
    fabric: &'a Fabric,
    port: &'a Port,
    table: &'a Forwarding,
    meta: &'a RecvMeta,
    now: Instant,
    /// The neighbour, once known.
    from: Option<Arc<FrameLink>>,
    /// Found by its key, not by its address.
    by_key: bool,
    authentic_bytes: usize,
    data: bool,
    local: VecDeque<Run>,
    onward: Option<Onward<'a>>,
}

/// Consecutive frames that leave on the same link: they go on as they lie, in one batch.
struct Onward<'a> {
    link: &'a Arc<FrameLink>,
    start: usize,
    end: usize,
}

impl Fabric {
    /// Takes a received buffer apart. When frames in it are for this router, the buffer is kept and replaced by another.
    pub(crate) fn receive(
        &self,
        port: &Port,
        buffer: &mut Box<[u8]>,
        meta: &RecvMeta,
        now: Instant,
    ) {
        let table = self.forwarding();
        let len = meta.len.min(buffer.len());
        let mut sorting = Sorting {
            fabric: self,
            port,
            table: &table,
            meta,
            now,
            from: port.link_from(meta),
            by_key: false,
            authentic_bytes: 0,
            data: false,
            local: VecDeque::new(),
            onward: None,
        };
        let stride = meta.stride.max(1);
        for start in (0..len).step_by(stride) {
            sorting.datagram(buffer, start, (start + stride).min(len));
        }
        sorting.flush(buffer);
        let Sorting { from, by_key, authentic_bytes, data, mut local, .. } = sorting;
        if let Some(link) = from.filter(|_| authentic_bytes > 0) {
            link.received(authentic_bytes, data, now);
            link.carrier().arrived(&link, authentic_bytes, by_key, meta);
        }
        if !local.is_empty() {
            self.deliver(buffer, &mut local, meta.ecn);
        }
    }

    fn deliver(&self, buffer: &mut Box<[u8]>, runs: &mut VecDeque<Run>, ecn: Option<EcnCodepoint>) {
        let frames = |run: &Run| (run.end - run.start).div_ceil(run.stride) as u64;
        let frames = runs.iter().map(frames).sum();
        let delivered = self.inbox.push(buffer, runs, ecn, &self.pool);
        let counter = if delivered {
            &self.counters.frames_delivered
        } else {
            &self.counters.dropped_congestion
        };
        counter.add(frames);
    }
}

impl<'a> Sorting<'a> {
    fn datagram(&mut self, buffer: &mut [u8], start: usize, end: usize) {
        let datagram = &mut buffer[start..end];
        if !frame::is_frame(datagram[0]) {
            self.hop(datagram);
        } else if let Some(header) = self.open(datagram) {
            self.authentic_bytes += datagram.len();
            match header.kind {
                FrameKind::Control => {
                    if let Some(link) = &self.from {
                        link.control_received(datagram, self.meta, self.now);
                    }
                }
                FrameKind::Data | FrameKind::Fragment => {
                    self.data = true;
                    match header.next_label(datagram) {
                        None => self.arrived(&header, datagram, start),
                        Some(label) => self.transit(&header, label, buffer, start, end),
                    }
                }
            }
        }
    }

    fn hop(&self, datagram: &[u8]) {
        let counters = &self.fabric.counters;
        // Bit 0x40 is set in every QUIC packet our endpoints send; anything else is noise.
        if datagram[0] & 0x40 == 0 {
            counters.dropped_unauthenticated.add(1);
        } else if !self.port.push_hop(datagram, self.meta) {
            counters.dropped_handshake.add(1);
        }
    }

    fn open(&mut self, frame: &[u8]) -> Option<Header> {
        let outcome = match &self.from {
            Some(link) => link.open(frame),
            None => Err(OpenError::Unauthenticated),
        };
        match outcome {
            Ok(header) => Some(header),
            Err(OpenError::Replayed) => {
                self.fabric.counters.dropped_replayed.add(1);
                None
            }
            Err(OpenError::Malformed(_)) => {
                self.fabric.counters.dropped_unauthenticated.add(1);
                None
            }
            Err(OpenError::Unauthenticated) => self.open_from_elsewhere(frame),
        }
    }

    /// A neighbour whose address has changed, or who has got an address another one had before, is known by its key only.
    #[cold]
    fn open_from_elsewhere(&mut self, frame: &[u8]) -> Option<Header> {
        let header = Header::parse(frame).ok();
        let link = self.port.find_link(self.now, |link| link.open(frame).is_ok());
        if link.is_none() {
            let counters = &self.fabric.counters;
            // A neighbour that has the keys first begins to probe before the handshake is done on our side.
            let counter = if self.port.has_links() {
                &counters.dropped_unauthenticated
            } else {
                &counters.dropped_no_link
            };
            counter.add(1);
        }
        self.from = Some(link?);
        self.by_key = true;
        header
    }

    fn arrived(&mut self, header: &Header, frame: &[u8], start: usize) {
        let fabric = self.fabric;
        if !self.table.fib.handles.contains_key(&header.source) {
            fabric.counters.dropped_unknown_source.add(1);
            return;
        }
        if header.kind == FrameKind::Fragment {
            return self.fragment(header, &frame[header.len..]);
        }
        let (end, stride) = (start + frame.len(), frame.len());
        if let Some(run) = self.local.back_mut() {
            let same = (run.source, run.pin) == (header.source, header.pin);
            let whole = (run.end - run.start).is_multiple_of(run.stride);
            if same
                && whole
                && run.end == start
                && run.header_len == header.len
                && stride <= run.stride
            {
                run.end = end;
                return;
            }
        }
        self.local.push_back(Run {
            source: header.source,
            pin: header.pin,
            start,
            end,
            stride,
            header_len: header.len,
        });
    }

    fn fragment(&self, header: &Header, payload: &[u8]) {
        let fabric = self.fabric;
        let Some((head, piece)) = FragmentHead::split(payload) else {
            fabric.counters.dropped_fragments.add(1);
            return;
        };
        let id = PacketId { source: header.source, pin: header.pin, packet: head.packet };
        let mut reassembly = fabric.reassembly.lock();
        let packet = reassembly.push(id, head, piece, self.now);
        fabric.counters.dropped_fragments.add(reassembly.take_dropped());
        drop(reassembly);
        let Some(packet) = packet else { return };
        fabric.counters.packets_reassembled.add(1);
        let run = Run {
            source: header.source,
            pin: header.pin,
            start: 0,
            end: packet.len(),
            stride: packet.len(),
            header_len: 0,
        };
        fabric.deliver(&mut packet.into(), &mut VecDeque::from([run]), self.meta.ecn);
    }

    fn transit(
        &mut self,
        header: &Header,
        label: Label,
        buffer: &mut [u8],
        start: usize,
        end: usize,
    ) {
        let fabric = self.fabric;
        let frame = &mut buffer[start..end];
        if !fabric.is_transit() || !self.may_pass(header, label, frame) {
            fabric.counters.dropped_not_transit.add(1);
            return;
        }
        let link = match self.table.by_label(label) {
            Some(link) if link.is_up() => {
                frame::advance(frame);
                link
            }
            known => match self.repair(header, label, frame) {
                Some(link) => link,
                None if known.is_some() => return fabric.counters.dropped_dead_link.add(1),
                None => return fabric.counters.dropped_unknown_label.add(1),
            },
        };
        if frame.len() > link.frame_len_max() {
            fabric.counters.dropped_oversize.add(1);
            return;
        }
        link.seal(frame);
        match &mut self.onward {
            Some(run) if run.end == start && Arc::ptr_eq(run.link, link) => run.end = end,
            _ => {
                self.flush(buffer);
                self.onward = Some(Onward { link, start, end });
            }
        }
    }

    /// Whether whoever wrote the labels may have us follow them. No way leads back over the link it came on, but for the detour of
    /// a repair: two routers would throw the frame to and fro as often as there is room for labels.
    fn may_pass(&self, header: &Header, label: Label, frame: &[u8]) -> bool {
        let Some(from) = &self.from else { return false };
        let is_back = self.table.by_label(label).is_some_and(|link| Arc::ptr_eq(link, from));
        !is_back && self.table.fib.may_pass(from.id(), label, header.labels_after_next(frame))
    }

    /// Leads a frame round a dead link, once in its life.
    #[cold]
    fn repair(
        &self,
        header: &Header,
        label: Label,
        frame: &mut [u8],
    ) -> Option<&'a Arc<FrameLink>> {
        if header.repaired {
            return None;
        }
        let rest: Vec<Label> = header.labels_after_next(frame).collect();
        let is_up = |id| self.table.up(id).is_some();
        let path = self.table.fib.repair(label, &rest, is_up)?;
        let link = self.table.up(path.first_link)?;
        frame::reroute(frame, &path.labels).ok()?;
        self.fabric.counters.frames_repaired.add(1);
        Some(link)
    }

    /// Sends the frames in transit collected so far. A router does not wait: what finds the socket full is dropped.
    fn flush(&mut self, buffer: &[u8]) {
        let Some(Onward { link, start, end }) = self.onward.take() else { return };
        let counters = &self.fabric.counters;
        let stride = self.meta.stride.max(1);
        let frames = (end - start).div_ceil(stride) as u64;
        match link.send(&buffer[start..end], stride, self.meta.ecn, self.now) {
            Ok(sent) => {
                let forwarded = sent.div_ceil(stride) as u64;
                counters.frames_forwarded.add(forwarded);
                counters.bytes_forwarded.add(sent as u64);
                counters.dropped_congestion.add(frames - forwarded);
            }
            Err(_) => counters.dropped_congestion.add(frames),
        }
    }
}
