//! What a site remembers, as files in its state directory.
//!
//! | file | content |
//! |---|---|
//! | `identity.key` | identity keys (never rewritten but by a rotation) |
//! | `ca.json` | key and certificate of the CA |
//! | `site.json` | network, secrets, authorities, the last statement |
//! | `epochs.json` | boot epoch of each router |
//! | `endpoints.json` | automatic endpoints handed out |
//! | `resources/KIND.NAME.yaml` | desired state |
//! | `grants/NAME.json` | tokens made here, codes hashed |
//! | `trust/endorsed/SITE.json` | what this site says of another |
//! | `trust/learned.pb` | statements heard of others |
//! | `draining.json` | deleted connectors whose flows run on |
//! | `host.json` | what runs the processes on this host |
//!
//! A damaged file is set aside under another name and reported until somebody removes it; it is never overwritten. Identity and CA are different: without them
//! there is no site, so a damaged one stops the controller.
//!
//! JSON files say of which form they are. Fields that are not known are ignored, so that an earlier version can take over; a later
//! form stops it instead, because trust that was set aside is lost.

mod disk;
mod draining;
mod host;
mod journal;
mod proxy;

use std::{
    collections::BTreeMap,
    fmt, io,
    path::{Path, PathBuf},
    sync::Arc,
};

use prost::Message as _;
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use skein_api::{Kind, Resource};
use skein_core::{Address, SiteId};
use skein_site_core::{AutoEndpoint, AutoEndpoints, Endorsed, Grant, IssuedStatement, Resources};
use skein_trust::{SiteCa, SiteIdentity};
use skein_wire::proto::{control::Learned, routing::Record};
use zeroize::Zeroizing;

pub use disk::{Disk, HostDisk};
pub use host::HostRecord;
pub use journal::Change;
pub use proxy::ProxyDefault;

use crate::{clock, controller::DrainingUntil, paths::Paths};

/// Most a controller keeps of what it heard; more is an attack, not a network (1,000 sites have a few thousand statements).
pub const LEARNED_MAX: usize = 20_000;

/// Between the name of a damaged file and the time it was set aside.
const ASIDE: &str = ".corrupt-";
/// Longest file of learned statements: what a controller writes it must be able to read, and a network of 1,000 sites takes a few MiB.
pub const LEARNED_LEN_MAX: usize = 32 << 20;
/// The form of JSON state written here.
const STATE_VERSION: u32 = 1;

/// Why state could not be read or written. Every variant names the file.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The file system refused.
    #[error("cannot {action} {}: {}", path.display(), explain(source))]
    Io {
        /// `read`, `write`, …
        action: &'static str,
        /// Which file.
        path: PathBuf,
        /// What the file system said.
        source: io::Error,
    },
    /// A file without which there is no site cannot be understood.
    #[error(
        "{} is damaged ({why}); restore it from a back-up of this directory, or rebuild the site with `skctl init --identity FILE`, which keeps this directory under another name",
        path.display()
    )]
    Damaged {
        /// Which file.
        path: PathBuf,
        /// What is wrong with it.
        why: String,
    },
    /// A later version wrote it.
    #[error(
        "{} was written by a later version of Skein (state form {version}, this one knows {STATE_VERSION}); run that version again",
        path.display()
    )]
    Newer {
        /// Which file.
        path: PathBuf,
        /// Its form.
        version: u32,
    },
    /// There is no site here.
    #[error("there is no site in {}; make one with `skctl init`", path.display())]
    NoSite {
        /// The state directory.
        path: PathBuf,
    },
}

/// Says the two errors people meet most in their own words.
fn explain(error: &io::Error) -> String {
    match error.kind() {
        io::ErrorKind::StorageFull => "the disk is full; free some space and try again".to_owned(),
        io::ErrorKind::ReadOnlyFilesystem => "the file system is read-only".to_owned(),
        io::ErrorKind::PermissionDenied => {
            "permission denied; the state belongs to another user".to_owned()
        }
        _ => error.to_string(),
    }
}

