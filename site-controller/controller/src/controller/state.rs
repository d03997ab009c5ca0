//! What a controller holds in memory: the state on disk, what routers and other sites told, and what was planned from both.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use skein_api::{Kind, Resource};
use skein_core::{Address, Port, Room, SiteId};
use skein_site_core::{
    AutoEndpoints, Endorsed, Grant, LeftOut, LocalPorts, Resources, Services, automatic_room,
};

use super::{DrainingUntil, Versioned};
use crate::{
    attach::RouterEntry,
    claim::applied::Redeeming,
    clock::SteadyClock,
    hosts,
    learned::LearnedRecords,
    served::Served,
    store::{Change, SetAside, SiteState},
};

/// Everything that changes.
#[derive(Debug)]
pub(crate) struct State {
    pub(crate) site: SiteState,
    pub(crate) resources: Resources,
    pub(crate) grants: BTreeMap<String, Grant>,
    pub(crate) endorsed: BTreeMap<SiteId, Endorsed>,
    pub(crate) learned: LearnedRecords,
    pub(crate) epochs: BTreeMap<String, u64>,
    pub(crate) endpoints: AutoEndpoints,
    /// Damaged files that were set aside and are still there.
    pub(crate) problems: Vec<SetAside>,
    pub(crate) draining: Vec<DrainingUntil>,
    /// What of it is on disk.
    pub(crate) draining_kept: Vec<DrainingUntil>,
    pub(crate) routers: BTreeMap<String, RouterEntry>,
    pub(crate) served: Served,
    /// What of it has no automatic endpoint for want of room.
    pub(crate) left_out: LeftOut,
    pub(crate) host: LocalPorts,
    /// Addresses of this host under which others might reach it.
    pub(crate) interfaces: Vec<std::net::IpAddr>,
    pub(super) config: Versioned,
    /// The version of the configuration in which routers were told of a resource as it is now. One that was not changed since the
    /// controller started is not here.
    pub(super) told: BTreeMap<(Kind, String), u64>,
    /// Endpoints may have changed since `/etc/hosts` was written.
    pub(super) hosts_due: bool,
    /// Whether `/etc/hosts` has a block of ours.
    pub(super) hosts_managed: bool,
    /// What names that others chose mean on this host without us.
    pub(super) names: hosts::elsewhere::Names,
    /// How far applied tokens are, by name.
    pub(crate) redeeming: BTreeMap<String, Redeeming>,
    /// Sites whose last word has expired: routers go on listing them until the record of it is over.
    pub(crate) departed: BTreeSet<SiteId>,
    /// The site has said its last word.
    pub(crate) leaving: bool,
    /// Whether the time is to be believed where something is dropped for good.
    pub(super) clock: SteadyClock,
}

impl State {
    /// Resources have changed, and routers are told in the configuration as it is now.
    pub(crate) fn told(&mut self, changes: &[Change]) {
        let Self { told, resources, config, .. } = self;
        for change in changes {
            if let Change::Put(resource) = change {
                told.insert((resource.kind(), resource.name().to_owned()), config.version);
            }
        }
        let there: BTreeSet<_> =
            resources.iter().map(|it| (it.kind(), it.name().to_owned())).collect();
        told.retain(|resource, _| there.contains(resource));
    }

    /// The version of the configuration in which routers heard of a resource as it is.
    pub(crate) fn told_in(&self, resource: &Resource) -> u64 {
        let resource = (resource.kind(), resource.name().to_owned());
        self.told.get(&resource).copied().unwrap_or_default()
    }

    /// Names of applied tokens that the site of this id issued.
    pub(crate) fn tokens_of(&self, issuer: &str) -> Vec<String> {
        let of = |token: &skein_api::AccessTokenSpec| {
            token
                .token
                .parse()
                .is_ok_and(|token: skein_api::Token| token.issuer.to_string() == issuer)
        };
        let tokens = self.resources.tokens.values().filter(|token| of(&token.spec));
        tokens.map(|token| token.metadata.name.clone()).collect()
    }

    /// What this site says of another, unless it was withdrawn.
    pub(crate) fn endorses(&self, subject: SiteId) -> Option<&Endorsed> {
        self.endorsed.get(&subject).filter(|endorsed| !endorsed.withdrawn)
    }

    /// Whether this site vouches for a member, so that it is not alone.
    pub(crate) fn vouches_for_members(&self) -> bool {
        self.endorsed.values().any(|peer| !peer.guest && !peer.withdrawn)
    }

    /// Whether `subject` is out for good: the founder, an authority or this site says so.
    pub(crate) fn is_revoked(&self, site: SiteId, subject: SiteId) -> bool {
        let authority = |issuer: SiteId| {
            issuer == site
                || issuer == self.network(site)
                || self.site.authorities.contains(&issuer.to_string())
        };
        self.learned.revokers(subject).any(authority)
    }

    /// The network's id.
    pub(crate) fn network(&self, site: SiteId) -> SiteId {
        SiteId::parse(&self.site.network).unwrap_or(site)
    }

    /// Puts a resource that was checked and saved in its place.
    pub(crate) fn put(&mut self, resource: Resource) {
        let inserted = self.resources.insert(resource);
        inserted.expect("invariant: only a second site conflicts, and that was checked");
    }

    /// The site's name.
    pub(crate) fn site_name(&self) -> &str {
        self.resources.site.as_ref().map_or("site", |site| &site.metadata.name)
    }

    /// `host:port` under which others reach this site; empty if it does not listen.
    pub(crate) fn advertise(&self) -> Vec<String> {
        let Some(site) = &self.resources.site else { return Vec::new() };
        crate::observed::advertised(&site.spec, &self.interfaces)
    }

    /// Addresses that this site's owner has named.
    pub(super) fn own_addresses(&self) -> BTreeSet<&str> {
        let connectors = self.resources.connectors.values().map(|one| one.spec.address.as_str());
        let listeners = self.resources.listeners.values().map(|one| one.spec.address.as_str());
        connectors.chain(listeners).collect()
    }

    /// Addresses of the network, those served from here included.
    pub(crate) fn known_services(&self, site: SiteId) -> Services {
        let mut out = self.served.by_address();
        for connector in self.resources.connectors.values() {
            let Ok(address) = connector.spec.address.parse::<Address>() else { continue };
            let ports = out.entry(address).or_default();
            for port in &connector.spec.ports {
                let Ok(number) = u16::try_from(port.port) else { continue };
                let port = Port { port: number, protocol: port.protocol.into() };
                Arc::make_mut(ports.entry(port).or_default()).insert(site);
            }
        }
        out
    }

    /// How many automatic endpoints the routers here can have.
    pub(crate) fn automatic_room(&self) -> Room {
        let statuses = self.routers.values().filter_map(|router| router.status.as_ref());
        let limits = statuses.map(|status| status.open_files_max).filter(|files| *files > 0);
        automatic_room(limits.min())
    }
}
