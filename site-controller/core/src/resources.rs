//! The desired state: the resources of one site, by kind and name.

use std::collections::BTreeMap;

use skein_api::{
    AccessGrantSpec, AccessTokenSpec, ConnectorSpec, Kind, LinkSpec, ListenerSpec, Manifest,
    Resource, SiteSpec,
};

/// Every resource of a site. `BTreeMap`s, because their order is what users see.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Resources {
    /// The site itself; absent only before it was read.
    pub site: Option<Manifest<SiteSpec>>,
    /// Links this site dials.
    pub links: BTreeMap<String, Manifest<LinkSpec>>,
    /// Permissions for others to link.
    pub grants: BTreeMap<String, Manifest<AccessGrantSpec>>,
    /// Tokens to be redeemed.
    pub tokens: BTreeMap<String, Manifest<AccessTokenSpec>>,
    /// Explicit local endpoints.
    pub listeners: BTreeMap<String, Manifest<ListenerSpec>>,
    /// Addresses served from here.
    pub connectors: BTreeMap<String, Manifest<ConnectorSpec>>,
}

/// Two resources that cannot both be.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Conflict {
    /// A second site of another name.
    #[error(
        "this namespace already has the site {0:?}; use another namespace (-n), or delete it first"
    )]
    SecondSite(String),
    /// Two listeners want one socket.
    #[error(
        "listeners {first:?} and {second:?} both want {host} port {port}; give one of them another --port P:LOCALPORT or --host"
    )]
    Socket {
        /// One listener.
        first: String,
        /// The other.
        second: String,
        /// Where.
        host: String,
        /// Which port.
        port: u32,
    },
    /// Two connectors serve the same port of the same address.
    #[error(
        "connectors {first:?} and {second:?} both serve {address} port {port}; list all targets in one of them"
    )]
    Served {
        /// One connector.
        first: String,
        /// The other.
        second: String,
        /// The address.
        address: String,
        /// Which port.
        port: u32,
    },
}

impl Resources {
    /// Puts a resource in its place, without its status; returns what was there.
    ///
    /// # Errors
    /// [`Conflict::SecondSite`].
    pub fn insert(&mut self, mut resource: Resource) -> Result<Option<Resource>, Conflict> {
        resource.set_status(None);
        Ok(match resource {
            Resource::Site(new) => {
                if let Some(old) = &self.site
                    && old.metadata.name != new.metadata.name
                {
                    return Err(Conflict::SecondSite(old.metadata.name.clone()));
                }
                self.site.replace(new).map(Resource::Site)
            }
            Resource::Link(new) => put(&mut self.links, new).map(Resource::Link),
            Resource::AccessGrant(new) => put(&mut self.grants, new).map(Resource::AccessGrant),
            Resource::AccessToken(new) => put(&mut self.tokens, new).map(Resource::AccessToken),
            Resource::Listener(new) => put(&mut self.listeners, new).map(Resource::Listener),
            Resource::Connector(new) => put(&mut self.connectors, new).map(Resource::Connector),
        })
    }

    /// Takes a resource out.
    pub fn remove(&mut self, kind: Kind, name: &str) -> Option<Resource> {
        match kind {
            Kind::Site => {
                let is_it = self.site.as_ref().is_some_and(|site| site.metadata.name == name);
                if is_it { self.site.take().map(Resource::Site) } else { None }
            }
            Kind::Link => self.links.remove(name).map(Resource::Link),
            Kind::AccessGrant => self.grants.remove(name).map(Resource::AccessGrant),
            Kind::AccessToken => self.tokens.remove(name).map(Resource::AccessToken),
            Kind::Listener => self.listeners.remove(name).map(Resource::Listener),
            Kind::Connector => self.connectors.remove(name).map(Resource::Connector),
        }
    }

    /// One resource.
    #[must_use]
    pub fn find(&self, kind: Kind, name: &str) -> Option<Resource> {
        match kind {
            Kind::Site => self
                .site
                .as_ref()
                .filter(|site| site.metadata.name == name)
                .cloned()
                .map(Resource::Site),
            Kind::Link => self.links.get(name).cloned().map(Resource::Link),
            Kind::AccessGrant => self.grants.get(name).cloned().map(Resource::AccessGrant),
            Kind::AccessToken => self.tokens.get(name).cloned().map(Resource::AccessToken),
            Kind::Listener => self.listeners.get(name).cloned().map(Resource::Listener),
            Kind::Connector => self.connectors.get(name).cloned().map(Resource::Connector),
        }
    }

