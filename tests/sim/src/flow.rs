//! Clients and targets: they write what both know, and verify what they read.

use crate::{
    association::Talks,
    scenario::{AssociationPlan, Script},
};
use bytes::{Buf as _, BytesMut};
use parking_lot::Mutex;
use skein_netsim::{Net, TcpListener, TcpStream};
use std::{collections::BTreeMap, io, net::SocketAddr, sync::Arc, time::Duration};
use tokio::{io::AsyncReadExt as _, time};

/// What a client says first: which flow it is, and how often it was tried before.
pub(crate) const HEAD_LEN: usize = 16;
/// Read at a time.
const READ_LEN: usize = 32 << 10;
/// Between looks whether the other end has said something.
const HEARD_CHECK: Duration = Duration::from_millis(20);
/// Until a client tries again to open a flow.
const REOPEN: Duration = Duration::from_millis(400);

/// How a stream ended, for who reads it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ended {
    Finished,
    Failed(io::ErrorKind),
}

/// What one end has seen and done.
#[derive(Clone, Debug, Default)]
pub(crate) struct Seen {
    pub(crate) began_ms: u64,
    pub(crate) written: u64,
    pub(crate) read: u64,
    pub(crate) wrong_at: Option<u64>,
    pub(crate) ended: Option<Ended>,
    /// When it was told how the other direction has ended.
    pub(crate) ended_ms: Option<u64>,
    /// It has finished or reset its own direction.
    pub(crate) has_ended: bool,
    pub(crate) over_ms: Option<u64>,
}

/// One try of a flow, from both ends; several targets if it went astray.
#[derive(Clone, Debug, Default)]
pub(crate) struct Attempt {
    pub(crate) client: Seen,
    /// With the site of the target.
    pub(crate) servers: Vec<(usize, Seen)>,
}

/// Everything that flows have seen, by flow and attempt.
#[derive(Debug, Default)]
pub(crate) struct Ledger(Mutex<BTreeMap<(usize, u32), Attempt>>);

impl Ledger {
    pub(crate) fn attempts(&self) -> BTreeMap<(usize, u32), Attempt> {
        self.0.lock().clone()
    }

    fn update(&self, at: Place, change: impl FnOnce(&mut Seen)) {
        let mut attempts = self.0.lock();
        let attempt = attempts.entry((at.flow, at.attempt)).or_default();
        match at.server {
            None => change(&mut attempt.client),
            Some(server) => change(&mut attempt.servers[server].1),
        }
    }
}

/// Which end of which try of which flow.
#[derive(Clone, Copy, Debug)]
struct Place {
    flow: usize,
    attempt: u32,
    server: Option<usize>,
}

/// What clients and targets share.
#[derive(Clone, Debug)]
pub(crate) struct Desk {
    pub(crate) net: Net,
    pub(crate) ledger: Arc<Ledger>,
    pub(crate) scripts: Arc<Vec<(Script, Script)>>,
    pub(crate) talks: Arc<Talks>,
    pub(crate) associations: Arc<Vec<AssociationPlan>>,
}

impl Desk {
    pub(crate) fn now_ms(&self) -> u64 {
        self.net.now_us() / 1_000
    }

    /// Accepts as the target of a site, until the runtime ends.
    pub(crate) async fn serve(self, site: usize, listener: TcpListener) {
        while let Ok((stream, _)) = listener.accept().await {
            let desk = self.clone();
            tokio::runtime::Handle::current().spawn(async move { desk.target(site, stream).await });
        }
    }

    async fn target(self, site: usize, mut stream: TcpStream) {
        let mut head = [0; HEAD_LEN];
        // Health checks say nothing.
        if stream.read_exact(&mut head).await.is_err() {
            return;
        }
        let (mut flow, mut attempt) = (&head[..8], &head[8..]);
        let (flow, attempt) = (flow.get_u64() as usize, attempt.get_u64() as u32);
        let Some((_, script)) = self.scripts.get(flow).cloned() else { return };
        let server = {
            let mut attempts = self.ledger.0.lock();
            let attempt = attempts.entry((flow, attempt)).or_default();
            attempt.servers.push((site, Seen { began_ms: self.now_ms(), ..Seen::default() }));
            attempt.servers.len() - 1
        };
        let place = Place { flow, attempt, server: Some(server) };
        self.talk(stream, &script, place).await;
    }

    /// Opens a flow at `entrance`, again and again until its server has said something, or it is too late.
    pub(crate) async fn client(
        self,
        flow: usize,
        entrance: (skein_netsim::Host, SocketAddr),
        give_up_ms: u64,
    ) {
        let Some((script, _)) = self.scripts.get(flow).cloned() else { return };
        for attempt in 0.. {
            if self.now_ms() > give_up_ms {
                return;
            }
            if let Ok(mut stream) = TcpStream::connect(&entrance.0, entrance.1, None).await {
                let place = Place { flow, attempt, server: None };
                let began_ms = self.now_ms();
                self.ledger.update(place, |seen| seen.began_ms = began_ms);
                let head = [(flow as u64).to_be_bytes(), u64::from(attempt).to_be_bytes()].concat();
                if tokio::io::AsyncWriteExt::write_all(&mut stream, &head).await.is_ok() {
                    self.talk(stream, &script, place).await;
                } else {
                    self.ledger.update(place, |seen| {
                        seen.ended = Some(Ended::Failed(io::ErrorKind::ConnectionReset));
                        seen.ended_ms = Some(began_ms);
                        seen.over_ms = Some(began_ms);
                    });
                }
                if self.ledger.0.lock()[&(flow, attempt)].client.read > 0 {
                    return;
                }
            }
            time::sleep(REOPEN).await;
        }
    }

