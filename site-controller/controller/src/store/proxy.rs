//! Credentials of a proxy that came with the environment, in a file of the site's own.

use std::{
    fs,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
};

use skein_api::ProxySpec;
use skein_proxy::Credentials;
use zeroize::Zeroizing;

use super::{Change, Store, StoreError};
use crate::paths::Paths;

/// In the state directory, mode 0600.
pub(super) const FILE: &str = "proxy-credentials";

/// Credentials, and the proxy they are for: no other gets to see them.
#[derive(Clone, Debug)]
pub struct ProxyCredentials {
    /// The proxy's URL, as in its resource.
    pub url: String,
    /// For it alone.
    pub credentials: Credentials,
}

impl ProxyCredentials {
    /// Whether `proxy` is the one, and reads what it needs from `file`.
    fn are_for(&self, proxy: Option<&ProxySpec>, file: &Path) -> bool {
        proxy.is_some_and(|proxy| proxy.url == self.url && reads(proxy, file))
    }
}

/// The proxy of a site that is given none.
#[derive(Clone, Debug)]
pub struct ProxyDefault {
    spec: ProxySpec,
    credentials: Option<ProxyCredentials>,
    file: PathBuf,
}

impl ProxyDefault {
    /// A proxy, whose credentials are to be kept for the site.
    #[must_use]
    pub fn new(paths: &Paths, spec: ProxySpec, credentials: Option<Credentials>) -> Self {
        let file = paths.state().join(FILE);
        let credentials_file = credentials.as_ref().map(|_| file.to_string_lossy().into_owned());
        let url = spec.url.clone();
        let credentials = credentials.map(|credentials| ProxyCredentials { url, credentials });
        Self { spec: ProxySpec { credentials_file, ..spec }, credentials, file }
    }

    /// What the site's resource says of it.
    #[must_use]
    pub fn spec(&self) -> &ProxySpec {
        &self.spec
    }

    /// Its credentials.
    #[must_use]
    pub fn credentials(&self) -> Option<&ProxyCredentials> {
        self.credentials.as_ref()
    }

    /// Why `proxy`, the one that the site has, does not get the credentials that are there.
    #[must_use]
    pub fn refusal(&self, proxy: &ProxySpec) -> Option<String> {
        let credentials = self.credentials.as_ref()?;
        if credentials.are_for(Some(proxy), &self.file) {
            return None;
        }
        let why = if proxy.url != credentials.url {
            format!("the site has another proxy, {}", proxy.url)
        } else if let Some(file) = &proxy.credentials_file {
            format!("the site reads those of its proxy from {file}")
        } else {
            format!("the site's proxy {} is used without any", proxy.url)
        };
        let fix = "--proxy URL --proxy-credentials FILE changes that";
        Some(format!("user name and password in HTTPS_PROXY are not taken: {why}; {fix}"))
    }
}

impl Store {
    /// What becomes of the site's own file along with `proxy`, which the site is about to have: it takes what is `given` for this proxy,
    /// and goes when nobody is to read it.
    ///
    /// # Errors
    /// The file cannot be read, or what was decided of it earlier cannot be finished.
    pub fn credentials_change(
        &self,
        proxy: Option<&ProxySpec>,
        given: Option<&ProxyCredentials>,
    ) -> Result<Option<Change>, StoreError> {
        // A journal that waits may be about to write the file.
        self.finish_journal(&mut Vec::new())?;
        let path = self.path(FILE);
        let kept = self.read(&path)?.map(Zeroizing::new);
        if let Some(given) = given.filter(|given| given.are_for(proxy, &path)) {
            let is_news = kept.is_none_or(|kept| *kept != *text(&given.credentials).as_bytes());
            return Ok(is_news.then(|| Change::PutCredentials(given.credentials.clone())));
        }
        let is_read = proxy.is_some_and(|proxy| reads(proxy, &path));
        Ok((kept.is_some() && !is_read).then_some(Change::RemoveCredentials))
    }
}

/// The content of the file.
pub(super) fn text(credentials: &Credentials) -> Zeroizing<String> {
    Zeroizing::new(format!("{}\n", credentials.expose()))
}

