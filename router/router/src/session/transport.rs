//! Settings of the end-to-end endpoint and of each connection.

use super::{Class, congestion, credit::WINDOW_BYTES_MAX, datagrams, inbound};
use aws_lc_rs::hmac;
use quinn::{
    AsyncUdpSocket, Endpoint, EndpointConfig, IdleTimeout, TransportConfig, VarInt,
    congestion::CubicConfig,
};
use quinn_proto::HashedConnectionIdGenerator;
use skein_core::{LABELS_MAX, Path};
use std::{io, sync::Arc, time::Duration};

/// At first; see [`inbound`] for how it follows what the session moves.
const CONNECTION_WINDOW_BYTES: u32 = 64 << 10;
const _: () = assert!(CONNECTION_WINDOW_BYTES as u64 == inbound::SLACK_BYTES);
/// Must exceed the largest credit: a writer blocked on a stream window would hold the ring and stop the whole session. What it allows
/// beyond the credit and what is read the connection's window does not.
const STREAM_WINDOW_BYTES: u32 = 128 << 20;
const _: () = assert!(STREAM_WINDOW_BYTES as u64 > WINDOW_BYTES_MAX);
/// Send window of a session that does not write; see [`super::window`] for one that does.
pub(super) const SEND_WINDOW_BYTES_IDLE: u64 = 32 << 10;
/// What a session may make us hold whatever its flows are granted, in both directions: paid for as long as it lasts.
pub const SESSION_BYTES: u64 = inbound::SLACK_BYTES + SEND_WINDOW_BYTES_IDLE;
/// Every QUIC path must carry this, and every carrier does.
const MTU_MIN: u16 = 1_200;
/// Largest packet a session uses, whatever a path claims; bounds quinn's receive buffers.
const MTU_MAX: u16 = 9_000;
/// What the long frame header has more than the ordinary one, which is all that a path's MTU accounts for.
const LONG_HEADER_EXTRA: u16 = 32;
/// A silent session is probed this often.
const KEEP_ALIVE: Duration = Duration::from_secs(5);
/// Longer than the longest reroute that flows are to survive, after which sessions are closed for lack of a path.
const IDLE_MAX: Duration = Duration::from_secs(45);
/// In round trips; quinn's 3 would throw away the congestion window whenever a reroute takes a second.
const PERSISTENT_CONGESTION_RTTS: u32 = 1_000;
/// First flight: what a LAN takes, and what the congestion controller corrects within a round trip elsewhere.
const INITIAL_WINDOW_BYTES: u64 = 1 << 20;
/// Below, a busy peer that needs a few milliseconds for the handshake would be asked again for nothing.
const INITIAL_RTT_MIN: Duration = Duration::from_millis(25);
/// RFC 9002's own initial value, for when the path is unknown.
const INITIAL_RTT_MAX: Duration = Duration::from_millis(333);

/// Flows a peer may have open in a session at first; quinn keeps state for each whether open or not, so it grows with use.
pub(super) const STREAMS_INITIAL: u32 = 256;

/// Which end of a session.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Role {
    /// Opens flows.
    Initiator,
    /// Accepts flows.
    Responder,
}

/// Largest packet of a session over `path`; without one, what every path can do.
pub(super) fn mtu(path: Option<&Path>) -> u16 {
    path.map_or(MTU_MIN, |path| {
        // More labels take the long frame header.
        let longer = if path.labels.len() > LABELS_MAX { LONG_HEADER_EXTRA } else { 0 };
        path.mtu.saturating_sub(longer).clamp(MTU_MIN, MTU_MAX)
    })
}

/// Settings of one connection of this class over `path`.
pub(super) fn transport(role: Role, class: Class, path: Option<&Path>) -> Arc<TransportConfig> {
    let rtt = path.map_or(INITIAL_RTT_MAX, |path| Duration::from_micros(path.metric_us));
    let mut cubic = CubicConfig::default();
    cubic.initial_window(INITIAL_WINDOW_BYTES);
    let mut transport = TransportConfig::default();
    transport
        .initial_mtu(mtu(path))
        .min_mtu(MTU_MIN)
        .mtu_discovery_config(None)
        .initial_rtt(rtt.clamp(INITIAL_RTT_MIN, INITIAL_RTT_MAX))
        .receive_window(VarInt::from_u32(CONNECTION_WINDOW_BYTES))
        .stream_receive_window(VarInt::from_u32(STREAM_WINDOW_BYTES))
        .send_window(SEND_WINDOW_BYTES_IDLE)
        .send_fairness(true)
        .persistent_congestion_threshold(PERSISTENT_CONGESTION_RTTS)
        .congestion_controller_factory(Arc::new(congestion::Factory(Arc::new(cubic))))
        // One end suffices: its probes are acknowledged.
        .keep_alive_interval((role == Role::Initiator).then_some(KEEP_ALIVE))
        .max_idle_timeout(IdleTimeout::try_from(IDLE_MAX).ok())
        .max_concurrent_uni_streams(VarInt::from_u32(0))
        .max_concurrent_bidi_streams(VarInt::from_u32(match role {
            Role::Initiator => 0,
            Role::Responder => STREAMS_INITIAL,
        }))
        .datagram_send_buffer_size(datagrams::SEND_BUFFER_BYTES)
        // `None` refuses datagrams of the peer. Who answers hears only later what a session is for.
        .datagram_receive_buffer_size(match (role, class) {
            (Role::Initiator, Class::Streams) => None,
            _ => Some(datagrams::RECEIVE_BUFFER_BYTES),
        });
    Arc::new(transport)
}

/// The end-to-end endpoint over the virtual socket of the fabric.
///
/// The keys of resets and connection ids derive from `seed`, which is this boot's alone: the next boot has another address, from which
/// QUIC takes no reset, and shared with other routers the key would let whoever reaches two of them make the one reset sessions of the
/// other. Sessions with a boot that is gone end when the network's view says so.
///
/// # Errors
/// When there is no runtime to run on.
pub fn endpoint(socket: Arc<dyn AsyncUdpSocket>, seed: &[u8; 32]) -> io::Result<Endpoint> {
    let reset_key = hmac::Key::new(hmac::HMAC_SHA256, derived(seed, b"reset").as_ref());
    let ids = derived(seed, b"connection-ids");
    let ids = u64::from_be_bytes(*ids.as_ref().first_chunk().expect("invariant: 32 bytes"));
    let mut config = EndpointConfig::new(Arc::new(reset_key));
    config
        .cid_generator(move || Box::new(HashedConnectionIdGenerator::from_key(ids)))
        .grease_quic_bit(false)
        .max_udp_payload_size(MTU_MAX)
        .map_err(|error| io::Error::new(io::ErrorKind::InvalidInput, error))?;
    Endpoint::new_with_abstract_socket(config, None, socket, Arc::new(quinn::TokioRuntime))
}

fn derived(seed: &[u8; 32], purpose: &[u8]) -> hmac::Tag {
    hmac::sign(&hmac::Key::new(hmac::HMAC_SHA256, seed), purpose)
}
