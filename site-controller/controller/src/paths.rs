//! Where a site keeps its state and its sockets.
//!
//! State: `$SKEIN_HOME/NS`, else `/var/lib/skein/NS` (root), else `$XDG_DATA_HOME/skein/NS` or `~/.local/share/skein/NS`.
//! Sockets: `/run/skein/NS` (root, without `SKEIN_HOME`), else `run` in the state. They follow from the place of the state alone: logging out
//! removes `$XDG_RUNTIME_DIR`, and cron, sudo and systemd do not have it, so it must not decide where a running controller is looked for.
//! A Unix socket's path has at most 107 bytes; where the regular place is longer, a short directory named by its hash is used.

use std::{
    ffi::OsString,
    fs, io,
    os::unix::{
        ffi::OsStrExt as _,
        fs::{DirBuilderExt as _, MetadataExt as _},
    },
    path::{Path, PathBuf},
};

use aws_lc_rs::digest;
use data_encoding::HEXLOWER;

/// Longest path of a Unix socket in bytes: `sun_path` has 108, the last of them 0 (unix(7)).
pub const SOCKET_PATH_LEN_MAX: usize = 107;
/// The longest of the names below, with its slash.
const SOCKET_NAME_LEN_MAX: usize = "/control.sock".len();
/// The namespace used when none is named.
pub const DEFAULT_NAMESPACE: &str = "default";

/// The directories of one site.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Paths {
    state: PathBuf,
    runtime: PathBuf,
}

/// Why a site's directories cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum PathError {
    /// Not a DNS label: it becomes a directory name.
    #[error("namespace {0:?} is not valid; use 1 to 63 of a-z, 0-9 and '-'")]
    Namespace(String),
    /// Neither `SKEIN_HOME`, `XDG_DATA_HOME` nor `HOME` says where state belongs.
    #[error("no home directory; set SKEIN_HOME to a directory of yours")]
    NoHome,
    /// A directory is somebody else's, so secrets do not belong there.
    #[error("{} belongs to user {owner}, not to user {user}; run as that user, or set SKEIN_HOME to a directory of yours", path.display())]
    Owner {
        /// The directory.
        path: PathBuf,
        /// Who owns it.
        owner: u32,
        /// Who runs this process.
        user: u32,
    },
    /// A directory lets others in.
    #[error("{0} is open to other users (mode {mode:04o}); run: chmod 700 {0}", path.display())]
    Mode {
        /// The directory.
        path: PathBuf,
        /// Its permission bits.
        mode: u32,
    },
    /// Something else is in the way.
    #[error("{} is not a directory; move it away", path.display())]
    NotADirectory {
        /// What is not a directory.
        path: PathBuf,
    },
    /// The file system refused.
    #[error("cannot use directory {}: {source}", path.display())]
    Io {
        /// The directory.
        path: PathBuf,
        /// What the file system said.
        source: io::Error,
    },
}

/// What decides on the places: an argument, because tests run in parallel and the environment is shared.
#[derive(Clone, Debug, Default)]
pub struct Environment {
    /// `SKEIN_HOME`.
    pub skein_home: Option<OsString>,
    /// `XDG_DATA_HOME`.
    pub xdg_data_home: Option<OsString>,
    /// `HOME`.
    pub home: Option<OsString>,
    /// Effective user id.
    pub uid: u32,
}

impl Environment {
    /// That of this process.
    #[must_use]
    pub fn of_process() -> Self {
        let var = |name| std::env::var_os(name).filter(|value| !value.is_empty());
        Self {
            skein_home: var("SKEIN_HOME"),
            xdg_data_home: var("XDG_DATA_HOME"),
            home: var("HOME"),
            uid: rustix::process::geteuid().as_raw(),
        }
    }

    /// Directory that holds one directory for each namespace.
    fn state_root(&self) -> Result<PathBuf, PathError> {
        if let Some(home) = &self.skein_home {
            return std::path::absolute(home)
                .map_err(|source| PathError::Io { path: home.into(), source });
        }
        if self.uid == 0 {
            return Ok("/var/lib/skein".into());
        }
        // The XDG specification tells to ignore relative paths.
        let data = self.xdg_data_home.as_ref().map(PathBuf::from).filter(|path| path.is_absolute());
        let data = match (data, &self.home) {
            (Some(data), _) => data,
            (None, Some(home)) => Path::new(home).join(".local/share"),
            (None, None) => return Err(PathError::NoHome),
        };
        Ok(data.join("skein"))
    }
}

impl Paths {
    /// The directories of the site called `namespace` on this host. Creates nothing.
    ///
    /// # Errors
    /// The namespace is not a DNS label, or there is no home directory.
    pub fn discover(namespace: &str) -> Result<Self, PathError> {
        Self::resolve(namespace, &Environment::of_process())
    }

