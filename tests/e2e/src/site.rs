//! A site on a host of the lab, used as its owner uses it.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::Value;
use skein_lab::{Command, Host, Signal, eventually};

use crate::Shown;

/// How long links, addresses and endpoints may take to appear on a busy machine.
const SETTLE_TIMEOUT: Duration = Duration::from_secs(20);

/// A site, told apart from others on its host by its namespace.
#[derive(Clone, Debug)]
pub struct Site {
    host: Host,
    name: String,
    namespace: String,
}

impl Site {
    /// `skctl init NAME`, without a service manager.
    ///
    /// # Errors
    /// When it fails.
    pub fn init(host: &Host, args: &[&str]) -> Result<Self> {
        Self::init_in(host, "default", args)
    }

    /// [`Site::init`] in a namespace, for more than one site on a host.
    ///
    /// # Errors
    /// When it fails.
    pub fn init_in(host: &Host, namespace: &str, args: &[&str]) -> Result<Self> {
        let name = match namespace {
            "default" => host.name().to_owned(),
            other => format!("{}-{other}", host.name()),
        };
        let site = Self { host: host.clone(), name, namespace: namespace.to_owned() };
        site.skctl(&["init", &site.name, "--service", "none"]).args(args).check()?;
        Ok(site)
    }

    /// The name it was given: its host's.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Where it runs.
    #[must_use]
    pub fn host(&self) -> &Host {
        &self.host
    }

    /// `skctl` on its host.
    #[must_use]
    pub fn skctl(&self, args: &[&str]) -> Command {
        let skctl = self.host.command(crate::skctl()).env("SKEIN_NAMESPACE", &self.namespace);
        skctl.args(args)
    }

    /// What `skctl … -o json` prints.
    ///
    /// # Errors
    /// When it fails or prints something else.
    pub fn json(&self, args: &[&str]) -> Result<Value> {
        let output = self.skctl(args).args(["-o", "json"]).check()?;
        serde_json::from_str(&output.stdout).with_context(|| output.stdout.clone())
    }

    /// `skctl token create`; gives the file.
    ///
    /// # Errors
    /// When it fails.
    pub fn token(&self, name: &str, args: &[&str]) -> Result<PathBuf> {
        let path = self.host.dir().join(format!("{name}.token"));
        self.skctl(&["token", "create"]).arg(&path).args(args).check()?;
        Ok(path)
    }

    /// Links this site to `to` with a fresh token.
    ///
    /// # Errors
    /// When the token or the link fails.
    pub fn link_to(&self, to: &Self, args: &[&str]) -> Result<()> {
        let token = to.token(&format!("for-{}", self.name), &[])?;
        self.link(&token, args)?;
        // Used up; the next one may have its name.
        std::fs::remove_file(token).context("remove a used token")
    }

    /// `skctl link FILE`.
    ///
    /// # Errors
    /// When it fails.
    pub fn link(&self, token: &Path, args: &[&str]) -> Result<()> {
        self.skctl(&["link"]).arg(token).args(args).check()?;
        Ok(())
    }

    /// `skctl expose ADDRESS --port PORT`.
    ///
    /// # Errors
    /// When it fails.
    pub fn expose(&self, address: &str, port: u16, args: &[&str]) -> Result<()> {
        self.skctl(&["expose", address, "--port", &port.to_string()]).args(args).check()?;
        Ok(())
    }

    /// Where clients on this host reach an address, as soon as that is possible.
    ///
    /// # Errors
    /// When `skctl service list` shows no bound endpoint in time.
    pub fn endpoint(&self, address: &str, port: u16) -> Result<SocketAddr> {
        self.endpoint_of(address, port, "tcp")
    }

    /// [`Site::endpoint`] for a port of the protocol `tcp` or `udp`.
    ///
    /// # Errors
    /// When `skctl service list` shows no bound endpoint in time.
    pub fn endpoint_of(&self, address: &str, port: u16, protocol: &str) -> Result<SocketAddr> {
        let mut found = None;
        let what = format!("{address}:{port}/{protocol} at {}", self.name);
        eventually(&what, SETTLE_TIMEOUT, || {
            found = self.bound(address, port, protocol)?;
            Ok(found.is_some())
        })?;
        found.context("invariant: waited for")
    }

    fn bound(&self, address: &str, port: u16, protocol: &str) -> Result<Option<SocketAddr>> {
        let services = self.json(&["service", "list"])?;
        let rows = services.as_array().into_iter().flatten();
        let row = rows.into_iter().find(|row| row["address"] == address);
        let Some(row) = row else { return Ok(None) };
        if row["state"] != "ready" {
            return Ok(None);
        }
        let endpoints = row["endpoints"].as_array().into_iter().flatten();
        let bound = endpoints
            .filter(|endpoint| endpoint["port"] == port && endpoint["protocol"] == protocol)
            .find_map(|endpoint| endpoint["bound"].as_str()?.parse().ok());
        Ok(bound)
    }

    /// Waits until so many links are up, incoming ones included.
    ///
    /// # Errors
    /// With the list of links, when they are not in time.
    pub fn wait_links_up(&self, count: usize) -> Result<Duration> {
        let mut rows = Value::Null;
        let up = |rows: &Value| {
            let rows = rows.as_array().into_iter().flatten();
            rows.filter(|row| row["state"] == "up").count()
        };
        eventually(&format!("{count} links at {}", self.name), SETTLE_TIMEOUT, || {
            rows = self.json(&["link", "list"])?;
            Ok(up(&rows) >= count)
        })
        .with_context(|| rows.to_string())
    }

