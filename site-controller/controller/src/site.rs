//! The birth of a site: identity, CA, secret and the `Site` resource, before any process runs.

use std::{
    collections::BTreeMap,
    io,
    net::{Ipv6Addr, SocketAddr},
    path::PathBuf,
};

use aws_lc_rs::rand::{SecureRandom, SystemRandom};
use skein_api::{
    AutoListen, Limits, Manifest, Platform, ProxySpec, Resource, Role, Service, SiteSpec,
};
use skein_core::SiteId;
use skein_site_core::{Endorsed, IssuedStatement, Resources};
use skein_trust::{CaError, IdentityError, SiteCa, SiteIdentity};
use skein_wire::proto::routing::Record;
use zeroize::Zeroizing;

use crate::{
    clock,
    lock::{LockError, StateLock},
    net,
    paths::{PathError, Paths},
    store::{Change, ProxyDefault, SiteState, Store, StoreError},
};

/// What the user said about a site. Whatever is `None` keeps its value, or takes the default at birth.
#[derive(Clone, Debug, Default)]
pub struct InitOptions {
    /// Name of the site; default the host name.
    pub name: Option<String>,
    /// Sockets for links; an empty list listens nowhere.
    pub listen: Option<Vec<SocketAddr>>,
    /// `HOST[:PORT]` under which others reach the site; an empty list means addresses of this host.
    pub advertise: Option<Vec<String>>,
    /// Whether routers carry transit.
    pub role: Option<Role>,
    /// Which addresses get a local endpoint by themselves.
    pub auto_listen: Option<AutoListen>,
    /// What the site runs on.
    pub platform: Option<Platform>,
    /// What keeps its processes running.
    pub service: Option<Service>,
    /// Whether `/etc/hosts` names the local endpoints.
    pub manage_hosts: Option<bool>,
    /// Where the router's metrics are.
    pub metrics_listen: Option<String>,
    /// Ceilings of each router.
    pub limits: Option<Limits>,
    /// The HTTP proxy for links and claims, or none.
    pub proxy: Option<Option<ProxySpec>>,
    /// The same for a site that has none.
    pub proxy_default: Option<ProxyDefault>,
}

/// A site that is there now.
#[derive(Clone, Debug)]
pub struct Created {
    /// Its resource, with the options merged in.
    pub site: Manifest<SiteSpec>,
    /// Its id.
    pub site_id: SiteId,
    /// Whether it was made just now.
    pub is_new: bool,
    /// Whether the resource of a site that was there has changed.
    pub is_changed: bool,
    /// What the user should know, such as another port than the one asked for.
    pub notes: Vec<String>,
}

