//! QUIC settings of hop connections.

use crate::carrier::{HopSocket, Port};
use aws_lc_rs::hmac;
use quinn::{
    ConnectionId, ConnectionIdGenerator, EndpointConfig, IdleTimeout, ServerConfig, TokioRuntime,
    TransportConfig, VarInt,
    crypto::rustls::{NoInitialCipherSuite, QuicClientConfig, QuicServerConfig},
};
use rand::{RngCore as _, SeedableRng as _, rngs::StdRng};
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

/// Length of our connection ids.
const CONNECTION_ID_LEN: usize = 8;

/// An endpoint for dialling on a port of its own.
pub(super) fn dialling(port: &Port) -> io::Result<quinn::Endpoint> {
    endpoint(port, EndpointConfig::default(), None)
}

/// An endpoint that accepts on a port. It resets the connections of the router's earlier boots, whose neighbours need not wait
/// for a timeout then: the key of resets derives from `site_secret`, and every connection id may be one of an earlier boot.
pub(super) fn accepting(
    port: &Port,
    server: ServerConfig,
    site_secret: &[u8; 32],
    seed: [u8; 32],
) -> io::Result<quinn::Endpoint> {
    let secret = hmac::Key::new(hmac::HMAC_SHA256, site_secret);
    let reset_key = hmac::sign(&secret, b"skein-link-reset/1");
    let reset_key = hmac::Key::new(hmac::HMAC_SHA256, reset_key.as_ref());
    let mut config = EndpointConfig::new(Arc::new(reset_key));
    config.cid_generator(move || Box::new(ConnectionIds(StdRng::from_seed(seed))));
    endpoint(port, config, Some(server))
}

fn endpoint(
    port: &Port,
    mut config: EndpointConfig,
    server: Option<ServerConfig>,
) -> io::Result<quinn::Endpoint> {
    // Frames are told from QUIC by this bit.
    config.grease_quic_bit(false);
    let socket = Arc::new(HopSocket(port.clone()));
    quinn::Endpoint::new_with_abstract_socket(config, server, socket, Arc::new(TokioRuntime))
}

/// Random connection ids, all of which pass for ours.
struct ConnectionIds(StdRng);

impl ConnectionIdGenerator for ConnectionIds {
    fn generate_cid(&mut self) -> ConnectionId {
        let mut id = [0; CONNECTION_ID_LEN];
        self.0.fill_bytes(&mut id);
        ConnectionId::new(&id)
    }

    fn cid_len(&self) -> usize {
        CONNECTION_ID_LEN
    }

    fn cid_lifetime(&self) -> Option<Duration> {
        None
    }
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