    /// The first row of `skctl link list`.
    ///
    /// # Errors
    /// When there is none.
    pub fn first_link(&self) -> Result<Value> {
        let links = self.json(&["link", "list"])?;
        links.get(0).cloned().context("a link")
    }

    /// Waits until that row satisfies `check`.
    ///
    /// # Errors
    /// With the row, when it does not in time.
    pub fn wait_link(
        &self,
        what: &str,
        timeout: Duration,
        check: impl Fn(&Value) -> bool,
    ) -> Result<Duration> {
        let took = eventually(what, timeout, || Ok(check(&self.first_link()?)));
        took.with_context(|| format!("{:?}", self.first_link()))
    }

    /// [`Site::wait_link`] where it matters how long it takes.
    ///
    /// # Errors
    /// With the row, when it does not in time.
    pub fn watch_link(
        &self,
        what: &str,
        timeout: Duration,
        check: impl Fn(&Value) -> bool,
    ) -> Result<Shown> {
        let shown = Shown::watch(what, timeout, || self.first_link(), |link| Ok(check(link)));
        shown.with_context(|| format!("{:?}", self.first_link()))
    }

    /// `skctl status`.
    ///
    /// # Errors
    /// When it fails.
    pub fn status(&self) -> Result<Value> {
        self.json(&["status"])
    }

    /// The process ids of controller and router, once both run.
    ///
    /// # Errors
    /// When they do not in time.
    pub fn processes(&self) -> Result<Processes> {
        let mut found = None;
        eventually(&format!("both processes of {}", self.name), SETTLE_TIMEOUT, || {
            let status = self.status()?;
            let controller = pid(&status["controller"]["pid"]);
            let router = pid(&status["routers"][0]["pid"]);
            found = controller.zip(router);
            Ok(found.is_some())
        })?;
        let (controller, router) = found.context("invariant: waited for")?;
        Ok(Processes { controller, router })
    }

    /// Signals the router.
    ///
    /// # Errors
    /// When there is none.
    pub fn signal_router(&self, signal: Signal) -> Result<()> {
        self.host.signal(self.processes()?.router, signal)
    }

    /// Resident memory and open descriptors of a process of the site.
    ///
    /// # Errors
    /// When the process is gone.
    pub fn usage(&self, pid: u32) -> Result<Usage> {
        let status = self.host.read(format!("/proc/{pid}/status"))?;
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
        let kib = line.and_then(|line| line.split_whitespace().next()).context("VmRSS")?;
        let listing = self.host.command("ls").arg(format!("/proc/{pid}/fd")).check()?.stdout;
        Ok(Usage { rss_kib: kib.parse()?, descriptors: listing.lines().count() })
    }

    /// The number a metric of the router has, summed over its labels.
    ///
    /// # Errors
    /// When the metrics cannot be read.
    pub fn metric(&self, name: &str) -> Result<f64> {
        let mut sum = 0.0;
        for line in self.metrics(name)? {
            sum += line.rsplit(' ').next().unwrap_or_default().parse::<f64>()?;
        }
        Ok(sum)
    }

    /// Labels and number of a metric of the router, for all its labels.
    ///
    /// # Errors
    /// When the metrics cannot be read.
    pub fn metrics(&self, name: &str) -> Result<Vec<String>> {
        let status = self.status()?;
        let address = status["routers"][0]["metrics"].as_str().context("the metrics address")?;
        let url = format!("http://{address}/metrics");
        let text = self.host.command("curl").args(["-sf", &url]).check()?.stdout;
        let values = text.lines().filter_map(|line| line.strip_prefix(name));
        Ok(values.filter(|rest| rest.starts_with([' ', '{'])).map(str::to_owned).collect())
    }

    /// Asserts that a command fails with an exit code and all of the words on stderr.
    ///
    /// # Errors
    /// When it does anything else.
    pub fn refuses(&self, args: &[&str], code: i32, words: &[&str]) -> Result<String> {
        let output = self.skctl(args).run()?;
        ensure!(output.code == Some(code), "{args:?} should exit {code}: {output}");
        let stderr = output.stderr.to_lowercase();
        // Lines of progress may come before it.
        ensure!(stderr.lines().any(|line| line.starts_with("error: ")), "{args:?}: {output}");
        for word in words {
            if !stderr.contains(&word.to_lowercase()) {
                bail!("{args:?} does not mention {word:?}: {output}");
            }
        }
        Ok(output.stderr)
    }
}

/// Process ids of a site, as its host numbers them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Processes {
    /// The controller.
    pub controller: u32,
    /// The router.
    pub router: u32,
}

/// What a process holds.
#[derive(Clone, Copy, Debug)]
pub struct Usage {
    /// Resident memory, KiB.
    pub rss_kib: u64,
    /// Open file descriptors.
    pub descriptors: usize,
}

fn pid(value: &Value) -> Option<u32> {
    value.as_u64().and_then(|pid| u32::try_from(pid).ok()).filter(|pid| *pid > 0)
}