    /// As [`discover`](Self::discover), under a given environment.
    ///
    /// # Errors
    /// As there.
    pub fn resolve(namespace: &str, environment: &Environment) -> Result<Self, PathError> {
        if !skein_api::valid_name(namespace) {
            return Err(PathError::Namespace(namespace.to_owned()));
        }
        let state = environment.state_root()?.join(namespace);
        let is_system = environment.uid == 0 && environment.skein_home.is_none();
        let runtime =
            if is_system { Path::new("/run/skein").join(namespace) } else { state.join("run") };
        if runtime.as_os_str().len() + SOCKET_NAME_LEN_MAX <= SOCKET_PATH_LEN_MAX {
            return Ok(Self { state, runtime });
        }
        let runtime = PathBuf::from(format!("/tmp/skein-{}", environment.uid)).join(hash(&state));
        Ok(Self { state, runtime })
    }

    /// The directories named on a process's command line.
    #[must_use]
    pub fn new(state: PathBuf, runtime: PathBuf) -> Self {
        Self { state, runtime }
    }

    /// Makes the directories where they are missing, with mode 0700, and checks that they are this user's alone.
    ///
    /// # Errors
    /// A directory is somebody else's, open to others, not a directory, or cannot be made.
    pub fn create(&self) -> Result<(), PathError> {
        let uid = rustix::process::geteuid().as_raw();
        let grants = self.state.join("grants");
        let endorsed = self.trust_dir().join("endorsed");
        create_private(&self.state, uid)?;
        for dir in [self.resources_dir(), grants, self.trust_dir(), endorsed] {
            create_private(&dir, uid)?;
        }
        for dir in [self.logs_dir(), self.bin_dir(), self.router_dir()] {
            create_private(&dir, uid)?;
        }
        self.create_runtime()
    }

    /// Makes the runtime directory, which does not survive a reboot everywhere.
    ///
    /// # Errors
    /// As [`create`](Self::create).
    pub fn create_runtime(&self) -> Result<(), PathError> {
        let uid = rustix::process::geteuid().as_raw();
        // `/tmp/skein-UID` could have been made by anybody: the parent is checked too, `/run` and the like excepted.
        if let Some(parent) = self.runtime.parent()
            && parent.file_name().is_some_and(|name| name.as_bytes().starts_with(b"skein"))
        {
            create_private(parent, uid)?;
        }
        create_private(&self.runtime, uid)
    }

    /// Whether a site was made here.
    #[must_use]
    pub fn has_site(&self) -> bool {
        self.identity_file().exists()
    }

    /// The namespace: the last part of the state directory.
    #[must_use]
    pub fn namespace(&self) -> &str {
        self.state.file_name().and_then(|name| name.to_str()).unwrap_or(DEFAULT_NAMESPACE)
    }

    /// Names the site among all of this host, for what is shared: units, blocks in `/etc/hosts`. That is the namespace in the regular
    /// places; elsewhere two sites could have the same, so a hash of the place is added.
    #[must_use]
    pub fn label(&self) -> String {
        let namespace = self.namespace();
        let root = self.state.parent().unwrap_or(&self.state);
        if root == Path::new("/var/lib/skein") || root.ends_with(".local/share/skein") {
            return namespace.to_owned();
        }
        format!("{namespace}-{}", &hash(&self.state)[..8])
    }

    /// Directory of everything that must survive a reboot.
    #[must_use]
    pub fn state(&self) -> &Path {
        &self.state
    }

    /// Directory of the sockets.
    #[must_use]
    pub fn runtime(&self) -> &Path {
        &self.runtime
    }

    /// `skctl` talks to the controller here.
    #[must_use]
    pub fn site_socket(&self) -> PathBuf {
        self.runtime.join("site.sock")
    }

    /// Routers attach to the controller here.
    #[must_use]
    pub fn control_socket(&self) -> PathBuf {
        self.runtime.join("control.sock")
    }

    /// Routers splice claims to the controller here.
    #[must_use]
    pub fn claim_socket(&self) -> PathBuf {
        self.runtime.join("claim.sock")
    }

    /// Process id of the router that the controller started.
    #[must_use]
    pub fn router_pid_file(&self) -> PathBuf {
        self.runtime.join("router.pid")
    }

    /// How this host runs the site.
    #[must_use]
    pub fn host_file(&self) -> PathBuf {
        self.state.join("host.json")
    }

    /// One YAML file for each resource.
    #[must_use]
    pub fn resources_dir(&self) -> PathBuf {
        self.state.join("resources")
    }

    /// What this site says and has heard of other sites.
    #[must_use]
    pub fn trust_dir(&self) -> PathBuf {
        self.state.join("trust")
    }

    /// Output of processes that no service manager looks after.
    #[must_use]
    pub fn logs_dir(&self) -> PathBuf {
        self.state.join("logs")
    }

    /// The site's own copies of the executables.
    #[must_use]
    pub fn bin_dir(&self) -> PathBuf {
        self.state.join("bin")
    }

    /// State of the router: its key and certificate.
    #[must_use]
    pub fn router_dir(&self) -> PathBuf {
        self.state.join("router")
    }

