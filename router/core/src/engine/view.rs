//! What status and trace show.

use super::{Engine, Notary};
use crate::{LinkId, Route, RouterId, RouterLsa, SiteId, SiteStatement, adjacency::AdjacencyState};
use std::{collections::BTreeMap, sync::Arc};

/// The network as this router knows it.
#[derive(Clone, Debug)]
pub struct NetworkView {
    /// Routers, this one included, ascending by id.
    pub routers: Vec<RouterView>,
    /// Sites, ascending by id.
    pub sites: Vec<SiteView>,
    /// Our links and how far the exchange of databases with each neighbour has come.
    pub links: BTreeMap<LinkId, (RouterId, AdjacencyState)>,
}

/// A router.
#[derive(Clone, Debug)]
pub struct RouterView {
    /// What it says of itself.
    pub lsa: Arc<RouterLsa>,
    /// Whether its site is trusted.
    pub trusted: bool,
    /// The way there.
    pub route: Option<Arc<Route>>,
    /// Why there is none, for people.
    pub problem: Option<&'static str>,
}

/// A site.
#[derive(Clone, Debug)]
pub struct SiteView {
    /// What it says of itself.
    pub statement: Arc<SiteStatement>,
    /// Whether it is trusted.
    pub trusted: bool,
    /// Whether it was revoked.
    pub revoked: bool,
}

impl<N: Notary> Engine<N> {
    /// The network as this router knows it; farewells are left out.
    #[must_use]
    pub fn view(&self) -> NetworkView {
        let routers = self.lsdb().lsas().filter(|lsa| !lsa.leaving);
        let site = |statement: &Arc<SiteStatement>| SiteView {
            trusted: self.trust().site(statement.site).is_some(),
            revoked: self.trust().revoked.contains(&statement.site),
            statement: Arc::clone(statement),
        };
        let adjacencies = self.adjacencies.values();
        NetworkView {
            routers: routers.map(|lsa| self.router_view(lsa)).collect(),
            sites: self.lsdb().statements().values().map(site).collect(),
            links: adjacencies.map(|a| (a.link, (a.peer, a.state()))).collect(),
        }
    }

    /// `host:port` on which routers of a site accept links, by what the site and its routers say; without repetitions.
    #[must_use]
    pub fn endpoints(&self, site: SiteId) -> Vec<String> {
        let stated = self.trust().site(site).into_iter().flat_map(|site| &site.endpoints);
        let live = self.lsdb().lsas().filter(|lsa| lsa.site == site && !lsa.leaving);
        let mut endpoints: Vec<String> = Vec::new();
        for endpoint in live.flat_map(|lsa| &lsa.endpoints).chain(stated) {
            if !endpoints.contains(endpoint) {
                endpoints.push(endpoint.clone());
            }
        }
        endpoints
    }

    fn router_view(&self, lsa: &Arc<RouterLsa>) -> RouterView {
        let trusted = self.trust().site(lsa.site).is_some();
        let route = self.fib().routes.get(&lsa.router).cloned();
        let problem = match &route {
            _ if lsa.router == self.identity.router => None,
            Some(_) => None,
            None if !trusted => Some("its site is not trusted"),
            None if self.snapshot.is_too_far(lsa.router) => Some("path too long"),
            None => Some("no path"),
        };
        RouterView { lsa: Arc::clone(lsa), trusted, route, problem }
    }
}
