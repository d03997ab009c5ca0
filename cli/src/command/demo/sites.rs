//! The four sites of the demo and their processes.

use std::{fs, os::unix::ffi::OsStrExt as _, path::Path, time::Duration};

use rustix::process::{Pid, Signal, kill_process};
use skein_api::{AutoListen, Service, status::SiteStatus};
use skein_controller::{
    Environment, Paths,
    site::{self, InitOptions},
};
use skein_wire::proto::site::{CreateTokenRequest, RedeemTokenRequest};
use tempfile::TempDir;

use crate::{
    args::Global,
    client::Client,
    command::{link::follow, logs},
    error::Failure,
    host, input,
    output::note,
    progress::Progress,
};

/// Leaf, leaf, transit, transit.
const NAMES: [&str; 4] = ["demo-a", "demo-b", "demo-t1", "demo-t2"];
/// Who redeems a token of whom, at which cost. The transits join first: two networks would otherwise have grown; but the
/// way through both is for when there is no other.
const LINKS: [(&str, &str, u32); 5] = [
    ("demo-t2", "demo-t1", 100),
    ("demo-a", "demo-t1", 1),
    ("demo-a", "demo-t2", 1),
    ("demo-b", "demo-t1", 1),
    ("demo-b", "demo-t2", 1),
];
/// How long one link may take.
const LINK_TIMEOUT_MS: u64 = 10_000;
/// Rounds of killing: processes restart each other, so those started during one round are found in the next.
const KILL_ROUNDS: u32 = 40;
const KILL_INTERVAL: Duration = Duration::from_millis(50);
/// Last bytes of a log that are shown when the demo fails.
const LOG_LEN_MAX: u64 = 4 * 1024;

/// Four sites in a temporary directory. Dropping it ends their processes and removes their files.
#[derive(Debug)]
pub(super) struct Sites {
    home: TempDir,
    paths: Vec<(&'static str, Paths)>,
}

impl Sites {
    pub(super) fn new() -> Result<Self, Failure> {
        // Mode 0700, and short: socket paths have 107 bytes.
        let home = tempfile::Builder::new()
            .prefix("skein-demo-")
            .tempdir()
            .map_err(|error| Failure::new("cannot make a temporary directory").because(error))?;
        let environment =
            Environment { skein_home: Some(home.path().into()), ..Environment::of_process() };
        let resolve = |name| Paths::resolve(name, &environment).map(|paths| (name, paths));
        let paths =
            NAMES.into_iter().map(resolve).collect::<Result<_, _>>().map_err(Failure::new)?;
        Ok(Self { home, paths })
    }

    /// Creates and starts all sites.
    pub(super) async fn start(&self, progress: &mut Progress) -> Result<(), Failure> {
        for (name, paths) in &self.paths {
            let options = options(name);
            let created = paths.clone();
            input::blocking(move || site::create(&created, &options).map_err(Failure::new)).await?;
            host::start(paths).await?;
        }
        for (name, paths) in &self.paths {
            host::ready(paths, progress).await.map_err(|failure| failure.within(name))?;
        }
        Ok(())
    }

    /// Hands tokens out and redeems them.
    pub(super) async fn link(&self, progress: &mut Progress) -> Result<(), Failure> {
        for (redeemer, issuer, cost) in LINKS {
            progress.step(format!("linking {redeemer} to {issuer}"));
            let request = CreateTokenRequest {
                uses: 1,
                expires_s: 60,
                cost,
                ..CreateTokenRequest::default()
            };
            let token = self.client(issuer).await?.create_token(request).await?.token;
            let request = RedeemTokenRequest {
                token,
                timeout_ms: LINK_TIMEOUT_MS,
                ..RedeemTokenRequest::default()
            };
            let mut client = self.client(redeemer).await?;
            let stream = client.raw().redeem_token(request).await?.into_inner();
            let place = format!("{redeemer} to {issuer}");
            follow(stream, progress).await.map_err(|failure| failure.within(place))?;
        }
        Ok(())
    }

    pub(super) async fn client(&self, name: &str) -> Result<Client, Failure> {
        Client::connect_to(self.paths(name)?).await.map_err(|failure| failure.within(name))
    }

    /// Kills the router of a site as a crash would; returns its process id.
    pub(super) async fn kill_router(&self, name: &str) -> Result<u32, Failure> {
        let status: SiteStatus = self.client(name).await?.query("status").await?;
        let pid = status.routers.iter().map(|router| router.pid).find(|&pid| pid > 0);
        let pid = pid.ok_or_else(|| Failure::new(format_args!("{name} has no router process")))?;
        let failed = || Failure::new(format_args!("cannot kill process {pid}"));
        let target = i32::try_from(pid).ok().and_then(Pid::from_raw).ok_or_else(failed)?;
        kill_process(target, Signal::KILL).map_err(|error| failed().because(error))?;
        Ok(pid)
    }

    /// Shows the ends of the logs, for whoever looks into a failure.
    pub(super) fn show_logs(&self, global: &Global) {
        for (site, paths) in &self.paths {
            for (name, path) in logs::files(paths) {
                if let Ok(tail) = logs::tail_bytes(&path, LOG_LEN_MAX) {
                    note(global, format_args!("--- {name} of {site}\n{tail}"));
                }
            }
        }
    }

    fn paths(&self, name: &str) -> Result<&Paths, Failure> {
        let found = self.paths.iter().find(|(known, _)| *known == name);
        found
            .map(|(_, paths)| paths)
            .ok_or_else(|| Failure::new(format_args!("{name:?} is no site of the demo")))
    }
}

fn options(name: &str) -> InitOptions {
    let transit = name.starts_with("demo-t");
    let loopback = std::net::Ipv4Addr::LOCALHOST;
    InitOptions {
        name: Some(name.to_owned()),
        listen: Some(if transit { vec![(loopback, 0).into()] } else { Vec::new() }),
        advertise: transit.then(|| vec![loopback.to_string()]),
        service: Some(Service::None),
        // One local endpoint is enough for all.
        auto_listen: Some(AutoListen(if name == "demo-a" { "all" } else { "none" }.to_owned())),
        ..InitOptions::default()
    }
}

impl Drop for Sites {
    fn drop(&mut self) {
        for (_, paths) in &self.paths {
            // Nobody restarts anybody from here on; where it cannot be written, the rounds below do.
            let _ = fs::write(paths.stopped_file(), b"");
        }
        for _ in 0..KILL_ROUNDS {
            if !kill_all(self.home.path()) {
                break;
            }
            std::thread::sleep(KILL_INTERVAL);
        }
        for (_, paths) in &self.paths {
            // Elsewhere when the temporary directory's path is too long for sockets; else removed with it.
            let _ = fs::remove_dir_all(paths.runtime());
        }
    }
}

/// Kills every process whose command line names `home`, which no other program's does; false when there is none.
fn kill_all(home: &Path) -> bool {
    let home = home.as_os_str().as_bytes();
    let mut found = false;
    let Ok(processes) = fs::read_dir("/proc") else { return false };
    for process in processes.flatten() {
        let pid = process.file_name().to_str().and_then(|name| name.parse::<i32>().ok());
        let Some(pid) = pid.and_then(Pid::from_raw) else { continue };
        if pid == rustix::process::getpid() {
            continue;
        }
        let Ok(line) = fs::read(process.path().join("cmdline")) else { continue };
        if line.windows(home.len()).any(|window| window == home) {
            found = true;
            // It may have ended by itself since.
            let _ = kill_process(pid, Signal::KILL);
        }
    }
    found
}
