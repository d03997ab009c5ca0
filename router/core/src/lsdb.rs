//! The link-state database.

use crate::{RouterId, RouterLsa, SiteId, SiteStatement};
use std::{collections::BTreeMap, sync::Arc};

/// Every record accepted, the newest edition of each.
#[derive(Clone, Debug, Default)]
pub struct Lsdb {
    statements: BTreeMap<SiteId, Arc<SiteStatement>>,
    lsas: BTreeMap<RouterId, Arc<RouterLsa>>,
}

impl Lsdb {
    /// A site's statement about itself.
    #[must_use]
    pub fn statement(&self, site: SiteId) -> Option<&Arc<SiteStatement>> {
        self.statements.get(&site)
    }

    /// A router's LSA.
    #[must_use]
    pub fn lsa(&self, router: RouterId) -> Option<&Arc<RouterLsa>> {
        self.lsas.get(&router)
    }
}