    /// The site's identity keys.
    #[must_use]
    pub fn identity_file(&self) -> PathBuf {
        self.state.join("identity.key")
    }

    /// Locked by the one running controller.
    #[must_use]
    pub fn lock_file(&self) -> PathBuf {
        self.state.join("controller.lock")
    }

    /// Exists while the site is meant to be stopped: nobody restarts anybody.
    #[must_use]
    pub fn stopped_file(&self) -> PathBuf {
        self.state.join("stopped")
    }
}

/// 16 characters that stand for a path.
fn hash(path: &Path) -> String {
    let hash = digest::digest(&digest::SHA256, path.as_os_str().as_bytes());
    HEXLOWER.encode(&hash.as_ref()[..8])
}

/// Makes `path` and its missing parents with mode 0700; an existing one must be a directory of `uid` that nobody else can write to or read.
fn create_private(path: &Path, uid: u32) -> Result<(), PathError> {
    let io = |source| PathError::Io { path: path.to_owned(), source };
    match fs::DirBuilder::new().recursive(true).mode(0o700).create(path) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
            return Err(PathError::NotADirectory { path: path.to_owned() });
        }
        made => made.map_err(io)?,
    }
    let meta = fs::symlink_metadata(path).map_err(io)?;
    if !meta.is_dir() {
        return Err(PathError::NotADirectory { path: path.to_owned() });
    }
    if meta.uid() != uid {
        return Err(PathError::Owner { path: path.to_owned(), owner: meta.uid(), user: uid });
    }
    let mode = meta.mode() & 0o7777;
    if mode & 0o077 != 0 {
        return Err(PathError::Mode { path: path.to_owned(), mode });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt as _;

    fn user() -> Environment {
        Environment { home: Some("/home/u".into()), uid: 1000, ..Environment::default() }
    }

    #[test]
    fn places_follow_the_environment() {
        let of = |environment: &Environment| Paths::resolve("ns", environment).unwrap();
        let paths = of(&user());
        assert_eq!(paths.state(), Path::new("/home/u/.local/share/skein/ns"));
        assert_eq!(paths.runtime(), Path::new("/home/u/.local/share/skein/ns/run"));
        let paths = of(&Environment { xdg_data_home: Some("/data".into()), ..user() });
        assert_eq!(paths.state(), Path::new("/data/skein/ns"));
        assert_eq!(paths.runtime(), Path::new("/data/skein/ns/run"));
        let paths = of(&Environment { uid: 0, ..user() });
        assert_eq!(paths.state(), Path::new("/var/lib/skein/ns"));
        assert_eq!(paths.runtime(), Path::new("/run/skein/ns"));
        let paths = of(&Environment { skein_home: Some("/s".into()), ..user() });
        assert_eq!(paths.state(), Path::new("/s/ns"));
        assert_eq!(paths.runtime(), Path::new("/s/ns/run"));
    }

    #[test]
    fn socket_paths_stay_within_the_limit() {
        let long = "x".repeat(63);
        for home in ["/s".to_owned(), format!("/{}", "d".repeat(200))] {
            let environment = Environment { skein_home: Some(home.into()), ..user() };
            let paths = Paths::resolve(&long, &environment).unwrap();
            let len = paths.control_socket().as_os_str().len();
            assert!(len <= SOCKET_PATH_LEN_MAX, "{len}");
        }
    }

    #[test]
    fn sites_of_different_places_have_different_labels() {
        let label = |state: &str| Paths::new(state.into(), "/run/x".into()).label();
        assert_eq!(label("/var/lib/skein/default"), "default");
        assert_eq!(label("/home/u/.local/share/skein/default"), "default");
        let (one, two) = (label("/srv/a/default"), label("/srv/b/default"));
        assert!(one.starts_with("default-") && one.len() == 16 && one != two, "{one} {two}");
    }

    #[test]
    fn namespaces_are_labels() {
        for bad in ["", "../x", "a/b", "ä", "😀", &"a".repeat(64), "-a"] {
            assert!(matches!(Paths::resolve(bad, &user()), Err(PathError::Namespace(_))), "{bad}");
        }
        let nobody = Environment { home: None, ..user() };
        assert!(matches!(Paths::resolve("a", &nobody), Err(PathError::NoHome)));
    }

    #[test]
    fn directories_are_private() {
        let dir = tempfile::tempdir().unwrap();
        let paths = Paths::new(dir.path().join("a/b"), dir.path().join("run"));
        paths.create().unwrap();
        assert_eq!(fs::metadata(paths.state()).unwrap().permissions().mode() & 0o777, 0o700);
        fs::set_permissions(paths.state(), fs::Permissions::from_mode(0o755)).unwrap();
        assert!(matches!(paths.create(), Err(PathError::Mode { mode: 0o755, .. })));
    }

    #[test]
    fn a_file_in_the_way_is_named() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("state"), "").unwrap();
        let paths = Paths::new(dir.path().join("state"), dir.path().join("run"));
        assert!(paths.create().unwrap_err().to_string().contains("state is not a directory"));
    }
}
