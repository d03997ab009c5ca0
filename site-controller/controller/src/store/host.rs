//! How this host runs the site: what is, beside what is wanted. Reading it changes nothing, so it needs no lock.

use serde::{Deserialize, Serialize};
use skein_api::{Manifest, Resource, Service, SiteSpec};

use super::{Store, StoreError, form::parse};

const HOST: &str = "host.json";

/// Content of `host.json`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct HostRecord {
    /// What runs the processes since they were last started; never [`Service::Auto`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub service: Option<Service>,
}

impl Store {
    /// How this host runs the site; the default where nothing is recorded or the record is damaged.
    ///
    /// # Errors
    /// The file system refuses.
    pub fn host_record(&self) -> Result<HostRecord, StoreError> {
        let path = self.path(HOST);
        let Some(bytes) = self.read(&path)? else { return Ok(HostRecord::default()) };
        // Whoever loads the state names the damage; here it only means that nothing is known.
        Ok(parse(&path, &bytes)?.unwrap_or_default())
    }

    /// Stores how this host runs the site. The caller holds the lock.
    ///
    /// # Errors
    /// The file system refuses; the file is as before.
    pub fn save_host_record(&self, record: &HostRecord) -> Result<(), StoreError> {
        self.finish_host_record(&mut Vec::new())?;
        self.save_json(HOST, record)
    }

    /// Sets a damaged record aside.
    pub(super) fn finish_host_record(
        &self,
        problems: &mut Vec<super::SetAside>,
    ) -> Result<(), StoreError> {
        self.optional::<HostRecord>(HOST, problems).map(drop)
    }

    /// The `Site` resource as it is on disk, for whoever cannot ask the controller; `None` where it is missing or damaged.
    ///
    /// # Errors
    /// The file system refuses.
    pub fn site_manifest(&self) -> Result<Option<Manifest<SiteSpec>>, StoreError> {
        let dir = self.paths().resources_dir();
        for name in self.list(&dir, ".yaml")?.iter().filter(|name| name.starts_with("site.")) {
            let bytes = self.read(&dir.join(name))?.unwrap_or_default();
            let parsed = skein_api::parse_stored(&bytes).unwrap_or_default();
            if let Some(Resource::Site(site)) = parsed.into_iter().next() {
                return Ok(Some(site));
            }
        }
        Ok(None)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    #[test]
    fn readers_touch_nothing() {
        let (_dir, paths) = crate::store::tests::site();
        let store = Store::new(paths.clone());
        fs::write(paths.host_file(), "{").unwrap();
        let site = paths.resources_dir().join("site.hub.yaml");
        fs::write(&site, "kind: [").unwrap();
        assert_eq!(store.host_record().unwrap(), HostRecord::default());
        assert!(store.site_manifest().unwrap().is_none());
        assert_eq!(fs::read_to_string(paths.host_file()).unwrap(), "{");
        assert_eq!(fs::read_to_string(site).unwrap(), "kind: [");
    }

    #[test]
    fn a_damaged_record_is_set_aside_before_it_is_replaced() {
        let (_dir, paths) = crate::store::tests::site();
        let store = Store::new(paths.clone());
        fs::write(paths.host_file(), "{").unwrap();
        let record = HostRecord { service: Some(Service::None) };
        store.save_host_record(&record).unwrap();
        assert_eq!(store.host_record().unwrap(), record);
        assert_eq!(store.set_aside_files().unwrap().len(), 1);
    }
}
