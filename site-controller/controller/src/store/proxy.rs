//! Credentials of a proxy that came with the environment, in a file of the site's own.

use skein_api::ProxySpec;
use skein_proxy::Credentials;

use super::{Store, StoreError, io_error};
use crate::paths::Paths;

/// In the state directory, mode 0600.
const FILE: &str = "proxy-credentials";

/// The proxy of a site that is given none.
#[derive(Clone, Debug)]
pub struct ProxyDefault {
    spec: ProxySpec,
    credentials: Option<Credentials>,
}

impl ProxyDefault {
    /// A proxy, whose credentials are to be kept for the site.
    #[must_use]
    pub fn new(paths: &Paths, spec: ProxySpec, credentials: Option<Credentials>) -> Self {
        let file = || paths.state().join(FILE).to_string_lossy().into_owned();
        let credentials_file = credentials.as_ref().map(|_| file());
        Self { spec: ProxySpec { credentials_file, ..spec }, credentials }
    }

    /// What the site's resource says of it.
    #[must_use]
    pub fn spec(&self) -> &ProxySpec {
        &self.spec
    }
}

impl Store {
    /// Keeps its credentials if it is `proxy`, the one that the site has now: no other gets to see them.
    ///
    /// # Errors
    /// The file system refuses.
    pub fn keep_credentials(
        &self,
        default: &ProxyDefault,
        proxy: Option<&ProxySpec>,
    ) -> Result<(), StoreError> {
        match &default.credentials {
            Some(credentials) if proxy == Some(&default.spec) => {
                self.write(&self.path(FILE), format!("{}\n", credentials.expose()).as_bytes())
            }
            _ => Ok(()),
        }
    }

    /// Removes credentials that `proxy`, the one that the site has now, does not need.
    ///
    /// # Errors
    /// The file system refuses.
    pub fn drop_credentials(&self, proxy: Option<&ProxySpec>) -> Result<(), StoreError> {
        let path = self.path(FILE);
        let used = proxy.and_then(|proxy| proxy.credentials_file.as_deref());
        if used.is_some_and(|used| path == std::path::Path::new(used)) {
            return Ok(());
        }
        self.disk.remove(&path).map_err(|source| io_error("remove", &path, source))
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn credentials_are_for_the_proxy_they_came_with() {
        let dir = tempfile::tempdir().unwrap();
        let paths = Paths::new(dir.path().join("state"), dir.path().join("run"));
        paths.create().unwrap();
        let store = Store::new(paths.clone());
        let default = |url: &str, credentials: &str| {
            let spec = ProxySpec { url: url.into(), ..ProxySpec::default() };
            ProxyDefault::new(&paths, spec, Credentials::from_text(credentials))
        };
        let file = paths.state().join(FILE);
        let first = default("http://a:1", "me:mine");
        let has = first.spec().clone();
        store.keep_credentials(&first, Some(&has)).unwrap();
        assert_eq!(fs::read_to_string(&file).unwrap(), "me:mine\n");
        // The environment has changed, the site has not.
        store.keep_credentials(&default("http://b:1", "other:x"), Some(&has)).unwrap();
        store.drop_credentials(Some(&has)).unwrap();
        assert_eq!(fs::read_to_string(&file).unwrap(), "me:mine\n");
        store.keep_credentials(&default("http://a:1", "me:new"), Some(&has)).unwrap();
        assert_eq!(fs::read_to_string(&file).unwrap(), "me:new\n");
        store.drop_credentials(None).unwrap();
        assert!(!file.exists());
        store.drop_credentials(None).unwrap();
    }
}
