//! A UDP port together with the task that reads it.

use super::Inner;
use crate::carrier::UdpPort;
use std::{io, sync::Arc};
use tokio::net::UdpSocket;
use tokio_util::task::AbortOnDropHandle;

/// Read as long as somebody holds it.
#[derive(Debug)]
pub(super) struct ReadPort {
    udp: Arc<UdpPort>,
    _reader: AbortOnDropHandle<()>,
}

impl Drop for ReadPort {
    fn drop(&mut self) {
        self.udp.detach_all();
    }
}

impl ReadPort {
    /// Starts to read `socket`.
    pub(super) fn new(inner: &Inner, socket: UdpSocket) -> io::Result<Arc<Self>> {
        let udp = UdpPort::new(socket)?;
        let reader = inner.spawn(Arc::clone(&udp).run(Arc::clone(&inner.fabric)));
        Ok(Arc::new(Self { udp, _reader: AbortOnDropHandle::new(reader) }))
    }

    pub(super) fn udp(&self) -> &Arc<UdpPort> {
        &self.udp
    }
}
