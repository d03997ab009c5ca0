//! A port together with the task that serves it.

use super::Inner;
use crate::{
    carrier::{Port, Through, TlsPort, UdpPort},
    net::UdpSocket,
};
use std::{io, net::SocketAddr, sync::Arc};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio_util::{
    sync::{CancellationToken, DropGuard},
    task::AbortOnDropHandle,
};

/// Served as long as somebody holds it.
#[derive(Debug)]
pub(super) struct ServedPort {
    port: Port,
    _task: Task,
}

/// What ends with the port.
#[derive(Debug)]
enum Task {
    /// Reads; nobody misses what it has not read.
    Reader { _handle: AbortOnDropHandle<()> },
    /// Reads and writes; what is queued may still leave.
    Both { _closing: DropGuard },
}

impl Drop for ServedPort {
    fn drop(&mut self) {
        self.port.detach_all();
    }
}

impl ServedPort {
    /// Starts to read `socket`.
    pub(super) fn udp(inner: &Inner, socket: UdpSocket) -> io::Result<Arc<Self>> {
        let udp = UdpPort::new(socket)?;
        let reader = inner.spawn(Arc::clone(&udp).run(Arc::clone(&inner.fabric)));
        let task = Task::Reader { _handle: AbortOnDropHandle::new(reader) };
        Ok(Arc::new(Self { port: Port::Udp(udp), _task: task }))
    }

    /// Starts to move datagrams over a TLS connection between these addresses.
    pub(super) fn tls(
        inner: &Inner,
        stream: impl AsyncRead + AsyncWrite + Send + 'static,
        (local, remote): (SocketAddr, SocketAddr),
        through: Option<Through>,
    ) -> Arc<Self> {
        let counters = Arc::clone(inner.fabric.counters());
        let tls = TlsPort::new(local, remote, through, counters);
        let closing = CancellationToken::new();
        // Owned by the tracker, and ended by the guard.
        drop(inner.spawn(Arc::clone(&tls).run(stream, Arc::clone(&inner.fabric), closing.clone())));
        let task = Task::Both { _closing: closing.drop_guard() };
        Arc::new(Self { port: Port::Tls(tls), _task: task })
    }

    pub(super) fn port(&self) -> &Port {
        &self.port
    }
}