    /// Writes and reads until both ways have ended.
    async fn talk(&self, stream: TcpStream, script: &Script, at: Place) {
        let writing = async {
            let written = self.write(&stream, script, at).await;
            if written.is_ok() {
                self.ledger.update(at, |seen| seen.has_ended = true);
                if script.resets {
                    return self.heard(at).await;
                }
                // Fails when the connection is over, which the reader sees.
                let _ = stream.finish();
            }
            std::future::pending::<()>().await;
        };
        let is_read = tokio::select! {
            biased;
            () = self.read(&stream, script, at) => true,
            () = writing => false,
        };
        if is_read && !self.has_ended(at) && !self.has_failed(at) {
            // The other way goes on.
            if self.write_rest(&stream, script, at).await.is_ok() {
                self.ledger.update(at, |seen| seen.has_ended = true);
                if !script.resets {
                    // Fails when the connection is over; then who reads at the other end is told.
                    let _ = stream.finish();
                }
            }
        }
        if script.resets && self.has_ended(at) {
            // It cannot fail here.
            let _ = stream.set_zero_linger();
        }
        let now_ms = self.now_ms();
        self.ledger.update(at, |seen| seen.over_ms = Some(now_ms));
    }

    /// Waits until the other end has said something.
    async fn heard(&self, at: Place) {
        let mut read = 0;
        while read == 0 {
            time::sleep(HEARD_CHECK).await;
            self.ledger.update(at, |seen| read = seen.read);
        }
    }

    fn has_ended(&self, at: Place) -> bool {
        let mut has_ended = false;
        self.ledger.update(at, |seen| has_ended = seen.has_ended);
        has_ended
    }

    fn has_failed(&self, at: Place) -> bool {
        let mut has_failed = false;
        self.ledger.update(at, |seen| has_failed = matches!(seen.ended, Some(Ended::Failed(_))));
        has_failed
    }

    async fn write(&self, stream: &TcpStream, script: &Script, at: Place) -> io::Result<()> {
        self.write_from(stream, script, at, 0).await
    }

    /// Goes on where [`write`](Self::write) was left.
    async fn write_rest(&self, stream: &TcpStream, script: &Script, at: Place) -> io::Result<()> {
        let mut written = 0;
        self.ledger.update(at, |seen| written = seen.written);
        self.write_from(stream, script, at, written).await
    }

    async fn write_from(
        &self,
        stream: &TcpStream,
        script: &Script,
        at: Place,
        skip: u64,
    ) -> io::Result<()> {
        let mut offset = 0;
        for (wait_ms, len) in &script.writes {
            let end = offset + *len as u64;
            if end <= skip {
                offset = end;
                continue;
            }
            offset = offset.max(skip);
            if *wait_ms > 0 {
                time::sleep(Duration::from_millis(*wait_ms)).await;
            }
            while offset < end {
                let bytes = pattern(at, offset, (end - offset).min(READ_LEN as u64) as usize);
                match stream.try_write(&bytes) {
                    Ok(len) => {
                        offset += len as u64;
                        self.ledger.update(at, |seen| seen.written = offset);
                    }
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                        stream.writable().await?;
                    }
                    Err(error) => return Err(error),
                }
            }
        }
        Ok(())
    }

    async fn read(&self, stream: &TcpStream, script: &Script, at: Place) {
        let from = Place { server: at.server.map_or(Some(0), |_| None), ..at };
        let mut buffer = BytesMut::with_capacity(READ_LEN);
        let mut offset = 0;
        let ended = loop {
            // It cannot fail here.
            let _ = stream.readable().await;
            buffer.clear();
            match stream.try_read_buf(&mut bytes::BufMut::limit(&mut buffer, READ_LEN)) {
                Ok(0) => break Ended::Finished,
                Ok(len) => {
                    let expected = pattern(from, offset, len);
                    let wrong = expected.iter().zip(&buffer).position(|(a, b)| a != b);
                    offset += len as u64;
                    self.ledger.update(at, |seen| {
                        seen.read = offset;
                        let wrong_at = wrong.map(|wrong| offset - (len - wrong) as u64);
                        seen.wrong_at = seen.wrong_at.or(wrong_at);
                    });
                    if script.reads_per_s > 0 {
                        let takes_ms = len as u64 * 1_000 / script.reads_per_s as u64;
                        time::sleep(Duration::from_millis(takes_ms)).await;
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => break Ended::Failed(error.kind()),
            }
        };
        let now_ms = self.now_ms();
        self.ledger.update(at, |seen| {
            seen.ended = Some(ended);
            seen.ended_ms = Some(now_ms);
        });
    }
}

/// What an end writes at an offset: no two flows, tries or directions the same.
fn pattern(at: Place, offset: u64, len: usize) -> Vec<u8> {
    let salt = (at.flow as u64) << 24 | u64::from(at.attempt) << 8 | u64::from(at.server.is_some());
    let salt = salt.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32;
    (offset..offset + len as u64)
        .map(|n| ((n ^ salt).wrapping_mul(0x2545_f491_4f6c_dd1d) >> 40) as u8)
        .collect()
}
