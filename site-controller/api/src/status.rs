//! Documents users read: what the controller answers to queries, and what `-o json` prints.
//!
//! Times are RFC 3339, durations microseconds. Fields are only ever added; readers ignore what they do not know and take
//! the default for what is absent, so that versions can differ.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::value::Protocol;

/// Derives what every document has.
macro_rules! document {
    ($(#[$meta:meta])* pub struct $name:ident { $($(#[$field_meta:meta])* pub $field:ident: $type:ty,)* }) => {
        $(#[$meta])*
        #[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
        #[serde(rename_all = "camelCase", default)]
        pub struct $name { $($(#[$field_meta])* pub $field: $type,)* }
    };
}

document! {
/// Something wrong and what to do about it.
pub struct Problem {
    /// What is wrong.
    pub what: String,
    /// Why, as far as known.
    pub why: String,
    /// The next step.
    pub fix: String,
}
}

document! {
/// Answer to the query `status`: this site.
pub struct SiteStatus {
    /// Name of the site.
    pub name: String,
    /// Namespace on this host.
    pub namespace: String,
    /// Site id.
    pub site_id: String,
    /// Id of the network.
    pub network_id: String,
    /// `interior` or `edge`.
    pub role: String,
    /// `linux`.
    pub platform: String,
    /// `systemd` or `none`.
    pub service: String,
    /// The controller process.
    pub controller: ProcessStatus,
    /// The router processes.
    pub routers: Vec<RouterStatus>,
    /// Endpoints others are told.
    pub advertise: Vec<String>,
    /// Links up.
    pub links_up: u32,
    /// Links in all, both directions.
    pub links_total: u32,
    /// Sites known, this one included.
    pub sites: u32,
    /// Addresses known.
    pub services: u32,
    /// Addresses served from here.
    pub connectors: u32,
    /// What is wrong.
    pub problems: Vec<Problem>,
}
}

document! {
/// A controller process.
pub struct ProcessStatus {
    /// Process id.
    pub pid: u32,
    /// Version of its program.
    pub version: String,
    /// Since when it runs.
    pub since: String,
}
}

document! {
/// A router process of this site.
pub struct RouterStatus {
    /// Name of the router.
    pub name: String,
    /// Router id.
    pub id: String,
    /// Process id; 0 while it is not attached.
    pub pid: u32,
    /// Version of its program.
    pub version: String,
    /// `attached`, `starting` or `down`.
    pub state: String,
    /// Since when.
    pub since: String,
    /// Boot epoch.
    pub boot_epoch: u64,
    /// Sockets for links.
    pub sockets: Vec<SocketStatus>,
    /// `ADDRESS:PORT` of its metrics.
    pub metrics: String,
    /// Flows now.
    pub flows_active: u64,
    /// Flows since it started.
    pub flows_total: u64,
    /// Bytes sent by flows since it started.
    pub bytes_sent: u64,
    /// Bytes received by flows since it started.
    pub bytes_received: u64,
    /// Memory in flow buffers, bytes.
    pub memory_used_bytes: u64,
}
}

document! {
/// A socket for links.
pub struct SocketStatus {
    /// `ADDRESS:PORT`.
    pub address: String,
    /// Why it is not bound; empty when it is.
    pub error: String,
}
}

document! {
/// Answer to the query `links`: one link.
pub struct LinkRow {
    /// Name of the link.
    pub name: String,
    /// Whether the peer dialled.
    pub incoming: bool,
    /// Name of the peer site.
    pub peer: String,
    /// Site id of the peer.
    pub peer_id: String,
    /// Name of the peer's router.
    pub peer_router: String,
    /// `up`, `connecting` or `down`.
    pub state: String,
    /// `udp` or `tls`.
    pub carrier: String,
    /// Why it is not `udp`, and the proxy in between; empty if it is, and for links that the peer dialled.
    pub carrier_reason: String,
    /// `ADDRESS:PORT` of the peer; what was asked for where a proxy leads to it.
    pub remote: String,
    /// `ADDRESS:PORT` here.
    pub local: String,
    /// Round-trip time, µs; 0 when unknown.
    pub rtt_us: u64,
    /// Cost.
    pub cost: u32,
    /// Largest packet, bytes.
    pub mtu: u32,
    /// Since when it is in this state.
    pub since: String,
    /// Why it is not up.
    pub error: String,
    /// What became of each endpoint while it is not up.
    pub attempts: Vec<Attempt>,
    /// Bytes sent.
    pub bytes_sent: u64,
    /// Bytes received.
    pub bytes_received: u64,
}
}

document! {
/// What became of one endpoint.
pub struct Attempt {
    /// `HOST:PORT`.
    pub endpoint: String,
    /// What happened.
    pub outcome: String,
}
}

document! {
/// Answer to the query `services`: one address.
pub struct ServiceRow {
    /// The address.
    pub address: String,
    /// Ports that any site serves.
    pub ports: Vec<ServicePort>,
    /// IP address of the automatic endpoint; empty when there is none.
    pub local_ip: String,
    /// Local endpoints, automatic and explicit.
    pub endpoints: Vec<Endpoint>,
    /// Who serves it.
    pub providers: Vec<Provider>,
    /// `ready`, `unreachable` (no path to any provider), `unserved` (listener without provider), `blocked` (endpoint not bound),
    /// `opening` (endpoint not bound yet).
    pub state: String,
    /// The state in a sentence, with the next step.
    pub message: String,
    /// How providers are chosen.
    pub strategy: String,
}
}

document! {
/// A port of an address.
pub struct ServicePort {
    /// The number.
    pub port: u16,
    /// What it carries.
    pub protocol: Protocol,
}
}

document! {
/// A local endpoint.
pub struct Endpoint {
    /// Port of the service.
    pub port: u16,
    /// What it carries.
    pub protocol: Protocol,
    /// `ADDRESS:PORT` to connect to; empty while it is not bound.
    pub bound: String,
    /// Whether it came by itself.
    pub automatic: bool,
    /// Whether it has another port than the service: an automatic endpoint whose own is privileged, reserved or taken here.
    pub fallback: bool,
    /// Name of the listener resource; empty for automatic ones.
    pub listener: String,
    /// Why it is not bound, with the holder of the port if known.
    pub error: String,
}
}

document! {
/// A site that serves an address.
pub struct Provider {
    /// Name of the site.
    pub site: String,
    /// Site id.
    pub site_id: String,
    /// Whether it is this site.
    pub local: bool,
    /// Whether there is a path.
    pub reachable: bool,
    /// Ports it serves.
    pub ports: Vec<ServicePort>,
    /// For local ones: targets and their health.
    pub targets: Vec<Target>,
}
}

document! {
/// A workload.
pub struct Target {
    /// `HOST:PORT`.
    pub target: String,
    /// What it takes.
    pub protocol: Protocol,
    /// Whether it answers. A target of datagrams cannot be asked, and is taken to do so.
    pub healthy: bool,
    /// Why not; of a target of datagrams, why the last one did not reach it.
    pub error: String,
}
}

document! {
/// Answer to the query `network`.
pub struct NetworkStatus {
    /// Id of the network.
    pub network_id: String,
    /// Every site known.
    pub sites: Vec<NetworkSite>,
    /// Every address known.
    pub services: Vec<ServiceRow>,
    /// What is wrong.
    pub problems: Vec<Problem>,
}
}

document! {
/// A site of the network.
pub struct NetworkSite {
    /// Name of the site.
    pub name: String,
    /// Site id.
    pub id: String,
    /// Whether it is this site.
    pub local: bool,
    /// Whether it is trusted.
    pub trusted: bool,
    /// `member` or `guest`.
    pub membership: String,
    /// Its routers.
    pub routers: Vec<NetworkRouter>,
    /// Addresses it serves.
    pub addresses: Vec<String>,
}
}

document! {
/// A router of the network.
pub struct NetworkRouter {
    /// Name of the router.
    pub name: String,
    /// Router id.
    pub id: String,
    /// `interior` or `edge`.
    pub role: String,
    /// Version of its program.
    pub version: String,
    /// Whether there is a path.
    pub reachable: bool,
    /// Links on the path.
    pub hops: u32,
    /// Path metric, µs.
    pub metric_us: u64,
    /// Its links.
    pub links: Vec<NetworkLink>,
}
}

document! {
/// A link as its router advertises it.
pub struct NetworkLink {
    /// Name of the peer site, or its id while the name is unknown.
    pub peer: String,
    /// Router id of the peer.
    pub peer_id: String,
    /// Cost.
    pub cost: u32,
    /// Round-trip time, µs.
    pub rtt_us: u64,
}
}

document! {
/// Answer to the query `tokens`: one grant.
pub struct TokenRow {
    /// Name of the grant.
    pub name: String,
    /// `valid`, `expired` or `used`.
    pub state: String,
    /// How many sites may redeem it.
    pub uses: u32,
    /// How many have.
    pub used: u32,
    /// When it was made.
    pub created: String,
    /// When it expires.
    pub expires: String,
    /// Cost of the links it makes.
    pub cost: u32,
    /// Whether redeemers become guests.
    pub guest: bool,
    /// Site ids of the redeemers.
    pub redeemers: Vec<String>,
}
}

document! {
/// Answer to a trace.
pub struct TraceReport {
    /// The address.
    pub address: String,
    /// The port; 0 means any.
    pub port: u16,
    /// Every router that serves it.
    pub candidates: Vec<TraceCandidate>,
    /// Why the chosen one is chosen, or why none is.
    pub why: String,
    /// Why there is no answer.
    pub error: String,
}
}

document! {
/// A router that serves the address.
pub struct TraceCandidate {
    /// Name of its site.
    pub site: String,
    /// Id of its site.
    pub site_id: String,
    /// Router id.
    pub router_id: String,
    /// Whether a new flow would go there now.
    pub chosen: bool,
    /// Why it is or is not taken.
    pub note: String,
    /// Paths to it, the one in use first.
    pub paths: Vec<TracePath>,
}
}

document! {
/// A path.
pub struct TracePath {
    /// From the first neighbour to the egress.
    pub hops: Vec<TraceHop>,
    /// Sum of the metrics, µs.
    pub metric_us: u64,
    /// Largest packet, bytes.
    pub mtu: u32,
    /// Round-trip time of the session over this path, µs; 0 when there is none.
    pub measured_rtt_us: u64,
}
}

document! {
/// A router on a path.
pub struct TraceHop {
    /// Name of the router.
    pub router: String,
    /// Router id.
    pub router_id: String,
    /// Name of its site.
    pub site: String,
    /// Round-trip time of the link that leads to it, µs.
    pub link_rtt_us: u64,
    /// Cost of that link.
    pub cost: u32,
}
}

document! {
/// Result of one check.
pub struct DoctorFinding {
    /// What was checked, in a few words.
    pub check: String,
    /// Whether it is fine.
    pub ok: bool,
    /// What was found.
    pub detail: String,
    /// What to do; empty when it is fine.
    pub fix: String,
}
}

document! {
/// Answer to the query `version`, completed by `skctl`.
pub struct VersionInfo {
    /// The command line.
    pub skctl: String,
    /// The controller; empty when there is none.
    pub controller: String,
    /// The routers.
    pub routers: Vec<RouterVersion>,
}
}

document! {
/// Version of a router.
pub struct RouterVersion {
    /// Name of the router.
    pub name: String,
    /// Version of its program.
    pub version: String,
}
}
