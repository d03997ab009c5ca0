//! Reads everything back when a controller starts.

use std::{collections::BTreeMap, path::Path};

use prost::Message as _;
use serde::de::DeserializeOwned;
use skein_api::{Kind, ParseError};
use skein_core::{Address, SiteId};
use skein_site_core::{AutoEndpoint, AutoEndpoints, Endorsed, Grant, Resources};
use skein_trust::{SiteCa, SiteIdentity};
use skein_wire::proto::{control::Learned, routing::Record};
use zeroize::Zeroizing;

use super::{
    LEARNED_MAX, SetAside, SiteState, Store, StoreError, StoredCa, form::parse, io_error,
    resource_file_name,
};
use crate::controller::DrainingUntil;

/// Everything read back when a controller starts.
#[derive(Debug)]
pub struct Loaded {
    /// The identity keys.
    pub identity: SiteIdentity,
    /// The certificate authority.
    pub ca: SiteCa,
    /// Network, authorities, statement.
    pub site: SiteState,
    /// From which routers derive keys that must survive their restart.
    pub site_secret: Zeroizing<[u8; 32]>,
    /// Desired state.
    pub resources: Resources,
    /// Tokens made here, by name.
    pub grants: BTreeMap<String, Grant>,
    /// What this site says of others.
    pub endorsed: BTreeMap<SiteId, Endorsed>,
    /// Statements heard of others.
    pub learned: Vec<Record>,
    /// Boot epoch of each router.
    pub epochs: BTreeMap<String, u64>,
    /// Automatic endpoints handed out.
    pub endpoints: AutoEndpoints,
    /// Deleted connectors whose flows ran on when the last controller ended.
    pub(crate) draining: Vec<DrainingUntil>,
    /// What was set aside, now or earlier, and is still there.
    pub problems: Vec<SetAside>,
}

impl Store {
    /// Reads everything. Damaged files are set aside and reported in [`Loaded::problems`].
    ///
    /// # Errors
    /// There is no site, an indispensable file is damaged, or the file system refuses.
    pub fn load(&self) -> Result<Loaded, StoreError> {
        let identity = self.load_identity()?;
        let ca = self.load_ca(identity.site_id())?;
        let site: SiteState = self.indispensable("site.json")?;
        let path = self.path("site.json");
        if site.site != identity.site_id().to_string() {
            let why = "it belongs to another identity".to_owned();
            return Err(StoreError::Damaged { path, why });
        }
        let site_secret = self.load_secret()?;
        let mut problems = Vec::new();
        self.finish_journal(&mut problems)?;
        let resources = self.load_resources(&mut problems)?;
        let grants = self.load_grants(&mut problems)?;
        let endorsed = self.load_endorsed(&mut problems)?;
        let learned = self.load_learned(&mut problems)?;
        let epochs = self.optional("epochs.json", &mut problems)?;
        let by_name: BTreeMap<String, AutoEndpoint> =
            self.optional("endpoints.json", &mut problems)?;
        let endpoints = by_name
            .into_iter()
            .filter_map(|(address, endpoint)| Some((address.parse::<Address>().ok()?, endpoint)))
            .collect();
        let draining = self.load_draining(&mut problems)?;
        self.finish_host_record(&mut problems)?;
        let problems = self.still_aside(problems)?;
        Ok(Loaded {
            identity,
            ca,
            site,
            site_secret,
            resources,
            grants,
            endorsed,
            learned,
            epochs,
            endpoints,
            draining,
            problems,
        })
    }

    fn load_identity(&self) -> Result<SiteIdentity, StoreError> {
        let path = self.paths.identity_file();
        let Some(bytes) = self.read(&path)? else {
            return Err(StoreError::NoSite { path: self.paths.state().to_owned() });
        };
        let bytes = Zeroizing::new(bytes);
        SiteIdentity::from_secret_bytes(&bytes)
            .map_err(|error| StoreError::Damaged { path, why: error.to_string() })
    }

    fn load_ca(&self, site: SiteId) -> Result<SiteCa, StoreError> {
        let stored: StoredCa = self.indispensable("ca.json")?;
        let path = self.path("ca.json");
        let damaged = |why: String| StoreError::Damaged { path: path.clone(), why };
        let base64 = data_encoding::BASE64;
        let key = base64.decode(stored.key.as_bytes()).map_err(|e| damaged(e.to_string()))?;
        let key = Zeroizing::new(key);
        let certificate =
            base64.decode(stored.certificate.as_bytes()).map_err(|e| damaged(e.to_string()))?;
        SiteCa::load(site, &key, &certificate).map_err(|e| damaged(e.to_string()))
    }

