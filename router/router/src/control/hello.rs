//! What this router tells a neighbour in the first message of a link.

use crate::link::HelloFor;
use parking_lot::RwLock;
use skein_core::{Handle, Origin, Record, RecordKind, RouterId, SiteId};
use skein_wire::proto::{
    control::{RouterConfig, Welcome},
    routing::{self, LinkHello},
};
use std::{collections::BTreeMap, sync::Arc};

/// Our side of every hello, kept current by the control task and read by links.
#[derive(Debug)]
pub(super) struct HelloBook(RwLock<Page>);

#[derive(Debug)]
struct Page {
    site: SiteId,
    hello: LinkHello,
    statement: Option<routing::Record>,
    endorsements: BTreeMap<SiteId, routing::Record>,
}

impl HelloBook {
    pub(super) fn new(
        router: RouterId,
        site: SiteId,
        router_name: &str,
        welcome: &Welcome,
        handle: Handle,
    ) -> Arc<Self> {
        let hello = LinkHello {
            router_id: router.0.to_vec(),
            site_id: site.0.to_vec(),
            router_name: router_name.to_owned(),
            site_name: welcome.site_name.clone(),
            boot_epoch: welcome.boot_epoch,
            network_id: welcome.network_id.clone(),
            handle: handle.0,
            ..LinkHello::default()
        };
        let page = Page { site, hello, statement: None, endorsements: BTreeMap::new() };
        Arc::new(Self(RwLock::new(page)))
    }

    /// Takes role, name and our own statements from a configuration.
    pub(super) fn update(&self, config: &RouterConfig, records: &[Record]) {
        let page = &mut *self.0.write();
        if let Some(settings) = &config.settings {
            page.hello.role = settings.role;
            if !settings.site_name.is_empty() {
                page.hello.site_name.clone_from(&settings.site_name);
            }
        }
        page.statement = None;
        page.endorsements.clear();
        for record in records.iter().filter(|r| r.key.origin == Origin::Site(page.site)) {
            match record.key.kind {
                RecordKind::SiteStatement => page.statement = Some(record.into()),
                RecordKind::Endorsement => {
                    if let Ok(subject) = record.key.subkey.as_bytes().try_into() {
                        page.endorsements.insert(SiteId(subject), record.into());
                    }
                }
                _ => {}
            }
        }
    }

    /// Follows a change of our handle, which happens when another router turns out to use the same.
    pub(super) fn set_handle(&self, handle: Handle) {
        self.0.write().hello.handle = handle.0;
    }

    /// The closure links call when one is established.
    pub(super) fn for_links(self: &Arc<Self>) -> Arc<HelloFor> {
        let book = Arc::clone(self);
        Arc::new(move |peer| {
            let page = book.0.read();
            let introduction = page.statement.iter().chain(page.endorsements.get(&peer));
            LinkHello { statements: introduction.cloned().collect(), ..page.hello.clone() }
        })
    }
}