/// Whether the proxy's credentials are in `file`, whatever it is called: links lead to a state directory too.
fn reads(proxy: &ProxySpec, file: &Path) -> bool {
    let is_same = |one: &Path, other: &Path| {
        let id = |path: &Path| fs::metadata(path).map(|found| (found.dev(), found.ino())).ok();
        one == other || id(one).is_some_and(|one| Some(one) == id(other))
    };
    proxy.credentials_file.as_ref().map(Path::new).is_some_and(|read| {
        let dirs = read.parent().zip(file.parent());
        // Where it is not there yet, its directory is.
        let would_be = read.file_name() == file.file_name()
            && dirs.is_some_and(|(one, other)| is_same(one, other));
        is_same(read, file) || would_be
    })
}

#[cfg(test)]
mod tests {
    use std::sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    };

    use skein_api::Resource;

    use super::*;
    use crate::store::tests::{FullAfter, site};

    fn default(paths: &Paths, url: &str, credentials: &str) -> ProxyDefault {
        let spec = ProxySpec { url: url.into(), ..ProxySpec::default() };
        ProxyDefault::new(paths, spec, Credentials::from_text(credentials))
    }

    /// Makes what changes along with `proxy` last.
    fn change(store: &Store, proxy: Option<&ProxySpec>, given: &ProxyDefault) {
        let change = store.credentials_change(proxy, given.credentials()).unwrap();
        store.commit(change.as_slice()).unwrap();
    }

    #[test]
    fn credentials_are_for_the_proxy_they_came_with() {
        let (_dir, paths) = site();
        let store = Store::new(paths.clone());
        let file = paths.state().join(FILE);
        let first = default(&paths, "http://a:1", "me:mine");
        // Whatever else is said of it.
        let has = ProxySpec { no_proxy: vec!["corp".into()], ..first.spec().clone() };
        change(&store, Some(&has), &first);
        assert_eq!(fs::read_to_string(&file).unwrap(), "me:mine\n");
        assert!(store.credentials_change(Some(&has), first.credentials()).unwrap().is_none());
        // The environment has changed, the site has not.
        let other = default(&paths, "http://b:1", "other:x");
        assert!(other.refusal(&has).unwrap().contains("another proxy, http://a:1"));
        change(&store, Some(&has), &other);
        assert_eq!(fs::read_to_string(&file).unwrap(), "me:mine\n");
        let rotated = default(&paths, "http://a:1", "me:new");
        assert_eq!(rotated.refusal(&has), None);
        change(&store, Some(&has), &rotated);
        assert_eq!(fs::read_to_string(&file).unwrap(), "me:new\n");
        // Another file is somebody else's.
        let own = ProxySpec { credentials_file: Some("/etc/proxy".into()), ..has };
        assert!(rotated.refusal(&own).unwrap().contains("from /etc/proxy"));
        change(&store, Some(&own), &rotated);
        assert!(!file.exists());
        change(&store, None, &rotated);
        assert!(!file.exists());
    }

    #[test]
    fn a_password_that_was_decided_and_not_written_does_not_stay() {
        let (_dir, paths) = site();
        // The journal and the first file find room, the credentials do not.
        let disk = Arc::new(FullAfter(AtomicUsize::new(2)));
        let store = Store::with_disk(paths.clone(), Arc::clone(&disk) as _);
        let first = default(&paths, "http://a:1", "me:mine");
        let put = store.credentials_change(Some(first.spec()), first.credentials()).unwrap();
        let other = Change::put(Resource::Site(store.load().unwrap().resources.site.unwrap()));
        store.commit(&[other, put.unwrap()]).unwrap();
        assert!(!paths.state().join(FILE).exists());
        // Somebody frees some space; the site shall have no proxy after all.
        disk.0.store(usize::MAX, Ordering::SeqCst);
        change(&store, None, &first);
        assert!(!paths.state().join(FILE).exists());
    }

    #[test]
    fn a_file_is_the_same_by_whatever_path_it_is_reached() {
        let (dir, paths) = site();
        let link = dir.path().join("link");
        std::os::unix::fs::symlink(dir.path(), &link).unwrap();
        let linked = Paths::new(link.join("state"), link.join("run"));
        let (store, file) = (Store::new(paths.clone()), paths.state().join(FILE));
        let first = default(&linked, "http://a:1", "me:mine");
        assert_ne!(first.spec().credentials_file.as_deref(), file.to_str());
        change(&store, Some(first.spec()), &first);
        change(&store, Some(first.spec()), &default(&paths, "http://a:1", "me:new"));
        change(
            &Store::new(linked),
            Some(default(&paths, "http://a:1", "x:y").spec()),
            &default(&paths, "http://b:1", "x:y"),
        );
        assert_eq!(fs::read_to_string(&file).unwrap(), "me:new\n");
    }
}
