//! What links tell people: status and probes.

use super::{Dialled, Inner, Links, Registered, race, tls, tls::Way};
use crate::{clock, net};
use skein_core::LinkId;
use skein_wire::proto::control::{BoundSocket, LinkStatus, ProbeResult, link_status::LinkState};
use std::{net::SocketAddr, sync::Arc};
use tokio::task::JoinSet;

/// Endpoints one probe request may name.
const PROBES_MAX: usize = 64;

impl Links {
    /// State of every configured and every incoming link.
    #[must_use]
    pub fn status(&self) -> Vec<LinkStatus> {
        let links = self.0.links.lock();
        let dialled = self.0.dialled.lock();
        let mut all: Vec<LinkStatus> = dialled
            .values()
            .map(|configured| {
                let progress = configured.progress.lock();
                let link = progress.up.and_then(|id: LinkId| links.get(&id));
                let mut status = link.map_or_else(|| connecting(configured), up);
                status.name.clone_from(&configured.config.name);
                status.attempts = progress.attempts();
                status.error.clone_from(&progress.error);
                let through = link.and_then(|link| link.frames.carrier().through());
                status.carrier_reason = match through {
                    Some(through) => {
                        format!("{}, through the proxy {}", progress.not_udp, through.proxy)
                    }
                    None => progress.not_udp.clone(),
                };
                if link.is_none() {
                    status.since_unix_ms = progress.since_unix_ms;
                }
                status
            })
            .collect();
        let mut incoming: Vec<LinkStatus> =
            links.values().filter(|link| link.up.incoming).map(up).collect();
        incoming.sort_by(|a, b| {
            (&a.name, &a.peer_router_id, a.since_unix_ms).cmp(&(
                &b.name,
                &b.peer_router_id,
                b.since_unix_ms,
            ))
        });
        all.append(&mut incoming);
        all
    }

    /// The addresses asked for and what became of each.
    #[must_use]
    pub fn sockets(&self) -> Vec<BoundSocket> {
        let listening = self.0.listening.lock();
        let socket = |(asked, listening): (&SocketAddr, &super::Listening)| {
            let bound = listening.bound.lock();
            BoundSocket {
                address: bound.local.unwrap_or(*asked).to_string(),
                error: bound.error.clone(),
            }
        };
        listening.iter().map(socket).collect()
    }

    /// Tries endpoints from where this router stands: a QUIC handshake over UDP and a TLS handshake over TCP. At most 64 are tried.
    ///
    /// # Cancel safety
    /// Cancel-safe.
    pub async fn probe(&self, endpoints: Vec<String>) -> Vec<ProbeResult> {
        let mut probes = JoinSet::new();
        for (i, endpoint) in endpoints.into_iter().take(PROBES_MAX).enumerate() {
            let inner = Arc::clone(&self.0);
            probes.spawn_on(async move { (i, probe(&inner, endpoint).await) }, &self.0.runtime);
        }
        let mut results = probes.join_all().await;
        results.sort_by_key(|(i, _)| *i);
        results.into_iter().map(|(_, result)| result).collect()
    }
}

fn connecting(configured: &Dialled) -> LinkStatus {
    LinkStatus {
        peer_site_id: configured.config.peer_site_id.clone(),
        cost: configured.config.cost,
        state: LinkState::Connecting.into(),
        ..LinkStatus::default()
    }
}

fn up(link: &Registered) -> LinkStatus {
    let carrier = link.frames.carrier();
    let through = carrier.through();
    let (bytes_sent, bytes_received) = link.frames.traffic();
    let text =
        |addr: SocketAddr| SocketAddr::new(addr.ip().to_canonical(), addr.port()).to_string();
    LinkStatus {
        name: link.up.name.clone(),
        incoming: link.up.incoming,
        peer_site_id: link.up.peer.site.0.to_vec(),
        peer_site_name: link.up.hello.site_name.clone(),
        peer_router_id: link.up.peer.router.0.to_vec(),
        peer_router_name: link.up.peer.name.clone(),
        state: LinkState::Up.into(),
        carrier: carrier.name().to_owned(),
        remote: through.map_or_else(|| text(carrier.remote()), |it| it.endpoint.clone()),
        local: carrier.local().map(text).unwrap_or_default(),
        rtt_us: u64::try_from(link.frames.rtt().as_micros()).unwrap_or(u64::MAX),
        cost: link.up.cost,
        mtu: u32::from(link.frames.mtu()),
        since_unix_ms: link.since_unix_ms,
        peer_clock_ahead_ms: peer_clock_ahead_ms(link),
        bytes_sent,
        bytes_received,
        ..LinkStatus::default()
    }
}

/// How far the neighbour's clock is ahead of this one, both as they were at the hello but for what this one was set since.
fn peer_clock_ahead_ms(link: &Registered) -> Option<i64> {
    let sent_unix_ms = link.up.hello.sent_unix_ms;
    if sent_unix_ms == 0 {
        return None;
    }
    let passed_ms = i64::try_from(clock::now().duration_since(link.since).as_millis()).ok()?;
    let set_ms = clock::unix_ms().saturating_sub(link.since_unix_ms).saturating_sub(passed_ms);
    Some(sent_unix_ms.saturating_sub(link.since_unix_ms).saturating_sub(set_ms))
}

async fn probe(inner: &Inner, endpoint: String) -> ProbeResult {
    let proxy = inner.proxy_for(&endpoint);
    let mut tcp = Vec::new();
    if let Some(proxy) = proxy.clone() {
        tcp.push(tls::probe(inner, &endpoint, Way::Through(proxy)).await);
    }
    let (mut udp, mut rtt_us) = (String::new(), 0);
    match net::resolve(&endpoint).await {
        Ok(addrs) => {
            for addr in addrs {
                let direct = async {
                    match proxy {
                        Some(_) => None,
                        None => Some(tls::probe(inner, &endpoint, Way::Direct(addr)).await),
                    }
                };
                let (over_udp, over_tcp) = tokio::join!(race::probe_udp(inner, addr), direct);
                tcp.extend(over_tcp);
                match over_udp {
                    Ok(rtt) if udp != OK => {
                        rtt_us = u64::try_from(rtt.as_micros()).unwrap_or(u64::MAX);
                        OK.clone_into(&mut udp);
                    }
                    Ok(_) => {}
                    Err(error) if udp.is_empty() => udp = error.to_string(),
                    Err(_) => {}
                }
            }
        }
        Err(error) => udp = format!("{endpoint} does not resolve: {error}"),
    }
    let tcp = if tcp.iter().any(Result::is_ok) {
        OK.to_owned()
    } else {
        let first = tcp.into_iter().find_map(Result::err);
        first.map_or_else(|| udp.clone(), |error| error.to_string())
    };
    ProbeResult { endpoint, udp, tcp, rtt_us }
}

/// What a probe that worked is reported as.
const OK: &str = "ok";
