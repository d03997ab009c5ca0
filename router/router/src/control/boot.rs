//! From nothing to a data plane: the controller says who this router is, certifies its key and sends a configuration.

use super::{ControlConfig, hello::HelloBook};
use crate::{
    api::Order,
    clock,
    credentials::RouterCredentials,
    data::{DataPlane, DataPlaneConfig},
    flows::LocalRouter,
    link::LinkEvents,
};
use skein_core::{Engine, Identity, RouterId, SiteId, TrustView};
use skein_trust::{IdentityCell, RouterIdentity, RouterNotary, TrustCell, router_id};
use skein_wire::{
    convert,
    proto::control::{Drained, ProbeReply, RouterConfig, TraceReply, Welcome, from_router},
};
use std::{io, sync::Arc};

/// Certificates live three days and are renewed daily: two renewals may fail.
pub(super) const CERTIFICATE_RENEW_BEFORE_S: i64 = 48 * 60 * 60;
/// Lowest and highest version of the protocol between routers that this one speaks.
const PROTOCOL: (u32, u32) = (1, 1);

/// Everything the loop needs that it takes a controller to know.
pub(super) struct Booted {
    pub(super) config: ControlConfig,
    /// The configuration, if it came before the certificate.
    pub(super) first: Option<(u64, Arc<RouterConfig>)>,
    pub(super) welcome: Welcome,
    pub(super) identity: Arc<IdentityCell>,
    pub(super) trust: Arc<TrustCell>,
    pub(super) hello: Arc<HelloBook>,
    pub(super) engine: Engine<RouterNotary>,
    pub(super) data: DataPlane,
    pub(super) events: LinkEvents,
    pub(super) router: RouterId,
}

/// Who the controller says we are.
struct Named {
    welcome: Welcome,
    site: SiteId,
    site_secret: [u8; 32],
}

/// Waits for name and certificate, then builds the data plane; `None` when told to end before.
///
/// # Errors
/// When the data plane's runtime is gone.
pub(super) async fn boot(mut config: ControlConfig) -> io::Result<Option<Booted>> {
    let mut waiting = Waiting::default();
    let Some((named, identity)) = waiting.introduce(&mut config).await else { return Ok(None) };
    let Named { welcome, site, site_secret } = named;
    let name = &config.config.name;
    let router = router_id(site, name);
    tracing::info!(%site, %router, boot_epoch = welcome.boot_epoch, "router starts");
    let identity = IdentityCell::new(Arc::new(identity));
    let trust = TrustCell::new(Arc::new(TrustView::empty(site)));
    let notary = RouterNotary::new(Arc::clone(&identity), router, welcome.boot_epoch);
    let engine = Engine::new(
        Identity {
            router,
            site,
            name: name.as_str().into(),
            boot_epoch: welcome.boot_epoch,
            version: env!("CARGO_PKG_VERSION").into(),
            protocol: PROTOCOL,
        },
        notary,
    );
    let hello = HelloBook::new(router, site, name, &welcome, engine.handle());
    let data = DataPlaneConfig {
        runtime: config.runtimes.data.clone(),
        local: LocalRouter { router, site, boot_epoch: welcome.boot_epoch },
        handle: engine.handle(),
        credentials: RouterCredentials::new(Arc::clone(&trust), Arc::clone(&identity)),
        hello: hello.for_links(),
        site_secret,
        seed: config.config.seed,
    };
    let built = config.runtimes.data.spawn(async move { DataPlane::start(data) }).await;
    let (data, events) = built.map_err(io::Error::other)??;
    let first = waiting.configuration;
    Ok(Some(Booted {
        config,
        first,
        welcome,
        identity,
        trust,
        hello,
        engine,
        data,
        events,
        router,
    }))
}

/// What has arrived while the router does not know who it is yet.
#[derive(Default)]
struct Waiting {
    named: Option<Named>,
    configuration: Option<(u64, Arc<RouterConfig>)>,
}

impl Waiting {
    /// Obeys the controller until it has named and certified us.
    async fn introduce(&mut self, config: &mut ControlConfig) -> Option<(Named, RouterIdentity)> {
        loop {
            tokio::select! {
                order = config.controller.orders.recv() => { // cancel-safe
                    if let Some(identity) = self.obey(order?, config) {
                        return self.named.take().map(|named| (named, identity));
                    }
                }
                Some(request) = config.drains.recv() => { // cancel-safe
                    if let Some(done) = request.done {
                        // Whoever asked may have stopped waiting.
                        let _ = done.send(0);
                    }
                    return None;
                }
            }
        }
    }

    fn obey(&mut self, order: Order, config: &ControlConfig) -> Option<RouterIdentity> {
        let controller = &config.controller;
        match order {
            Order::Attached(welcome) => match Named::new(welcome) {
                Ok(named) => {
                    controller.facts.boot_epoch.send_replace(named.welcome.boot_epoch);
                    let good_until = clock::unix_s() + CERTIFICATE_RENEW_BEFORE_S;
                    let site = named.site;
                    self.named = Some(named);
                    let cached = config.key.cached(site, &config.config.name, good_until);
                    if cached.is_none() {
                        controller.facts.csr.send_replace(Some(config.key.csr().to_vec()));
                    }
                    return cached;
                }
                Err(what) => tracing::error!(what, "the controller's welcome is malformed"),
            },
            Order::Certificate(certificate) => match (config.key.accept(&certificate), &self.named)
            {
                (Ok(identity), Some(named)) if identity.site() == named.site => {
                    controller.facts.csr.send_replace(None);
                    return Some(identity);
                }
                (Ok(_), _) => tracing::error!("the certificate is another site's"),
                (Err(error), _) => tracing::error!(%error, "the certificate cannot be used"),
            },
            Order::Configure { version, config } => self.configuration = Some((version, config)),
            Order::Trace(request) => {
                let error = "the router waits for its certificate".into();
                let reply =
                    TraceReply { id: request.id, error, chosen: -1, ..TraceReply::default() };
                controller.reply(from_router::Message::Trace(reply));
            }
            Order::Probe(request) => {
                let reply = ProbeReply { id: request.id, results: Vec::new() };
                controller.reply(from_router::Message::Probe(reply));
            }
            Order::Drain(_) => {
                controller.reply(from_router::Message::Drained(Drained { flows_reset: 0 }));
            }
        }
        None
    }
}

impl Named {
    fn new(welcome: Welcome) -> Result<Self, &'static str> {
        let site = convert::parse_site_id(&welcome.site_id).map_err(|_| "site id")?;
        let site_secret = welcome.site_secret.as_slice().try_into().map_err(|_| "site secret")?;
        if welcome.boot_epoch == 0 || welcome.boot_epoch > u64::from(u32::MAX) {
            return Err("boot epoch");
        }
        Ok(Self { welcome, site, site_secret })
    }
}