/// The part of a site's state that is neither a resource nor a key.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct SiteState {
    /// Site id, checked against the identity.
    pub site: String,
    /// Network id: the founder's site id.
    pub network: String,
    /// Sites whose revocations count besides the founder's.
    #[serde(default)]
    pub authorities: Vec<String>,
    /// Unix time.
    pub created_unix_s: i64,
    /// What the site last said of itself.
    #[serde(default)]
    pub statement: IssuedStatement,
}

/// Key and certificate of a CA, base64.
#[derive(Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct StoredCa {
    key: Zeroizing<String>,
    certificate: String,
}

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

/// A damaged file that was moved out of the way, kept for whoever wants to look.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SetAside {
    /// Where it was.
    pub file: PathBuf,
    /// Where it is.
    pub aside: PathBuf,
    /// What is wrong with it, as far as this process has seen.
    pub why: Option<String>,
}

impl SetAside {
    /// What to do about it: losing a file means something else for each.
    #[must_use]
    pub fn fix(&self) -> &'static str {
        let dir = self.file.parent().and_then(Path::file_name).and_then(|dir| dir.to_str());
        match (dir, self.file.file_name().and_then(|name| name.to_str())) {
            (Some("resources"), _) => {
                "apply the lost resource again or restore the file, then remove the damaged one"
            }
            (Some("grants"), _) => {
                "its token can no longer be used: make another one with `skctl token create`, then remove the damaged file; links made with it stay"
            }
            (Some("endorsed"), _) => {
                "this site no longer endorses that one: make a new token and `skctl link` again, then remove the damaged file"
            }
            (_, Some("learned.pb")) => {
                "nothing needs to be done once a link is up; where none comes up, link again with a new token; then remove the damaged file"
            }
            (_, Some("epochs.json")) => {
                "nothing needs to be done, epochs count on from the time; remove the damaged file"
            }
            (_, Some("endpoints.json")) => {
                "nothing needs to be done, local endpoints are handed out anew, see `skctl service list`; remove the damaged file"
            }
            _ => "see whether the last `skctl apply` is in force, then remove the damaged file",
        }
    }
}

impl fmt::Display for SetAside {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} was damaged", self.file.display())?;
        if let Some(why) = &self.why {
            write!(f, " ({why})")?;
        }
        write!(f, " and set aside as {}", self.aside.display())
    }
}

/// Reads and writes the state of one site.
#[derive(Clone, Debug)]
pub struct Store {
    paths: Paths,
    disk: Arc<dyn Disk>,
}

impl Store {
    /// The state under `paths`, on the file system of this host.
    #[must_use]
    pub fn new(paths: Paths) -> Self {
        Self::with_disk(paths, Arc::new(HostDisk))
    }

    /// As [`new`](Self::new), on another disk.
    #[must_use]
    pub fn with_disk(paths: Paths, disk: Arc<dyn Disk>) -> Self {
        Self { paths, disk }
    }

    /// The directories.
    #[must_use]
    pub fn paths(&self) -> &Paths {
        &self.paths
    }

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

    /// Stores the identity keys.
    ///
    /// # Errors
    /// The file system refuses; the keys are as before.
    pub fn save_identity(&self, identity: &SiteIdentity) -> Result<(), StoreError> {
        self.write(&self.paths.identity_file(), &identity.to_secret_bytes())
    }

    /// Stores the CA.
    ///
    /// # Errors
    /// The file system refuses; the CA is as before.
    pub fn save_ca(&self, ca: &SiteCa) -> Result<(), StoreError> {
        let base64 = data_encoding::BASE64;
        let stored = StoredCa {
            key: Zeroizing::new(base64.encode(ca.key_pkcs8())),
            certificate: base64.encode(ca.certificate()),
        };
        self.save_json("ca.json", &stored)
    }

    /// Stores the site secret.
    ///
    /// # Errors
    /// The file system refuses.
    pub fn save_secret(&self, secret: &[u8; 32]) -> Result<(), StoreError> {
        self.write(&self.path("site.secret"), secret)
    }

    /// Stores network, authorities and statement.
    ///
    /// # Errors
    /// The file system refuses; the file is as before.
    pub fn save_site(&self, site: &SiteState) -> Result<(), StoreError> {
        self.save_json("site.json", site)
    }

