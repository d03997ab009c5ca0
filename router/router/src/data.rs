//! The data plane as one thing: fabric, links, sessions, ingress and egress of one router, built in the order in which they need each other.

use crate::{
    credentials::{self, RouterCredentials},
    egress::Egress,
    fabric::Fabric,
    flows::{FlowCounters, FlowLimit, LocalRouter, Surroundings},
    ingress::{Ingress, IngressConfig},
    link::{self, HelloFor, LinkEvents, Links, LinksConfig},
    net,
    session::{self, Budget, Sessions, SessionsConfig},
};
use skein_core::{Fib, Handle, TrustView};
use std::{io, sync::Arc, time::Instant};
use tokio::{runtime, sync::watch};

/// Ceiling of flow buffers until the configuration names one, in bytes.
pub(crate) const MEMORY_BYTES_DEFAULT: u64 = 256 << 20;
/// Flows at each edge at a time until the configuration names a number.
pub(crate) const FLOWS_MAX_DEFAULT: usize = 100_000;

/// The parts, for whoever configures or asks them. Cheap to clone; may be used from any thread.
#[derive(Clone, Debug)]
pub(crate) struct DataPlane {
    pub(crate) fabric: Arc<Fabric>,
    pub(crate) links: Links,
    pub(crate) sessions: Sessions,
    pub(crate) ingress: Ingress,
    pub(crate) egress: Egress,
    pub(crate) budget: Arc<Budget>,
    pub(crate) limit: Arc<FlowLimit>,
    pub(crate) flows: Arc<FlowCounters>,
    fib: watch::Sender<Arc<Fib>>,
    services: watch::Sender<Arc<Fib>>,
    trust: watch::Sender<Arc<TrustView>>,
}

/// What a data plane is built from.
pub(crate) struct DataPlaneConfig {
    pub(crate) runtime: runtime::Handle,
    pub(crate) local: LocalRouter,
    pub(crate) handle: Handle,
    pub(crate) credentials: Arc<RouterCredentials>,
    pub(crate) hello: Arc<HelloFor>,
    pub(crate) site_secret: [u8; 32],
    pub(crate) seed: [u8; 32],
}

impl DataPlane {
    /// Builds every part, without a socket, link or listener yet. Must run on the runtime that shall carry the data path.
    ///
    /// # Errors
    /// When there is no such runtime.
    pub(crate) fn start(config: DataPlaneConfig) -> io::Result<(Self, LinkEvents)> {
        let DataPlaneConfig { runtime, local, handle, credentials, hello, site_secret, seed } =
            config;
        let fabric = Fabric::new(handle);
        // Another generator than that of the egress choice, whose decisions others can watch.
        let mut links_seed = seed;
        links_seed[0] ^= 1;
        let (links, events) = Links::start(LinksConfig {
            fabric: Arc::clone(&fabric),
            router: local.router,
            tls: credentials.tls().clone(),
            time: credentials::time(),
            hello,
            site_secret,
            udp_interval: link::UDP_INTERVAL,
            seed: links_seed,
        });
        let socket: Arc<dyn quinn::AsyncUdpSocket> = Arc::clone(&fabric) as _;
        let endpoint = session::endpoint(socket, &seed)?;
        let (fib, fib_seen) = watch::channel(Arc::default());
        let (services, services_seen) = watch::channel(Arc::default());
        let (trust, trust_seen) = watch::channel(Arc::new(TrustView::empty(local.site)));
        let budget = Budget::new(MEMORY_BYTES_DEFAULT);
        let limit = FlowLimit::new(local.site, FLOWS_MAX_DEFAULT, net::flow_descriptors_max());
        let flows = Arc::<FlowCounters>::default();
        let surroundings = Surroundings {
            runtime,
            local,
            fib: fib_seen,
            services: services_seen,
            trust: trust_seen,
            budget: Arc::clone(&budget),
            limit: Arc::clone(&limit),
            counters: Arc::clone(&flows),
            buffer: Arc::default(),
        };
        let egress = Egress::start(surroundings.clone());
        let sessions = Sessions::start(SessionsConfig {
            endpoint,
            tls: credentials.tls().clone(),
            egress: egress.clone(),
            surroundings: surroundings.clone(),
        });
        let ingress = Ingress::start(IngressConfig {
            sessions: sessions.clone(),
            egress: egress.clone(),
            surroundings,
            seed,
        });
        let plane = Self {
            fabric,
            links,
            sessions,
            ingress,
            egress,
            budget,
            limit,
            flows,
            fib,
            services,
            trust,
        };
        Ok((plane, events))
    }

    /// Takes a new view of the network into use: first where frames go, then where flows go.
    pub(crate) fn publish(&self, fib: &Arc<Fib>) {
        self.fabric.publish(Arc::clone(fib));
        self.fib.send_replace(Arc::clone(fib));
        self.services.send_if_modified(|known| {
            let changed = known.services_version != fib.services_version;
            *known = Arc::clone(fib);
            changed
        });
    }

    /// Takes a new view of who is trusted into use: sessions of others close at once.
    pub(crate) fn publish_trust(&self, trust: &Arc<TrustView>) {
        self.trust.send_replace(Arc::clone(trust));
    }

    /// Closes listeners and withdraws addresses at once, lets flows end until `deadline` and resets the rest; returns how many were reset. Links
    /// stay up: frames of others pass until [`Links::shutdown`].
    ///
    /// # Cancel safety
    /// Dropped midway, only the waiting ends.
    pub(crate) async fn drain(&self, deadline: Instant) -> u64 {
        self.sessions.refuse_flows();
        let (entered, left) =
            tokio::join!(self.ingress.drain(deadline), self.egress.drain(deadline));
        self.sessions.close(deadline).await;
        entered + left
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::metrics::Sources;
    use skein_core::{RouterId, SiteId};
    use skein_trust::{IdentityCell, TrustCell};
    use skein_wire::proto::routing::LinkHello;

    /// An idle data plane, for tests of what asks one.
    pub(crate) async fn sources() -> Sources {
        let (site, router) = (SiteId([1; 32]), RouterId([1; 16]));
        let trust = TrustCell::new(Arc::new(TrustView::empty(site)));
        let runtime = runtime::Handle::current();
        let (data, _events) = DataPlane::start(DataPlaneConfig {
            runtime: runtime.clone(),
            local: LocalRouter { router, site, boot_epoch: 1 },
            handle: Handle(7),
            credentials: RouterCredentials::new(trust, IdentityCell::empty()),
            hello: Arc::new(|_| LinkHello::default()),
            site_secret: [0; 32],
            seed: [0; 32],
        })
        .unwrap();
        tokio::task::yield_now().await;
        Sources {
            data,
            routing: Arc::default(),
            data_runtime: runtime.clone(),
            control_runtime: runtime,
        }
    }
}
