//! Names of endpoints in `/etc/hosts`, where the site is to keep them.

use std::collections::BTreeMap;

use skein_core::Address;

use super::{Controller, State};
use crate::hosts;

impl Controller {
    /// Names that others chose and that are to be looked up before they are written to `/etc/hosts`.
    pub(crate) fn names_due(&self, now: i64) -> Vec<Address> {
        let mut state = self.state();
        let mut wanted = BTreeMap::new();
        if state.hosts_managed {
            let own = state.own_addresses();
            for (name, ports) in state.known_services(self.site) {
                let is_theirs = state.endpoints.contains_key(&name)
                    && !own.contains(name.as_str())
                    && hosts::may_be_named(&name);
                if is_theirs {
                    let by = ports.values().flat_map(|sites| sites.iter().copied()).collect();
                    wanted.insert(name, by);
                }
            }
        }
        state.hosts_due |= state.names.forget(&wanted, now);
        state.names.due(&wanted, now)
    }

    /// Which of them mean nothing here.
    pub(crate) fn names_learned(&self, free: Vec<(Address, bool)>, now: i64) {
        let mut state = self.state();
        for (name, is_free) in free {
            let is_news = state.names.learn(name, is_free, now);
            state.hosts_due |= is_news;
        }
    }

    /// Keeps the block in `/etc/hosts`, if the site is to have one.
    pub(super) fn name_endpoints(&self, state: &mut State) {
        let label = self.store.paths().label();
        let wanted = state.resources.site.as_ref().is_some_and(|site| site.spec.manage_hosts);
        let done = if wanted {
            let services = state.known_services(self.site);
            let mut named = state.endpoints.clone();
            let own = state.own_addresses();
            named.retain(|address, _| {
                services.contains_key(address)
                    && (own.contains(address.as_str())
                        || (hosts::may_be_named(address) && state.names.is_free(address)))
            });
            hosts::update(hosts::FILE.as_ref(), &label, &named)
        } else {
            // Also one that an earlier controller left.
            hosts::remove(hosts::FILE.as_ref(), &label)
        };
        match done {
            Ok(()) => state.hosts_managed = wanted,
            // Another site writes its block at this moment.
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => state.hosts_due = true,
            Err(error) => {
                tracing::error!(%error, file = hosts::FILE, "local endpoints are not named")
            }
        }
    }
}