    /// Stores the boot epochs.
    ///
    /// # Errors
    /// The file system refuses; the file is as before.
    pub fn save_epochs(&self, epochs: &BTreeMap<String, u64>) -> Result<(), StoreError> {
        self.save_json("epochs.json", epochs)
    }

    /// Stores the automatic endpoints.
    ///
    /// # Errors
    /// The file system refuses; the file is as before.
    pub fn save_endpoints(&self, endpoints: &AutoEndpoints) -> Result<(), StoreError> {
        let by_name: BTreeMap<_, _> =
            endpoints.iter().map(|(address, endpoint)| (address.as_str(), endpoint)).collect();
        self.save_json("endpoints.json", &by_name)
    }

    /// Stores a grant.
    ///
    /// # Errors
    /// The file system refuses; the grant is as before.
    pub fn save_grant(&self, grant: &Grant) -> Result<(), StoreError> {
        self.commit(&[Change::PutGrant(Box::new(grant.clone()))])
    }

    /// Stores what this site says of another.
    ///
    /// # Errors
    /// The file system refuses; the file is as before.
    pub fn save_endorsed(&self, endorsed: &Endorsed) -> Result<(), StoreError> {
        self.commit(&[Change::PutEndorsed(Box::new(endorsed.clone()))])
    }

    /// Stores what was heard of others.
    ///
    /// # Errors
    /// The file system refuses; the file is as before.
    pub fn save_learned(&self, learned: &[Record]) -> Result<(), StoreError> {
        let encoded = Learned { records: learned.to_vec() }.encode_to_vec();
        self.write(&self.path("trust/learned.pb"), &encoded)
    }

    /// Marks the site as meant to be stopped.
    ///
    /// # Errors
    /// The file system refuses.
    pub fn mark_stopped(&self) -> Result<(), StoreError> {
        self.write(&self.paths.stopped_file(), b"")
    }

    fn path(&self, name: &str) -> PathBuf {
        self.paths.state().join(name)
    }

    fn read(&self, path: &Path) -> Result<Option<Vec<u8>>, StoreError> {
        self.disk.read(path).map_err(|source| io_error("read", path, source))
    }

    fn write(&self, path: &Path, content: &[u8]) -> Result<(), StoreError> {
        self.disk.replace(path, content).map_err(|source| io_error("write", path, source))
    }