/// Why a site was not made.
#[derive(Debug, thiserror::Error)]
pub enum CreateError {
    /// Its directories cannot be used.
    #[error(transparent)]
    Path(#[from] PathError),
    /// Its state cannot be read or written.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// No key could be made.
    #[error(transparent)]
    Identity(#[from] IdentityError),
    /// No CA could be made.
    #[error(transparent)]
    Ca(#[from] CaError),
    /// The options break a rule.
    #[error("{0}")]
    Invalid(#[from] skein_api::Invalids),
    /// Its controller runs, or somebody else changes it at this moment.
    #[error(transparent)]
    Lock(#[from] LockError),
    /// There is another site where one was to be rebuilt.
    #[error(
        "this namespace already has the site {0}, which is not the one to rebuild; use another namespace (-n NS), or `skctl delete` first"
    )]
    OtherIdentity(SiteId),
    /// No socket for links can be made.
    #[error("cannot listen on {addr}: {source}; choose another --listen ADDR:PORT, or --no-listen")]
    Listen {
        /// Where.
        addr: SocketAddr,
        /// Why not.
        source: io::Error,
    },
    /// The damaged state cannot be set aside.
    #[error("cannot set {} aside: {source}", path.display())]
    Aside {
        /// What.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// The site has another name.
    #[error(
        "this namespace already has the site {0:?}, and a site keeps its name; use another namespace (-n NS), or `skctl delete` first"
    )]
    OtherName(String),
}

/// Makes the site, or merges the options into the resource of the one that is there. Starts nothing; the controller must not run.
///
/// # Errors
/// See [`CreateError`]; a site that could not be completed is not there afterwards, because the identity is written last.
pub fn create(paths: &Paths, options: &InitOptions) -> Result<Created, CreateError> {
    create_with(paths, options, None)
}

/// As [`create`], for an identity that exists: the rebuild of a lost site.
///
/// # Errors
/// As there.
pub fn create_with(
    paths: &Paths,
    options: &InitOptions,
    rebuilt: Option<Rebuilt>,
) -> Result<Created, CreateError> {
    if !paths.has_site() {
        // Before anything is written: wrong options leave nothing behind.
        new_manifest(options)?.0.validate()?;
    }
    paths.create()?;
    let mut lock = StateLock::acquire(paths)?;
    let store = Store::new(paths.clone());
    let is_damaged = || matches!(store.load(), Err(StoreError::Damaged { .. }));
    let aside = if paths.has_site() && rebuilt.is_some() && is_damaged() {
        let aside = set_aside(paths)?;
        paths.create()?;
        // The old one went along with the old state.
        lock = StateLock::acquire(paths)?;
        Some(aside)
    } else {
        None
    };
    let mut made = if paths.has_site() {
        existing(&store, options, rebuilt.as_ref())?
    } else {
        make(&store, options, rebuilt)?
    };
    drop(lock);
    made.notes.extend(aside.map(|aside| {
        let aside = aside.display();
        format!(
            "the damaged state is kept in {aside}; what was applied since the export: `skctl apply -f {aside}/resources`"
        )
    }));
    Ok(made)
}

/// Moves a state directory that is damaged out of the way, as a whole: parts of two lives of a site do not fit together.
fn set_aside(paths: &Paths) -> Result<PathBuf, CreateError> {
    let path = paths.state().to_owned();
    let name = format!("{}.damaged-{}", paths.namespace(), clock::unix_s());
    let aside = path.with_file_name(name);
    std::fs::rename(&path, &aside).map_err(|source| CreateError::Aside { path, source })?;
    Ok(aside)
}

fn make(
    store: &Store,
    options: &InitOptions,
    rebuilt: Option<Rebuilt>,
) -> Result<Created, CreateError> {
    let kept = rebuilt.as_ref().map(|rebuilt| rebuilt.kept.clone()).unwrap_or_default();
    let (site, notes) = match &kept.site {
        Some(site) => rebuilt_manifest(site.clone(), options)?,
        None => new_manifest(options)?,
    };
    site.validate()?;
    let now = clock::unix_s();
    let random = SystemRandom::new();
    let Rebuilt { identity, ca, network, authorities, .. } = match rebuilt {
        Some(rebuilt) => rebuilt,
        None => {
            let identity = SiteIdentity::generate(&random)?;
            let ca = SiteCa::generate(identity.site_id(), &random, now)?;
            let network = identity.site_id();
            Rebuilt { identity, ca, network, authorities: Vec::new(), kept: Kept::default() }
        }
    };
    let mut secret = Zeroizing::new([0; 32]);
    random.fill(secret.as_mut()).map_err(|_| IdentityError::Randomness)?;
    let state = SiteState {
        site: identity.site_id().to_string(),
        network: network.to_string(),
        authorities: authorities.iter().map(SiteId::to_string).collect(),
        created_unix_s: now,
        statement: IssuedStatement::default(),
    };
    store.save_secret(&secret)?;
    store.save_ca(&ca)?;
    store.save_site(&state)?;
    for endorsed in kept.endorsed {
        store.save_endorsed(&Endorsed { restored: true, ..endorsed })?;
    }
    store.save_learned(&kept.learned)?;
    let site_change = Change::put(Resource::Site(site.clone()));
    let changes = kept.resources.into_iter().map(Change::put).chain([site_change]);
    let credentials = credentials_change(store, &site, options)?;
    store.commit(&changes.chain(credentials).collect::<Vec<_>>())?;
    // Last: from here on there is a site.
    store.save_identity(&identity)?;
    Ok(Created { site, site_id: identity.site_id(), is_new: true, is_changed: false, notes })
}

/// What a back-up brings along.
#[derive(Debug)]
pub struct Rebuilt {
    /// The identity keys.
    pub identity: SiteIdentity,
    /// The CA.
    pub ca: SiteCa,
    /// The network it belonged to.
    pub network: SiteId,
    /// Sites whose revocations count besides the founder's.
    pub authorities: Vec<SiteId>,
    /// What it stood on and served.
    pub kept: Kept,
}

/// The part of a back-up that makes a rebuilt site what it was: without it, it would trust nobody and have no links.
#[derive(Clone, Debug, Default)]
pub struct Kept {
    /// The `Site` resource.
    pub site: Option<Manifest<SiteSpec>>,
    /// Links, listeners and connectors.
    pub resources: Vec<Resource>,
    /// What it said of others.
    pub endorsed: Vec<Endorsed>,
    /// What it heard of others.
    pub learned: Vec<Record>,
}

fn existing(
    store: &Store,
    options: &InitOptions,
    rebuilt: Option<&Rebuilt>,
) -> Result<Created, CreateError> {
    let loaded = store.load()?;
    let site_id = loaded.identity.site_id();
    if rebuilt.is_some_and(|rebuilt| rebuilt.identity.site_id() != site_id) {
        return Err(CreateError::OtherIdentity(site_id));
    }
    let Resources { site: before, .. } = loaded.resources;
    let (site, moved) = merged(before.clone(), options)?;
    // What was lost is not written anew before its owner has said what it shall be.
    let is_said = before.is_some() || options.listen.is_some();
    let is_changed = is_said && before.as_ref() != Some(&site);
    if is_said {
        let site_change = is_changed.then(|| Change::put(Resource::Site(site.clone())));
        let credentials = credentials_change(store, &site, options)?;
        store.commit(&site_change.into_iter().chain(credentials).collect::<Vec<_>>())?;
    }
    let notes = loaded.problems.iter().map(ToString::to_string).chain(moved).collect();
    Ok(Created { site, site_id, is_new: false, is_changed, notes })
}

/// What becomes of the credentials in the site's own file.
fn credentials_change(
    store: &Store,
    site: &Manifest<SiteSpec>,
    options: &InitOptions,
) -> Result<Option<Change>, StoreError> {
    let given = options.proxy_default.as_ref().and_then(ProxyDefault::credentials);
    store.credentials_change(site.spec.proxy.as_ref(), given)
}

/// The resource of a site with the options merged in, to be applied, and what the user should know. A site whose resource was lost gets a
/// new one, closed but for what the options say.
///
/// # Errors
/// The options break a rule, name another site, or a socket cannot be made.
pub fn merged(
    site: Option<Manifest<SiteSpec>>,
    options: &InitOptions,
) -> Result<(Manifest<SiteSpec>, Vec<String>), CreateError> {
    let (site, mut notes) = match site {
        Some(site) => (site, Vec::new()),
        None => lost_manifest(options),
    };
    if let Some(name) = &options.name
        && *name != site.metadata.name
    {
        return Err(CreateError::OtherName(site.metadata.name));
    }
    let site = merge(site, options, &mut notes)?;
    site.validate()?;
    Ok((site, notes))
}

/// What a site whose document is lost is until somebody says more: closed.
fn lost_manifest(options: &InitOptions) -> (Manifest<SiteSpec>, Vec<String>) {
    let name = options.name.clone().unwrap_or_else(default_name);
    let site = Manifest::new(name, SiteSpec { listen: Vec::new(), ..SiteSpec::default() });
    let note = "the Site document is lost: the site listens nowhere and carries no transit unless you say --listen ADDR:PORT";
    (site, options.listen.is_none().then(|| note.to_owned()).into_iter().collect())
}

/// A site as it was when it was exported, with the options merged in.
fn rebuilt_manifest(
    mut site: Manifest<SiteSpec>,
    options: &InitOptions,
) -> Result<(Manifest<SiteSpec>, Vec<String>), CreateError> {
    if let Some(name) = &options.name {
        site.metadata.name.clone_from(name);
    }
    let mut notes = Vec::new();
    let merged = merge(site, options, &mut notes)?;
    Ok((merged, notes))
}

fn new_manifest(options: &InitOptions) -> Result<(Manifest<SiteSpec>, Vec<String>), CreateError> {
    let name = options.name.clone().unwrap_or_else(default_name);
    let mut notes = Vec::new();
    let mut options = options.clone();
    if options.listen.is_none() {
        let any = net::without_ipv6(
            (Ipv6Addr::UNSPECIFIED, skein_api::DEFAULT_PORT).into(),
            net::has_ipv6(),
        );
        options.listen = Some(vec![any]);
    }
    // None of its own yet: whoever holds the default port is somebody else.
    let blank = SiteSpec { listen: Vec::new(), ..SiteSpec::default() };
    let site = merge(Manifest::new(name, blank), &options, &mut notes)?;
    Ok((site, notes))
}

/// Puts the options into the resource. Sockets that are new are tried, and moved to the next free port if taken.
fn merge(
    mut site: Manifest<SiteSpec>,
    options: &InitOptions,
    notes: &mut Vec<String>,
) -> Result<Manifest<SiteSpec>, CreateError> {
    if let Some(listen) = &options.listen {
        choose_sockets(&mut site, listen, notes)?;
    }
    let spec = &mut site.spec;
    if let Some(advertise) = &options.advertise {
        spec.advertise.clone_from(advertise);
    }
    spec.role = options.role.or(spec.role);
    if let Some(auto_listen) = &options.auto_listen {
        spec.auto_listen = auto_listen.clone();
    }
    if let Some(proxy) = &options.proxy {
        spec.proxy.clone_from(proxy);
    } else if spec.proxy.is_none() {
        spec.proxy = options.proxy_default.as_ref().map(|default| default.spec().clone());
    }
    let refusal = |proxy| options.proxy_default.as_ref()?.refusal(proxy);
    notes.extend(spec.proxy.as_ref().and_then(refusal));
    spec.platform = options.platform.unwrap_or(spec.platform);
    spec.service = options.service.unwrap_or(spec.service);
    spec.manage_hosts = options.manage_hosts.unwrap_or(spec.manage_hosts);
    if options.metrics_listen.is_some() {
        spec.metrics_listen.clone_from(&options.metrics_listen);
    }
    spec.limits = options.limits.unwrap_or(spec.limits);
    Ok(site)
}

/// Sockets that were asked for and moved because the port was taken, so that asking again changes nothing: `ASKED=CHOSEN,…`.
const MOVED: &str = "skein.dev/moved-sockets";

fn choose_sockets(
    site: &mut Manifest<SiteSpec>,
    wanted: &[SocketAddr],
    notes: &mut Vec<String>,
) -> Result<(), CreateError> {
    let moved = site.metadata.annotations.remove(MOVED).unwrap_or_default();
    let moved: BTreeMap<SocketAddr, SocketAddr> = moved
        .split(',')
        .filter_map(|pair| pair.split_once('='))
        .filter_map(|(asked, chosen)| Some((asked.parse().ok()?, chosen.parse().ok()?)))
        .collect();
    let known: Vec<SocketAddr> =
        site.spec.listen.iter().filter_map(|text| text.parse().ok()).collect();
    let mut still_moved = Vec::new();
    site.spec.listen.clear();
    for &asked in wanted {
        let chosen = match moved.get(&asked) {
            Some(chosen) if known.contains(chosen) => *chosen,
            // The port is the site's own, so whether somebody holds it says nothing.
            _ if known.iter().any(|own| own.port() == asked.port()) => asked,
            _ => chosen_socket(asked, notes)?,
        };
        if chosen != asked {
            still_moved.push(format!("{asked}={chosen}"));
        }
        site.spec.listen.push(chosen.to_string());
    }
    if !still_moved.is_empty() {
        site.metadata.annotations.insert(MOVED.to_owned(), still_moved.join(","));
    }
    Ok(())
}

fn chosen_socket(addr: SocketAddr, notes: &mut Vec<String>) -> Result<SocketAddr, CreateError> {
    let addr = net::without_ipv6(addr, net::has_ipv6());
    let chosen = net::free_port(addr).map_err(|source| CreateError::Listen { addr, source })?;
    if addr.port() != 0 && chosen.port() != addr.port() {
        notes.push(format!(
            "port {} is taken, so the site listens on port {}",
            addr.port(),
            chosen.port()
        ));
    }
    Ok(chosen)
}

/// The host name as a DNS label: first part, lower case, everything else a hyphen.
fn default_name() -> String {
    let uname = rustix::system::uname();
    let host = uname.nodename().to_string_lossy().to_lowercase();
    let label: String = host
        .split('.')
        .next()
        .unwrap_or_default()
        .chars()
        .map(|c| if c.is_ascii_lowercase() || c.is_ascii_digit() { c } else { '-' })
        .take(skein_api::NAME_LEN_MAX)
        .collect();
    let label = label.trim_matches('-');
    if label.is_empty() { "site".to_owned() } else { label.to_owned() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt as _;

    fn quiet() -> InitOptions {
        InitOptions { name: Some("hub".into()), listen: Some(Vec::new()), ..InitOptions::default() }
    }

    fn places() -> (tempfile::TempDir, Paths) {
        let dir = tempfile::tempdir().unwrap();
        let paths = Paths::new(dir.path().join("state"), dir.path().join("run"));
        (dir, paths)
    }

    #[test]
    fn a_site_is_made_once() {
        let (_dir, paths) = places();
        let made = create(&paths, &quiet()).unwrap();
        assert!(made.is_new && paths.has_site());
        let again = create(&paths, &quiet()).unwrap();
        assert!(!again.is_new);
        assert_eq!((again.site_id, again.site), (made.site_id, made.site));
        let other = InitOptions { name: Some("other".into()), ..quiet() };
        assert!(
            matches!(create(&paths, &other), Err(CreateError::OtherName(name)) if name == "hub")
        );
        let advertised = InitOptions { advertise: Some(vec!["h.example".into()]), ..quiet() };
        assert_eq!(create(&paths, &advertised).unwrap().site.spec.advertise, ["h.example"]);
    }

    #[test]
    fn every_file_is_private() {
        let (dir, paths) = places();
        create(&paths, &quiet()).unwrap();
        let mut open = vec![dir.path().join("state")];
        while let Some(path) = open.pop() {
            let mode = std::fs::metadata(&path).unwrap().permissions().mode() & 0o777;
            if path.is_dir() {
                assert_eq!(mode, 0o700, "{}", path.display());
                open.extend(std::fs::read_dir(path).unwrap().map(|entry| entry.unwrap().path()));
            } else {
                assert_eq!(mode, 0o600, "{}", path.display());
            }
        }
    }

    #[test]
    fn nothing_is_made_from_bad_options() {
        let (_dir, paths) = places();
        for name in ["../x", "", "Ä", "😀", &"x".repeat(64)] {
            let options = InitOptions { name: Some((*name).into()), ..quiet() };
            assert!(matches!(create(&paths, &options), Err(CreateError::Invalid(_))), "{name}");
        }
        assert!(!paths.state().exists());
    }

    #[test]
    fn a_taken_port_is_replaced_and_said() {
        let (_dir, paths) = places();
        let holder = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
        let taken = holder.local_addr().unwrap();
        let options = InitOptions { listen: Some(vec![taken]), ..quiet() };
        let made = create(&paths, &options).unwrap();
        assert_ne!(made.site.spec.listen, [taken.to_string()]);
        assert_eq!(made.notes.len(), 1);
    }

    #[test]
    fn asking_again_for_a_port_that_was_taken_changes_nothing() {
        let (_dir, paths) = places();
        let holder = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
        let options = InitOptions { listen: Some(vec![holder.local_addr().unwrap()]), ..quiet() };
        let made = create(&paths, &options).unwrap();
        // The site's own router holds what was chosen.
        let chosen: SocketAddr = made.site.spec.listen[0].parse().unwrap();
        let own = std::net::UdpSocket::bind(chosen).unwrap();
        for _ in 0..2 {
            let again = create(&paths, &options).unwrap();
            assert_eq!(again.site, made.site);
            assert!(!again.is_changed && again.notes.is_empty(), "{:?}", again.notes);
        }
        // Also when the port has become free: others know the chosen one by now.
        drop(holder);
        assert_eq!(create(&paths, &options).unwrap().site, made.site);
        drop(own);
    }

    #[test]
    fn nothing_is_written_while_a_controller_runs() {
        let (_dir, paths) = places();
        create(&paths, &quiet()).unwrap();
        let lock = StateLock::acquire(&paths).unwrap();
        let site = paths.resources_dir().join("site.hub.yaml");
        std::fs::write(&site, "kind: [").unwrap();
        let changed = InitOptions { advertise: Some(vec!["h.example".into()]), ..quiet() };
        assert!(matches!(create(&paths, &changed), Err(CreateError::Lock(LockError::Held(_)))));
        assert_eq!(std::fs::read_to_string(&site).unwrap(), "kind: [");
        drop(lock);
        let mended = create(&paths, &changed).unwrap();
        assert_eq!(mended.notes.len(), 1, "{:?}", mended.notes);
        let again = create(&paths, &InitOptions::default()).unwrap();
        assert_eq!(again.site.spec.advertise, ["h.example"]);
        assert_eq!(again.notes.len(), 1, "damage is named until the file is gone");
    }

    #[test]
    fn a_site_without_its_document_stays_closed_until_it_is_told_to_listen() {
        let (_dir, paths) = places();
        let listen = Some(vec!["127.0.0.1:0".parse().unwrap()]);
        create(&paths, &InitOptions { listen, ..quiet() }).unwrap();
        let document = paths.resources_dir().join("site.hub.yaml");
        std::fs::write(&document, "kind: [").unwrap();
        let found = create(&paths, &InitOptions::default()).unwrap();
        assert!(found.site.spec.listen.is_empty() && !document.exists());
        assert_eq!(found.site.spec.effective_role(), Role::Edge);
        assert!(found.notes.iter().any(|note| note.contains("--listen")), "{:?}", found.notes);
    }

    #[test]
    fn an_archive_replaces_what_is_damaged_and_nothing_else() {
        let (_dir, paths) = places();
        create(&paths, &quiet()).unwrap();
        let archive = |paths: &Paths| {
            let loaded = Store::new(paths.clone()).load().unwrap();
            Rebuilt {
                identity: loaded.identity,
                ca: loaded.ca,
                network: SiteId::parse(&loaded.site.network).unwrap(),
                authorities: Vec::new(),
                kept: Kept::default(),
            }
        };
        let ours = archive(&paths);
        let id = ours.identity.site_id();
        std::fs::write(paths.state().join("ca.json"), "garbage").unwrap();
        assert!(create(&paths, &quiet()).is_err(), "not without an archive");
        let made = create_with(&paths, &quiet(), Some(ours)).unwrap();
        assert_eq!((made.site_id, made.is_new), (id, true));
        assert!(made.notes.iter().any(|note| note.contains("kept in")), "{:?}", made.notes);
        Store::new(paths.clone()).load().unwrap();
        let names = std::fs::read_dir(paths.state().parent().unwrap()).unwrap();
        let kept = names.map(|name| name.unwrap().path());
        let kept = kept.filter(|path| path.to_string_lossy().contains(".damaged-"));
        let kept: Vec<_> = kept.map(|path| std::fs::read(path.join("ca.json")).unwrap()).collect();
        assert_eq!(kept, [b"garbage"]);
    }

    #[test]
    fn the_host_name_becomes_a_label() {
        assert!(skein_api::valid_name(&default_name()));
    }
}
