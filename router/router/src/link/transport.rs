//! QUIC settings of hop connections.

use crate::carrier::{HopSocket, UdpPort};
use quinn::{
    EndpointConfig, IdleTimeout, ServerConfig, TokioRuntime, TransportConfig, VarInt,
    crypto::rustls::{NoInitialCipherSuite, QuicClientConfig, QuicServerConfig},
};
use std::{io, sync::Arc, time::Duration};

/// Frames notice a dead path long before; this is for hop connections that are stuck while frames pass.
const IDLE_TIMEOUT_MS: u32 = 20_000;
const KEEP_ALIVE: Duration = Duration::from_secs(5);
/// Assumed before the first measurement: a lost first packet is repeated after three times this.
const INITIAL_RTT: Duration = Duration::from_millis(100);
/// Control messages in flight, and all that a neighbour can make us hold.
const WINDOW_BYTES: u32 = 1 << 20;
/// Handshakes waiting to be looked at; more are refused by the QUIC stack.
const INCOMING_MAX: usize = 64;
/// Memory of their early packets, in all.
const INCOMING_BYTES_MAX: u64 = 1 << 20;

/// An endpoint on a port: for dialling, and for accepting when there is a `server` configuration.
pub(super) fn endpoint(
    port: &Arc<UdpPort>,
    server: Option<ServerConfig>,
) -> io::Result<quinn::Endpoint> {
    let mut config = EndpointConfig::default();
    // Frames are told from QUIC by this bit.
    config.grease_quic_bit(false);
    let socket = Arc::new(HopSocket(Arc::clone(port)));
    quinn::Endpoint::new_with_abstract_socket(config, server, socket, Arc::new(TokioRuntime))
}

/// The settings of a dialled connection.
pub(super) fn client(
    tls: Arc<rustls::ClientConfig>,
) -> Result<quinn::ClientConfig, NoInitialCipherSuite> {
    let mut config = quinn::ClientConfig::new(Arc::new(QuicClientConfig::try_from(tls)?));
    config.transport_config(transport());
    Ok(config)
}

/// The settings of accepted connections.
pub(super) fn server(tls: Arc<rustls::ServerConfig>) -> Result<ServerConfig, NoInitialCipherSuite> {
    let mut config = ServerConfig::with_crypto(Arc::new(QuicServerConfig::try_from(tls)?));
    config.transport_config(transport());
    config.max_incoming(INCOMING_MAX);
    config.incoming_buffer_size_total(INCOMING_BYTES_MAX);
    Ok(config)
}

fn transport() -> Arc<TransportConfig> {
    let mut config = TransportConfig::default();
    config
        .max_idle_timeout(Some(IdleTimeout::from(VarInt::from_u32(IDLE_TIMEOUT_MS))))
        .keep_alive_interval(Some(KEEP_ALIVE))
        .initial_rtt(INITIAL_RTT)
        .max_concurrent_bidi_streams(VarInt::from_u32(1))
        .max_concurrent_uni_streams(VarInt::from_u32(0))
        .receive_window(VarInt::from_u32(WINDOW_BYTES))
        .stream_receive_window(VarInt::from_u32(WINDOW_BYTES))
        .send_window(u64::from(WINDOW_BYTES))
        .datagram_receive_buffer_size(None)
        // Frames find the size of packets out for themselves.
        .mtu_discovery_config(None);
    Arc::new(config)
}