    fn save_json<T: Serialize>(&self, name: &str, value: &T) -> Result<(), StoreError> {
        self.write(&self.path(name), &json(value))
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

    fn optional<T: DeserializeOwned + Default>(
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

    /// Reads a file the site can do without. One that is far too long is damaged like any other.
    fn read_or_set_aside(
        &self,
        path: &Path,
        problems: &mut Vec<SetAside>,
    ) -> Result<Option<Vec<u8>>, StoreError> {
        match self.disk.read(path) {
            Err(error) if error.kind() == io::ErrorKind::InvalidData => {
                self.set_aside(path, &error.to_string(), problems)?;
                Ok(None)
            }
            read => read.map_err(|source| io_error("read", path, source)),
        }
    }

    /// Moves a damaged file out of the way, keeping it for whoever wants to look.
    fn set_aside(
        &self,
        path: &Path,
        why: &str,
        problems: &mut Vec<SetAside>,
    ) -> Result<(), StoreError> {
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or("file");
        let aside = path.with_file_name(format!("{name}{ASIDE}{}", clock::unix_s()));
        self.disk.rename(path, &aside).map_err(|source| io_error("set aside", path, source))?;
        tracing::error!(file = %path.display(), aside = %aside.display(), why, "state file damaged");
        problems.push(SetAside { file: path.to_owned(), aside, why: Some(why.to_owned()) });
        Ok(())
    }

    /// Every damaged file that is still there: whoever removes it has dealt with it.
    ///
    /// # Errors
    /// A directory cannot be listed.
    pub fn set_aside_files(&self) -> Result<Vec<SetAside>, StoreError> {
        let state = self.paths.state();
        let trust = self.paths.trust_dir();
        let dirs = [
            state.to_owned(),
            self.paths.resources_dir(),
            state.join("grants"),
            trust.join("endorsed"),
            trust,
        ];
        let mut out = Vec::new();
        for dir in dirs {
            let names = self.disk.list(&dir).map_err(|source| io_error("read", &dir, source))?;
            let found = names.iter().filter_map(|name| Some((name, name.rsplit_once(ASIDE)?.0)));
            out.extend(found.map(|(aside, name)| SetAside {
                file: dir.join(name),
                aside: dir.join(aside),
                why: None,
            }));
        }
        Ok(out)
    }

    /// As [`set_aside_files`](Self::set_aside_files), with what is `known` of them.
    ///
    /// # Errors
    /// As there.
    pub fn still_aside(&self, known: Vec<SetAside>) -> Result<Vec<SetAside>, StoreError> {
        let mut found = self.set_aside_files()?;
        for one in &mut found {
            let same = known.iter().find(|known| known.aside == one.aside);
            one.why = same.and_then(|known| known.why.clone());
        }
        Ok(found)
    }

    fn load_resources(&self, problems: &mut Vec<SetAside>) -> Result<Resources, StoreError> {
        let mut out = Resources::default();
        let dir = self.paths.resources_dir();
        for name in self.list(&dir, ".yaml")? {
            let path = dir.join(&name);
            let bytes = self.read(&path)?.unwrap_or_default();
            let parsed = skein_api::parse_documents(&bytes).map_err(|error| error.to_string());
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
    fn list(&self, dir: &Path, suffix: &str) -> Result<Vec<String>, StoreError> {
        let names = self.disk.list(dir).map_err(|source| io_error("read", dir, source))?;
        Ok(names
            .into_iter()
            .filter(|name| name.ends_with(suffix) && !name.starts_with('.'))
            .collect())
    }
}

/// What every JSON file looks like.
#[derive(Serialize, Deserialize)]
struct Stated<T> {
    version: u32,
    state: T,
}

/// State as people can read it; wiped from memory, because some of it is secret.
fn json<T: Serialize>(state: &T) -> Zeroizing<Vec<u8>> {
    let stated = Stated { version: STATE_VERSION, state };
    let json = serde_json::to_vec_pretty(&stated);
    Zeroizing::new(json.expect("invariant: state has string keys only"))
}

/// Reads what [`json`] wrote; what cannot be understood is described.
fn parse<T: DeserializeOwned>(path: &Path, bytes: &[u8]) -> Result<Result<T, String>, StoreError> {
    #[derive(Deserialize)]
    struct Form {
        version: u32,
    }
    match serde_json::from_slice(bytes) {
        Ok(Form { version }) if version > STATE_VERSION => {
            Err(StoreError::Newer { path: path.to_owned(), version })
        }
        Ok(_) => Ok(serde_json::from_slice(bytes)
            .map(|stated: Stated<T>| stated.state)
            .map_err(|error| error.to_string())),
        Err(error) => Ok(Err(error.to_string())),
    }
}

fn io_error(action: &'static str, path: &Path, source: io::Error) -> StoreError {
    StoreError::Io { action, path: path.to_owned(), source }
}

/// Kinds and names are of letters, digits and hyphens, so the dot separates them.
fn resource_file_name(kind: Kind, name: &str) -> String {
    format!("{}.{name}.yaml", kind.as_str().to_ascii_lowercase())
}

/// The content of a resource's file.
fn resource_yaml(resource: &Resource) -> String {
    skein_api::to_yaml(std::slice::from_ref(resource))
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::site::{InitOptions, create};
    use std::{
        fs,
        sync::atomic::{AtomicUsize, Ordering},
    };

    /// Lets a number of writes pass, then fails as a full disk does.
    #[derive(Debug)]
    pub(crate) struct FullAfter(pub(crate) AtomicUsize);

    impl FullAfter {
        fn spend(&self) -> io::Result<()> {
            let left =
                self.0.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |n| n.checked_sub(1));
            left.map(drop).map_err(|_| io::ErrorKind::StorageFull.into())
        }
    }

    impl Disk for FullAfter {
        fn read(&self, path: &Path) -> io::Result<Option<Vec<u8>>> {
            HostDisk.read(path)
        }
        fn replace(&self, path: &Path, content: &[u8]) -> io::Result<()> {
            self.spend().and_then(|()| HostDisk.replace(path, content))
        }
        fn remove(&self, path: &Path) -> io::Result<()> {
            self.spend().and_then(|()| HostDisk.remove(path))
        }
        fn put_unsynced(&self, path: &Path, content: Option<&[u8]>) -> io::Result<()> {
            self.spend().and_then(|()| HostDisk.put_unsynced(path, content))
        }
        fn sync(&self, dir: &Path) -> io::Result<()> {
            HostDisk.sync(dir)
        }
        fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
            HostDisk.rename(from, to)
        }
        fn list(&self, dir: &Path) -> io::Result<Vec<String>> {
            HostDisk.list(dir)
        }
    }

    /// A site that does not listen, in a directory of its own.
    pub(crate) fn site() -> (tempfile::TempDir, Paths) {
        let dir = tempfile::tempdir().unwrap();
        let paths = Paths::new(dir.path().join("state"), dir.path().join("run"));
        let options = InitOptions {
            name: Some("hub".into()),
            listen: Some(Vec::new()),
            ..InitOptions::default()
        };
        create(&paths, &options).unwrap();
        (dir, paths)
    }

    fn connectors(count: u32) -> Vec<Change> {
        (0..count)
            .map(|n| {
                let port = skein_api::ConnectorPort {
                    port: n + 1,
                    target_port: None,
                    protocol: skein_api::Protocol::Tcp,
                };
                let spec = skein_api::ConnectorSpec::new("db", vec![port]);
                Change::put(Resource::Connector(skein_api::Manifest::new(format!("c{n}"), spec)))
            })
            .collect()
    }

    #[test]
    fn a_change_is_made_as_a_whole_wherever_the_disk_fills_up() {
        for (count, writes) in [5, 20].into_iter().flat_map(|c| (0..22).map(move |w| (c, w))) {
            let (_dir, paths) = site();
            let disk = Arc::new(FullAfter(AtomicUsize::new(writes)));
            let done = Store::with_disk(paths.clone(), disk)
                .commit(&connectors(u32::try_from(count).unwrap()));
            let found = Store::new(paths).load().unwrap().resources.connectors.len();
            match done {
                Ok(()) => assert_eq!(found, count, "{writes}"),
                Err(error) => {
                    assert_eq!(found, 0, "{writes}");
                    assert!(error.to_string().contains("apply.journal"), "{error}");
                    assert!(error.to_string().contains("disk is full"), "{error}");
                }
            }
        }
    }

    #[test]
    fn a_damaged_file_is_set_aside_and_the_rest_is_read() {
        let (_dir, paths) = site();
        let store = Store::new(paths.clone());
        store.commit(&connectors(2)).unwrap();
        fs::write(paths.resources_dir().join("connector.c0.yaml"), "kind: [").unwrap();
        fs::write(paths.state().join("endpoints.json"), "{").unwrap();
        fs::write(paths.trust_dir().join("learned.pb"), [0xff; 9]).unwrap();
        let loaded = store.load().unwrap();
        assert_eq!(loaded.resources.connectors.keys().collect::<Vec<_>>(), ["c1"]);
        assert_eq!(loaded.problems.len(), 3, "{:?}", loaded.problems);
        let aside = |dir: &Path| {
            let names = HostDisk.list(dir).unwrap();
            names.into_iter().filter(|name| name.contains(".corrupt-")).count()
        };
        let places = [paths.resources_dir(), paths.state().to_owned(), paths.trust_dir()];
        assert_eq!(places.iter().map(|dir| aside(dir)).sum::<usize>(), 3);
        // Named until somebody has dealt with it.
        assert_eq!(store.load().unwrap().problems.len(), 3);
        for one in loaded.problems {
            assert!(one.to_string().contains(" ("), "{one}");
            fs::remove_file(one.aside).unwrap();
        }
        assert!(store.load().unwrap().problems.is_empty());
    }

    /// Counts what waits for the disk.
    #[derive(Debug, Default)]
    struct Counting(AtomicUsize);

    impl Disk for Counting {
        fn read(&self, path: &Path) -> io::Result<Option<Vec<u8>>> {
            HostDisk.read(path)
        }
        fn replace(&self, path: &Path, content: &[u8]) -> io::Result<()> {
            self.0.fetch_add(2, Ordering::SeqCst); // the file and its directory
            HostDisk.replace(path, content)
        }
        fn remove(&self, path: &Path) -> io::Result<()> {
            self.0.fetch_add(1, Ordering::SeqCst);
            HostDisk.remove(path)
        }
        fn put_unsynced(&self, path: &Path, content: Option<&[u8]>) -> io::Result<()> {
            HostDisk.put_unsynced(path, content)
        }
        fn sync(&self, dir: &Path) -> io::Result<()> {
            self.0.fetch_add(1, Ordering::SeqCst);
            HostDisk.sync(dir)
        }
        fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
            HostDisk.rename(from, to)
        }
        fn list(&self, dir: &Path) -> io::Result<Vec<String>> {
            HostDisk.list(dir)
        }
    }

    #[test]
    fn five_hundred_services_wait_for_the_disk_a_few_times() {
        let (_dir, paths) = site();
        let disk = Arc::new(Counting::default());
        Store::with_disk(paths.clone(), Arc::clone(&disk) as _).commit(&connectors(500)).unwrap();
        assert_eq!(disk.0.load(Ordering::SeqCst), 4, "journal, files, end of the journal");
        assert_eq!(Store::new(paths).load().unwrap().resources.connectors.len(), 500);
    }

    #[test]
    fn state_of_a_later_version_is_left_alone_unless_it_only_says_more() {
        let (_dir, paths) = site();
        let (store, path) = (Store::new(paths.clone()), paths.state().join("endpoints.json"));
        fs::write(&path, r#"{"version": 1, "state": {}, "more": 7}"#).unwrap();
        assert!(store.load().unwrap().problems.is_empty());
        let site_json = fs::read_to_string(paths.state().join("site.json")).unwrap();
        let more = site_json.replace("\"network\":", "\"later\": 1, \"network\":");
        assert_ne!(more, site_json);
        fs::write(paths.state().join("site.json"), more).unwrap();
        store.load().unwrap();
        fs::write(&path, r#"{"version": 2, "state": []}"#).unwrap();
        let error = store.load().unwrap_err();
        assert!(matches!(error, StoreError::Newer { version: 2, .. }), "{error}");
        assert!(path.exists(), "nothing is set aside");
    }

    #[test]
    fn a_file_far_too_long_is_set_aside_where_the_site_can_do_without() {
        for name in ["trust/learned.pb", "endpoints.json"] {
            let (_dir, paths) = site();
            let path = paths.state().join(name);
            fs::File::create(&path).unwrap().set_len(65 << 20).unwrap();
            let problems = Store::new(paths).load().unwrap().problems;
            assert!(
                problems.len() == 1 && problems[0].fix().contains("nothing needs"),
                "{problems:?}"
            );
        }
    }

    #[test]
    fn what_a_lost_file_means_is_said() {
        let (_dir, paths) = site();
        for (name, word) in [
            ("grants/token-1.json", "token create"),
            ("trust/endorsed/x.json", "link"),
            ("epochs.json", "nothing"),
        ] {
            fs::write(paths.state().join(name), "{").unwrap();
            let problems = Store::new(paths.clone()).load().unwrap().problems;
            let problem = problems.iter().find(|problem| problem.file.ends_with(name)).unwrap();
            assert!(problem.fix().contains(word), "{problem:?}");
        }
    }

    #[test]
    fn without_identity_or_ca_there_is_no_site_and_nothing_is_touched() {
        for name in ["identity.key", "ca.json", "site.json", "site.secret"] {
            let (_dir, paths) = site();
            let path = paths.state().join(name);
            fs::write(&path, "garbage").unwrap();
            let error = Store::new(paths).load().unwrap_err();
            assert!(
                matches!(&error, StoreError::Damaged { path, .. } if path.ends_with(name)),
                "{error}"
            );
            assert_eq!(fs::read(&path).unwrap(), b"garbage");
        }
    }
}