    /// All resources, in the order of [`Kind::ALL`], then by name.
    pub fn iter(&self) -> impl Iterator<Item = Resource> + '_ {
        let site = self.site.iter().cloned().map(Resource::Site);
        let links = self.links.values().cloned().map(Resource::Link);
        let grants = self.grants.values().cloned().map(Resource::AccessGrant);
        let tokens = self.tokens.values().cloned().map(Resource::AccessToken);
        let listeners = self.listeners.values().cloned().map(Resource::Listener);
        let connectors = self.connectors.values().cloned().map(Resource::Connector);
        site.chain(links).chain(grants).chain(tokens).chain(listeners).chain(connectors)
    }

    /// Checks what no resource can see by itself.
    ///
    /// # Errors
    /// The first conflict in the order of names.
    pub fn check(&self) -> Result<(), Conflict> {
        let mut sockets = BTreeMap::new();
        for (name, listener) in &self.listeners {
            let spec = &listener.spec;
            for port in &spec.ports {
                let local = port.local_port.unwrap_or(port.port);
                let key = (spec.host.clone(), local, port.protocol);
                if let Some(first) = sockets.insert(key, name.clone()) {
                    let (second, host) = (name.clone(), spec.host.clone());
                    return Err(Conflict::Socket { first, second, host, port: local });
                }
            }
        }
        let mut served = BTreeMap::new();
        for (name, connector) in &self.connectors {
            let address = &connector.spec.address;
            for port in &connector.spec.ports {
                let key = (address.clone(), port.port, port.protocol);
                if let Some(first) = served.insert(key, name.clone()) {
                    let (second, address) = (name.clone(), address.clone());
                    return Err(Conflict::Served { first, second, address, port: port.port });
                }
            }
        }
        Ok(())
    }
}

fn put<S>(map: &mut BTreeMap<String, Manifest<S>>, new: Manifest<S>) -> Option<Manifest<S>> {
    map.insert(new.metadata.name.clone(), new)
}

#[cfg(test)]
mod tests {
    use super::*;
    use skein_api::{ConnectorPort, ListenerPort, Protocol};

    fn connector(name: &str, address: &str, port: u32) -> Resource {
        let port = ConnectorPort { port, target_port: None, protocol: Protocol::Tcp };
        Resource::Connector(Manifest::new(name, ConnectorSpec::new(address, vec![port])))
    }

    fn listener(name: &str, local: u32) -> Resource {
        let port = ListenerPort { port: 1, local_port: Some(local), protocol: Protocol::Tcp };
        Resource::Listener(Manifest::new(
            name,
            ListenerSpec { address: "a".into(), host: "127.0.0.1".into(), ports: vec![port] },
        ))
    }

    #[test]
    fn what_goes_in_comes_out() {
        let mut resources = Resources::default();
        let site = Resource::Site(Manifest::new("hub", SiteSpec::default()));
        for resource in [site.clone(), connector("c", "a", 1), listener("l", 2)] {
            assert_eq!(resources.insert(resource.clone()), Ok(None));
            assert_eq!(resources.insert(resource.clone()), Ok(Some(resource.clone())));
            assert_eq!(resources.find(resource.kind(), resource.name()), Some(resource));
        }
        assert_eq!(resources.iter().count(), 3);
        assert_eq!(resources.remove(Kind::Site, "other"), None);
        assert_eq!(resources.remove(Kind::Site, "hub"), Some(site));
    }

    #[test]
    fn a_namespace_has_one_site() {
        let mut resources = Resources::default();
        let site = |name: &str| Resource::Site(Manifest::new(name, SiteSpec::default()));
        resources.insert(site("hub")).unwrap();
        assert_eq!(resources.insert(site("hub2")), Err(Conflict::SecondSite("hub".into())));
    }

    #[test]
    fn conflicts_name_both() {
        let mut resources = Resources::default();
        resources.insert(listener("x", 80)).unwrap();
        resources.insert(listener("y", 80)).unwrap();
        assert!(
            matches!(resources.check(), Err(Conflict::Socket { first, second, .. }) if first == "x" && second == "y")
        );
        let mut resources = Resources::default();
        resources.insert(connector("x", "db", 80)).unwrap();
        resources.insert(connector("y", "db", 80)).unwrap();
        assert!(matches!(resources.check(), Err(Conflict::Served { .. })));
        resources.insert(connector("y", "db", 81)).unwrap();
        assert_eq!(resources.check(), Ok(()));
    }
}
