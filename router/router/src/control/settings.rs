//! Applies a configuration: everything in it live, and what cannot be applied named.

use super::Control;
use crate::{
    data::{FLOWS_MAX_DEFAULT, MEMORY_BYTES_DEFAULT},
    metrics::{Page, Sources, serve},
    net,
};
use skein_core::{Input, Record, Role, Settings};
use skein_proxy::{Bypass, Proxy};
use skein_wire::{
    convert,
    proto::{
        control::{Applied, LinkConfig, RouterConfig, RouterSettings},
        routing,
    },
};
use std::{net::SocketAddr, sync::Arc};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

impl Control {
    /// Takes a configuration over and tells the controller what of it could not be.
    pub(super) fn configure(&mut self, version: u64, config: Arc<RouterConfig>) {
        let mut problems = Vec::new();
        let settings = config.settings.clone().unwrap_or_default();
        let (records, damaged): (Vec<_>, Vec<_>) =
            config.records.iter().map(Record::try_from).partition(Result::is_ok);
        problems
            .extend(damaged.into_iter().filter_map(Result::err).map(|e| format!("record: {e}")));
        let records: Vec<Record> = records.into_iter().filter_map(Result::ok).collect();
        self.hello.update(&config, &records);

        let role = role(settings.role());
        self.input(Input::Settings(Settings {
            role,
            site_name: settings.site_name.as_str().into(),
            endpoints: settings.advertise.clone(),
            authorities: authorities(&settings, &mut problems),
        }));
        self.input(Input::Statements(records));
        // Trust must stand before the links that need it are dialled.
        self.take_outputs();

        self.data.fabric.set_transit(role == Role::Interior);
        self.data.budget.set_ceiling(match settings.memory_bytes {
            0 => MEMORY_BYTES_DEFAULT,
            bytes => bytes,
        });
        self.data.limit.set_flows_max(match settings.flows_max {
            0 => FLOWS_MAX_DEFAULT,
            flows => usize::try_from(flows).unwrap_or(usize::MAX),
        });
        self.claim_socket = Some(settings.claim_socket.clone().into())
            .filter(|_| !settings.claim_socket.is_empty());
        self.configure_data_plane(&settings, &config, &mut problems);

        for problem in &problems {
            tracing::warn!(problem, version, "part of the configuration cannot be applied");
        }
        tracing::info!(
            version,
            links = config.links.len(),
            listeners = config.listeners.len(),
            connectors = config.connectors.len(),
            "configured"
        );
        self.problems.clone_from(&problems);
        (self.config, self.config_version) = (config, version);
        let applied = Applied { version, problems, ..Applied::default() };
        self.controller.facts.applied.send_replace(Some(applied));
        self.status_soon();
    }

    /// Sockets, links, listeners and connectors are made on the data plane's runtime, because that is where they are polled.
    fn configure_data_plane(
        &mut self,
        settings: &RouterSettings,
        config: &RouterConfig,
        problems: &mut Vec<String>,
    ) {
        let parse = |text: &String| {
            text.parse::<SocketAddr>().map_err(|error| format!("listen address {text:?}: {error}"))
        };
        let (listen, wrong): (Vec<_>, Vec<_>) =
            settings.listen.iter().map(parse).partition(Result::is_ok);
        problems.extend(wrong.into_iter().filter_map(Result::err));
        let listen: Vec<_> = listen.into_iter().filter_map(Result::ok).collect();
        {
            let _data_runtime = self.runtimes.data.enter();
            self.data.links.set_proxy(proxy(settings, problems));
            self.data.links.listen(&listen);
            self.data.links.configure(self.links_to_dial(config));
            if !self.draining {
                self.data.egress.configure(config.connectors.clone());
                self.data.ingress.configure(config.listeners.clone());
            }
        }
        if let Err(problem) = self.metrics.listen(&settings.metrics_listen) {
            problems.push(problem);
        }
    }

    /// Tells links where their peers are to be found now, which disturbs only those for which it is news.
    pub(super) fn update_endpoints(&self) {
        let _data_runtime = self.runtimes.data.enter();
        self.data.links.configure(self.links_to_dial(&self.config));
    }

    /// The configured links with everywhere their peers are to be found: as configured, as the peer's routers say, as its site
    /// says.
    fn links_to_dial(&self, config: &RouterConfig) -> Vec<LinkConfig> {
        let with_endpoints = |link: &LinkConfig| {
            let mut link = link.clone();
            if let Ok(site) = convert::parse_site_id(&link.peer_site_id) {
                for endpoint in self.engine.endpoints(site) {
                    if !link.endpoints.contains(&endpoint) {
                        link.endpoints.push(endpoint);
                    }
                }
            }
            link
        };
        config.links.iter().map(with_endpoints).collect()
    }
}

fn proxy(settings: &RouterSettings, problems: &mut Vec<String>) -> Option<Proxy> {
    let config = settings.proxy.as_ref()?;
    match config.url.parse() {
        Ok(url) => Some(Proxy {
            url,
            bypass: Bypass::new(config.no_proxy.iter().map(String::as_str)),
            credentials_file: Some(&config.credentials_file)
                .filter(|file| !file.is_empty())
                .map(Into::into),
        }),
        Err(error) => {
            problems.push(format!("the proxy's URL {error}"));
            None
        }
    }
}

fn role(role: routing::Role) -> Role {
    match role {
        routing::Role::Interior => Role::Interior,
        routing::Role::Edge | routing::Role::Unspecified => Role::Edge,
    }
}

fn authorities(settings: &RouterSettings, problems: &mut Vec<String>) -> Vec<skein_core::SiteId> {
    let parsed = settings.network_authorities.iter().map(|id| convert::parse_site_id(id));
    parsed
        .filter_map(|id| id.map_err(|error| problems.push(format!("authority: {error}"))).ok())
        .collect()
}

/// The metrics page's listener, which follows the configuration.
#[derive(Debug)]
pub(super) struct MetricsServer {
    page: Arc<Page>,
    asked: String,
    bound: Option<SocketAddr>,
    tasks: JoinSet<()>,
}

impl MetricsServer {
    pub(super) fn new(sources: Sources) -> Self {
        let page = Arc::new(Page::new(sources));
        Self { page, asked: String::new(), bound: None, tasks: JoinSet::new() }
    }

    /// Where it listens, port included.
    pub(super) fn address(&self) -> String {
        self.bound.map(|bound| bound.to_string()).unwrap_or_default()
    }

    /// Listens on `address`, nowhere if it is empty. Loopback only: the page names peers, and nobody has to log in to read it.
    fn listen(&mut self, address: &str) -> Result<(), String> {
        if self.asked == address && (self.bound.is_some() || address.is_empty()) {
            return Ok(());
        }
        self.tasks.abort_all();
        self.bound = None;
        address.clone_into(&mut self.asked);
        if address.is_empty() {
            return Ok(());
        }
        let problem =
            |error: &dyn std::fmt::Display| format!("metrics address {address:?}: {error}");
        let wanted: SocketAddr = address.parse().map_err(|error| problem(&error))?;
        if !wanted.ip().is_loopback() {
            return Err(problem(&"not a loopback address"));
        }
        let listener = net::tcp_listen(wanted).map_err(|error| problem(&error))?;
        self.bound = listener.local_addr().ok();
        // Ends with this struct: the set aborts what it owns when dropped.
        self.tasks.spawn(serve(listener, Arc::clone(&self.page), CancellationToken::new()));
        Ok(())
    }
}