    fn load_secret(&self) -> Result<Zeroizing<[u8; 32]>, StoreError> {
        let path = self.path("site.secret");
        let bytes = Zeroizing::new(self.read(&path)?.unwrap_or_default());
        let secret = <[u8; 32]>::try_from(bytes.as_slice())
            .map_err(|_| StoreError::Damaged { path, why: "it has not 32 bytes".to_owned() })?;
        Ok(Zeroizing::new(secret))
    }

    fn indispensable<T: DeserializeOwned>(&self, name: &str) -> Result<T, StoreError> {
        let path = self.path(name);
        let damaged = |why: String| StoreError::Damaged { path: path.clone(), why };
        let bytes = self.read(&path)?.ok_or_else(|| damaged("it is missing".to_owned()))?;
        let bytes = Zeroizing::new(bytes);
        parse(&path, &bytes)?.map_err(damaged)
    }

    pub(super) fn optional<T: DeserializeOwned + Default>(
        &self,
        name: &str,
        problems: &mut Vec<SetAside>,
    ) -> Result<T, StoreError> {
        let path = self.path(name);
        let Some(bytes) = self.read_or_set_aside(&path, problems)? else {
            return Ok(T::default());
        };
        match parse(&path, &bytes)? {
            Ok(value) => Ok(value),
            Err(why) => {
                self.set_aside(&path, &why, problems)?;
                Ok(T::default())
            }
        }
    }

    fn load_resources(&self, problems: &mut Vec<SetAside>) -> Result<Resources, StoreError> {
        let mut out = Resources::default();
        let dir = self.paths.resources_dir();
        for name in self.list(&dir, ".yaml")? {
            let path = dir.join(&name);
            let bytes = self.read(&path)?.unwrap_or_default();
            let parsed = skein_api::parse_stored(&bytes);
            if let Err(error @ ParseError::Invalid { kind: Kind::Site, .. }) = parsed {
                // Nothing is lost: closed, and without its proxy, it would go on as nobody said.
                return Err(StoreError::Invalid { path, why: error.to_string() });
            }
            let parsed = parsed.map_err(|error| error.to_string());
            let inserted = parsed.and_then(|mut documents| {
                let resource = documents.pop().filter(|_| documents.is_empty());
                let resource = resource.ok_or_else(|| "it holds not one resource".to_owned())?;
                if resource_file_name(resource.kind(), resource.name()) != name {
                    return Err("its name does not fit its content".to_owned());
                }
                out.insert(resource).map_err(|error| error.to_string())
            });
            if let Err(why) = inserted {
                self.set_aside(&path, &why, problems)?;
            }
        }
        Ok(out)
    }

    fn load_grants(
        &self,
        problems: &mut Vec<SetAside>,
    ) -> Result<BTreeMap<String, Grant>, StoreError> {
        let mut out = BTreeMap::new();
        for name in self.list(&self.path("grants"), ".json")? {
            let grant: Option<Grant> = self.optional(&format!("grants/{name}"), problems)?;
            if let Some(grant) = grant {
                out.insert(grant.name.clone(), grant);
            }
        }
        Ok(out)
    }

    fn load_endorsed(
        &self,
        problems: &mut Vec<SetAside>,
    ) -> Result<BTreeMap<SiteId, Endorsed>, StoreError> {
        let mut out = BTreeMap::new();
        for name in self.list(&self.path("trust/endorsed"), ".json")? {
            let endorsed: Option<Endorsed> =
                self.optional(&format!("trust/endorsed/{name}"), problems)?;
            if let Some((site, endorsed)) =
                endorsed.and_then(|endorsed| Some((SiteId::parse(&endorsed.site)?, endorsed)))
            {
                out.insert(site, endorsed);
            }
        }
        Ok(out)
    }

    fn load_learned(&self, problems: &mut Vec<SetAside>) -> Result<Vec<Record>, StoreError> {
        let path = self.path("trust/learned.pb");
        let Some(bytes) = self.read_or_set_aside(&path, problems)? else { return Ok(Vec::new()) };
        match Learned::decode(bytes.as_slice()) {
            Ok(mut learned) => {
                learned.records.truncate(LEARNED_MAX);
                Ok(learned.records)
            }
            Err(error) => {
                self.set_aside(&path, &error.to_string(), problems)?;
                Ok(Vec::new())
            }
        }
    }

    /// Names of state files; temporary and set-aside ones are not among them.
    pub(super) fn list(&self, dir: &Path, suffix: &str) -> Result<Vec<String>, StoreError> {
        let names = self.disk.list(dir).map_err(|source| io_error("read", dir, source))?;
        Ok(names
            .into_iter()
            .filter(|name| name.ends_with(suffix) && !name.starts_with('.'))
            .collect())
    }
}
