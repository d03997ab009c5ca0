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

    /// Every router's LSA, trusted or not, by router.
    pub fn lsas(&self) -> impl Iterator<Item = &Arc<RouterLsa>> {
        self.lsas.values()
    }

    /// How many records there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.statements.len() + self.lsas.len()
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}
