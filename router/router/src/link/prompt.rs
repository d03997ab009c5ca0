//! A TCP connection that acknowledges what arrives at once.
//!
//! Kernels wait for up to 40 ms, in case there is an answer to send the acknowledgement with. Proxies and balancers that did not turn Nagle's
//! algorithm off (RFC 896) send nothing small before the last is acknowledged: with both every little exchange would take so long.

use crate::net::{self, TcpStream};
use std::{
    io,
    net::SocketAddr,
    pin::Pin,
    task::{Context, Poll},
};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

#[derive(Debug)]
pub(super) struct Prompt {
    stream: TcpStream,
    due: Due,
}

impl Prompt {
    pub(super) fn new(stream: TcpStream) -> Self {
        Self { stream, due: Due::default() }
    }

    pub(super) fn local_addr(&self) -> io::Result<SocketAddr> {
        self.stream.local_addr()
    }
}

/// When to acknowledge: once all that has arrived was read, not with every read of it.
#[derive(Debug, Default)]
struct Due {
    /// The last read took all that it had room for; the next one acknowledges for both.
    is_put_off: bool,
}

impl Due {
    /// Whether to acknowledge after a read that took something or has to wait, and may have been stopped by the end of its buffer.
    fn after(&mut self, is_ready: bool, is_full: bool) -> bool {
        let was_put_off = std::mem::replace(&mut self.is_put_off, is_ready && is_full);
        if is_ready { !is_full } else { was_put_off }
    }
}

impl AsyncRead for Prompt {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let read = Pin::new(&mut self.stream).poll_read(cx, buf);
        // Every time: the kernel goes back to waiting when it likes.
        if self.due.after(read.is_ready(), buf.remaining() == 0) {
            net::tcp_acknowledge(&self.stream);
        }
        read
    }
}

impl AsyncWrite for Prompt {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_arrived_is_acknowledged_once_however_many_reads_it_takes() {
        let mut due = Due::default();
        let reads = [(true, true), (true, true), (true, false), (false, false)];
        assert_eq!(reads.map(|(ready, full)| due.after(ready, full)), [false, false, true, false]);
        // The last read took exactly what there was.
        let reads = [(true, true), (false, false), (false, false)];
        assert_eq!(reads.map(|(ready, full)| due.after(ready, full)), [false, true, false]);
    }
}
