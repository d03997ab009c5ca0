//! What a site remembers, as files in its state directory.
//!
//! | file | content |
//! |---|---|
//! | `identity.key` | identity keys (never rewritten but by a rotation) |
//! | `ca.json` | key and certificate of the CA |
//! | `site.secret` | from which routers derive keys that survive their restart |
//! | `site.json` | network, authorities, the last statement |
//! | `epochs.json` | boot epoch of each router |
//! | `endpoints.json` | automatic endpoints handed out |
//! | `resources/KIND.NAME.yaml` | desired state |
//! | `grants/NAME.json` | tokens made here, codes hashed |
//! | `trust/endorsed/SITE.json` | what this site says of another |
//! | `trust/learned.pb` | statements heard of others |
//! | `draining.json` | deleted connectors whose flows run on |
//! | `host.json` | what runs the processes on this host |
//! | `proxy-credentials` | user name and password of the proxy, where they came with the environment |
//! | `apply.journal` | a change that is decided and not finished |
//!
//! A damaged file is set aside under another name and reported until somebody removes it; it is never overwritten. Identity and CA are different: without them
//! there is no site, so a damaged one stops the controller.
//!
//! JSON files say of which form they are. Fields that are not known are ignored, so that an earlier version can take over; a later
//! form stops it instead, because trust that was set aside is lost.

mod aside;
mod disk;
mod draining;
mod error;
mod form;
mod host;
mod journal;
mod load;
mod proxy;

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    sync::Arc,
};

use prost::Message as _;
use serde::{Deserialize, Serialize};
use skein_api::{Kind, Resource};
use skein_site_core::{AutoEndpoints, Endorsed, Grant, IssuedStatement};
use skein_trust::{SiteCa, SiteIdentity};
use skein_wire::proto::{control::Learned, routing::Record};
use zeroize::Zeroizing;

pub use aside::SetAside;
pub use disk::{Disk, HostDisk};
pub use error::StoreError;
pub use host::HostRecord;
pub use journal::Change;
pub use load::Loaded;
pub use proxy::{ProxyCredentials, ProxyDefault};

use crate::paths::Paths;
use error::io_error;
use form::json;

/// Most a controller keeps of what it heard; more is an attack, not a network (1,000 sites have a few thousand statements).
pub const LEARNED_MAX: usize = 20_000;
/// Longest file of learned statements: what a controller writes it must be able to read, and a network of 1,000 sites takes a few MiB.
pub const LEARNED_LEN_MAX: usize = 32 << 20;

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
        fs, io,
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
    fn a_site_is_not_opened_by_a_rule_that_has_become_stricter() {
        let (_dir, paths) = site();
        let (store, file) =
            (Store::new(paths.clone()), paths.resources_dir().join("site.hub.yaml"));
        let before = fs::read_to_string(&file).unwrap();
        let proxied = |url: &str| format!("{before}  proxy:\n    url: {url}\n");
        fs::write(&file, proxied("http://proxy:3128/")).unwrap();
        let site = store.load().unwrap().resources.site.unwrap();
        assert_eq!(site.spec.proxy.unwrap().url, "http://proxy:3128");
        fs::write(&file, proxied("http://10.1:3128")).unwrap();
        let error = store.load().unwrap_err();
        assert!(matches!(error, StoreError::Invalid { .. }), "{error}");
        assert!(error.to_string().contains("spec.proxy.url"), "{error}");
        assert_eq!(fs::read_to_string(&file).unwrap(), proxied("http://10.1:3128"));
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
