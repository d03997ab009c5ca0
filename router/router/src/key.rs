//! The router's key and certificate on disk: all the state a router has.
//!
//! The key is made here, kept in `router.key` with mode 0600 and never leaves the host; the certificate is a cache that saves a
//! restarted router one exchange.

use rustls_pki_types::CertificateDer;
use skein_core::SiteId;
use skein_trust::{KeyRequest, RouterIdentity};
use skein_wire::proto::control::Certificate;
use std::{
    fs::{self, DirBuilder, File, OpenOptions},
    io::{self, Write as _},
    os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
};

const KEY_FILE: &str = "router.key";
const CERTIFICATE_FILE: &str = "router.crt";
/// Larger files are not what we wrote, in bytes.
const FILE_LEN_MAX: u64 = 64 << 10;

/// The state directory or what is in it cannot be used.
#[derive(Debug, thiserror::Error)]
#[error("{}: {source}", path.display())]
pub(crate) struct KeyError {
    /// The file or directory.
    pub path: PathBuf,
    /// What the system said.
    #[source]
    pub source: io::Error,
}

/// The router's key and where it is kept.
#[derive(Debug)]
pub(crate) struct KeyStore {
    dir: PathBuf,
    request: KeyRequest,
}

impl KeyStore {
    /// Reads the key in `dir`, or makes one; the directory is made with mode 0700 if missing.
    ///
    /// # Errors
    /// The directory cannot be made or written, or the key in it is not one.
    pub(crate) fn open(dir: &Path) -> Result<Self, KeyError> {
        let at = |path: &Path| {
            let path = path.to_owned();
            |source| KeyError { path, source }
        };
        DirBuilder::new().recursive(true).mode(0o700).create(dir).map_err(at(dir))?;
        let path = dir.join(KEY_FILE);
        let request = match read(&path).map_err(at(&path))? {
            Some(der) => KeyRequest::from_pkcs8(&der)
                .map_err(|error| at(&path)(io::Error::new(io::ErrorKind::InvalidData, error)))?,
            None => {
                let request =
                    KeyRequest::generate().map_err(|error| at(&path)(io::Error::other(error)))?;
                replace(&path, &request.to_pkcs8()).map_err(at(&path))?;
                request
            }
        };
        Ok(Self { dir: dir.to_owned(), request })
    }

    /// What the controller signs.
    pub(crate) fn csr(&self) -> &[u8] {
        self.request.csr()
    }

    /// The identity that the cached certificate gives, if it names this router of this site and is good until `until_unix_s`.
    pub(crate) fn cached(
        &self,
        site: SiteId,
        name: &str,
        until_unix_s: i64,
    ) -> Option<RouterIdentity> {
        let bytes = read(&self.dir.join(CERTIFICATE_FILE)).ok()??;
        let certificate = <Certificate as prost::Message>::decode(bytes.as_slice()).ok()?;
        let identity = self.identity(certificate.chain).ok()?;
        let good = identity.site() == site
            && identity.name() == name
            && identity.not_after_unix_s() >= until_unix_s;
        good.then_some(identity)
    }

    /// Joins the key with a certificate the controller has issued, and keeps that.
    ///
    /// # Errors
    /// Why the certificate cannot be used. That it cannot be kept is logged only: it is a cache.
    pub(crate) fn accept(
        &self,
        certificate: &Certificate,
    ) -> Result<RouterIdentity, skein_trust::RouterIdentityError> {
        let identity = self.identity(certificate.chain.clone())?;
        let path = self.dir.join(CERTIFICATE_FILE);
        if let Err(error) = replace(&path, &prost::Message::encode_to_vec(certificate)) {
            tracing::warn!(%error, path = %path.display(), "the certificate cannot be kept");
        }
        Ok(identity)
    }

    fn identity(
        &self,
        chain: Vec<Vec<u8>>,
    ) -> Result<RouterIdentity, skein_trust::RouterIdentityError> {
        let chain = chain.into_iter().map(CertificateDer::from).collect();
        RouterIdentity::new(chain, self.request.private_key())
    }
}

fn read(path: &Path) -> io::Result<Option<Vec<u8>>> {
    match fs::metadata(path) {
        Ok(metadata) if metadata.len() > FILE_LEN_MAX => {
            Err(io::Error::new(io::ErrorKind::InvalidData, "too large for what it should hold"))
        }
        Ok(_) => fs::read(path).map(Some),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

/// Replaces a file by one of mode 0600, so that a crash leaves the old or the new one, whole.
fn replace(path: &Path, contents: &[u8]) -> io::Result<()> {
    let new = path.with_extension("new");
    match fs::remove_file(&new) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        Ok(()) | Err(_) => {}
    }
    let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&new)?;
    file.write_all(contents)?;
    file.sync_all()?;
    fs::rename(&new, path)?;
    path.parent().map_or(Ok(()), |dir| File::open(dir)?.sync_all())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt as _;

    #[test]
    fn a_key_is_made_once_and_is_secret() {
        let dir = tempfile::tempdir().unwrap();
        let state = dir.path().join("state");
        let first = KeyStore::open(&state).unwrap();
        let second = KeyStore::open(&state).unwrap();
        assert_eq!(*first.request.to_pkcs8(), *second.request.to_pkcs8());
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!((mode(&state), mode(&state.join(KEY_FILE))), (0o700, 0o600));
    }

    #[test]
    fn a_damaged_key_is_named_and_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(KEY_FILE);
        fs::write(&path, b"not a key").unwrap();
        let error = KeyStore::open(dir.path()).unwrap_err();
        assert!(error.to_string().contains(KEY_FILE), "{error}");
        assert_eq!(fs::read(&path).unwrap(), b"not a key");
    }

    #[test]
    fn a_crash_while_replacing_is_no_obstacle() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(CERTIFICATE_FILE);
        fs::write(path.with_extension("new"), b"half").unwrap();
        replace(&path, b"whole").unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"whole");
    }
}
