//! Explains where a flow to an address would go now, and why.

use super::Control;
use skein_core::{
    Address, LinkAdvert, Path, Pin, Port, Protocol, Provider, RouterId, Verdict, Wanted, choose,
};
use skein_wire::proto::{
    control::{TraceCandidate, TraceHop, TracePath, TraceReply, TraceRequest},
    routing,
};

impl Control {
    /// The candidates for an address with the verdict on each, their paths and what was measured on them.
    pub(super) fn trace(&self, request: &TraceRequest) -> TraceReply {
        let reply = TraceReply { id: request.id, chosen: -1, ..TraceReply::default() };
        let address = match request.address.parse::<Address>() {
            Ok(address) => address,
            Err(error) => return TraceReply { error: error.to_string(), ..reply },
        };
        let port = match u16::try_from(request.port) {
            Ok(0) => None,
            Ok(port) => Some(Port { port, protocol: protocol(request.protocol()) }),
            Err(_) => return TraceReply { error: "a port is at most 65535".into(), ..reply },
        };
        let wanted = Wanted { address: &address, port, excluded: &[] };
        // What decides among equals is drawn per flow; a trace shows the first of them.
        let choice = choose(&self.fib, wanted, &|_| 0, 0);
        let chosen = choice.candidates.iter().position(|(_, verdict)| *verdict == Verdict::Chosen);
        let candidates: Vec<_> = choice
            .candidates
            .iter()
            .map(|(provider, verdict)| self.candidate(provider, *verdict))
            .collect();
        let why = match (&choice.strategy, chosen) {
            (Some(strategy), Some(_)) => {
                format!("strategy {}", format!("{strategy:?}").to_lowercase())
            }
            (Some(_), None) => "no reachable provider serves this port".into(),
            (None, _) => "no router that can be reached serves this address".into(),
        };
        let chosen = chosen.and_then(|index| i32::try_from(index).ok()).unwrap_or(-1);
        TraceReply { candidates, chosen, why, ..reply }
    }

    fn candidate(&self, provider: &Provider, verdict: Verdict) -> TraceCandidate {
        let route = self.fib.routes.get(&provider.router);
        let paths = route.map_or(&[][..], |route| &route.paths);
        let trusted = self.view.site(provider.site);
        TraceCandidate {
            router_id: provider.router.0.to_vec(),
            site_id: provider.site.0.to_vec(),
            site_name: trusted.map(|site| site.name.to_string()).unwrap_or_default(),
            note: verdict.as_str().to_owned(),
            paths: (0..)
                .zip(paths)
                .map(|(pin, path)| self.path(provider, Pin(pin), path))
                .collect(),
        }
    }

    fn path(&self, provider: &Provider, pin: Pin, path: &Path) -> TracePath {
        let measured = self.data.sessions.rtt(provider.router, pin).unwrap_or_default();
        TracePath {
            hops: self.hops(path),
            metric_us: path.metric_us,
            mtu: path.mtu.into(),
            measured_rtt_us: super::micros(measured).into(),
        }
    }

    /// Each hop with the link that leads to it: ours first, then those the labels name at each transit.
    fn hops(&self, path: &Path) -> Vec<TraceHop> {
        let lsdb = self.engine.lsdb();
        let ours = |advert: &&LinkAdvert| advert.link == path.first_link;
        let first = lsdb.lsa(self.site.router).and_then(|lsa| lsa.links.iter().find(ours));
        let further = path.hops.iter().zip(&path.labels).map(|(transit, label)| {
            lsdb.lsa(*transit)?.links.iter().find(|advert| advert.label == *label)
        });
        let links = std::iter::once(first).chain(further);
        path.hops.iter().zip(links).map(|(hop, link)| self.hop(*hop, link)).collect()
    }

    fn hop(&self, router: RouterId, link: Option<&LinkAdvert>) -> TraceHop {
        let lsa = self.engine.lsdb().lsa(router);
        TraceHop {
            router_id: router.0.to_vec(),
            router_name: lsa.map(|lsa| lsa.name.to_string()).unwrap_or_default(),
            site_name: lsa.map(|lsa| lsa.site_name.to_string()).unwrap_or_default(),
            link_rtt_us: link.map_or(0, |link| link.rtt_us.into()),
            cost: link.map_or(0, |link| link.cost.into()),
        }
    }
}

fn protocol(asked: routing::Protocol) -> Protocol {
    match asked {
        routing::Protocol::Udp => Protocol::Udp,
        routing::Protocol::Tcp | routing::Protocol::Unspecified => Protocol::Tcp,
    }
}
