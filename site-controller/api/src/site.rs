//! `Site`: where the site listens, what it calls itself, what it does on its own.

use std::net::SocketAddr;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::{invalid::Invalids, manifest::Spec, resource::Kind, value::HostPort};

/// The port of links, sessions and claims, UDP and TCP.
pub const DEFAULT_PORT: u16 = 7443;
/// Sockets or advertised endpoints of one site; each is dialled by every peer that links.
const ENDPOINTS_MAX: usize = 16;
/// Below this a router cannot hold even its sessions' windows.
const MEMORY_MIB_MIN: u64 = 16;
/// Longest text about a proxy, in bytes: the longest name, and a path.
const PROXY_TEXT_MAX: usize = 512;
/// Exceptions from a proxy.
const NO_PROXY_MAX: usize = 64;

/// The wanted state of a site.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct SiteSpec {
    /// `ADDRESS:PORT` for links, UDP and TCP. An empty list listens nowhere; absent is `[::]:7443`.
    pub listen: Vec<String>,
    /// `HOST[:PORT]` under which others reach the site. Empty: the addresses of interfaces with a default route.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub advertise: Vec<String>,
    /// Whether the routers carry transit. Absent: `interior` if the site listens, else `edge`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub role: Option<Role>,
    /// Which addresses of the network get a local endpoint by themselves.
    pub auto_listen: AutoListen,
    /// What the site runs on.
    pub platform: Platform,
    /// What keeps its processes running.
    pub service: Service,
    /// Whether a block in `/etc/hosts` names the local endpoints.
    pub manage_hosts: bool,
    /// `ADDRESS:PORT` of the router's metrics. Absent: a free port on 127.0.0.1.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub metrics_listen: Option<String>,
    /// Ceilings of each router.
    #[serde(skip_serializing_if = "Limits::is_default")]
    pub limits: Limits,
    /// HTTP proxy through which links and claims go over TCP. UDP is tried directly all the same.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub proxy: Option<ProxySpec>,
}

/// An HTTP proxy that tunnels TCP (CONNECT).
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct ProxySpec {
    /// `http://HOST:PORT` or `https://HOST:PORT`, without user name and password.
    pub url: String,
    /// Absolute path of a file with one line, `USER:PASSWORD`, that nobody but the site's user may read.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub credentials_file: Option<String>,
    /// Endpoints that are reached directly: names with everything below them, addresses, networks, `*`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub no_proxy: Vec<String>,
}

impl ProxySpec {
    /// Checks every rule.
    ///
    /// # Errors
    /// All broken rules with their fields.
    pub fn check(&self) -> Result<(), Invalids> {
        let mut invalids = Invalids::default();
        self.validate(&mut invalids);
        invalids.into_result()
    }

    /// URLs were once taken as environments have them.
    fn normalise(&mut self) {
        let Some((scheme, rest)) = self.url.split_once("://") else { return };
        let scheme = scheme.to_ascii_lowercase();
        let port = if scheme == "https" { 443 } else { 80 };
        if let Ok(host) = rest.strip_suffix('/').unwrap_or(rest).parse::<HostPort>() {
            self.url = format!("{scheme}://{}", host.with_default(port));
        }
    }

    fn validate(&self, invalids: &mut Invalids) {
        let host = ["http://", "https://"].iter().find_map(|scheme| self.url.strip_prefix(scheme));
        // Exactly as it is written: what is understood in two ways leads past the proxy.
        let is_host = |text: &str| {
            let host = text.parse::<HostPort>();
            host.is_ok_and(|host| host.port.is_some() && host.to_string() == text)
        };
        let is_url = host.is_some_and(is_host) && self.url.len() <= PROXY_TEXT_MAX;
        let rule = "must be http://HOST:PORT or https://HOST:PORT, with a name or an IP address";
        invalids.check(is_url, "spec.proxy.url", rule);
        let rule =
            "must not contain a user name or password: those go into spec.proxy.credentialsFile";
        invalids.check(!self.url.contains('@'), "spec.proxy.url", rule);
        if let Some(file) = &self.credentials_file {
            let holds = file.starts_with('/') && file.len() <= PROXY_TEXT_MAX;
            invalids.check(holds, "spec.proxy.credentialsFile", "must be an absolute path");
        }
        let bounded = self.no_proxy.len() <= NO_PROXY_MAX
            && self.no_proxy.iter().all(|entry| entry.len() <= PROXY_TEXT_MAX);
        let rule = format!("must have at most {NO_PROXY_MAX} entries of {PROXY_TEXT_MAX} bytes");
        invalids.check(bounded, "spec.proxy.noProxy", rule);
    }
}

impl Default for SiteSpec {
    fn default() -> Self {
        Self {
            listen: vec![format!("[::]:{DEFAULT_PORT}")],
            advertise: Vec::new(),
            role: None,
            auto_listen: AutoListen::default(),
            platform: Platform::default(),
            service: Service::default(),
            manage_hosts: false,
            metrics_listen: None,
            limits: Limits::default(),
            proxy: None,
        }
    }
}

impl SiteSpec {
    /// The role, given or implied: a site that listens nowhere never becomes transit by accident.
    #[must_use]
    pub fn effective_role(&self) -> Role {
        self.role.unwrap_or(if self.listen.is_empty() { Role::Edge } else { Role::Interior })
    }
}

impl Spec for SiteSpec {
    const KIND: Kind = Kind::Site;

    fn normalise(&mut self) {
        if let Some(proxy) = &mut self.proxy {
            proxy.normalise();
        }
    }

    fn validate(&self, invalids: &mut Invalids) {
        let at_most = format!("must have at most {ENDPOINTS_MAX} entries");
        invalids.check(self.listen.len() <= ENDPOINTS_MAX, "spec.listen", at_most.as_str());
        invalids.check(self.advertise.len() <= ENDPOINTS_MAX, "spec.advertise", at_most);
        for (index, text) in self.listen.iter().enumerate().take(ENDPOINTS_MAX) {
            let rule = "must be ADDRESS:PORT with an IP address (IPv6 in brackets)";
            invalids.check(
                text.parse::<SocketAddr>().is_ok(),
                format!("spec.listen[{index}]"),
                rule,
            );
        }
        for (index, text) in self.advertise.iter().enumerate().take(ENDPOINTS_MAX) {
            if let Err(why) = text.parse::<HostPort>() {
                invalids.add(format!("spec.advertise[{index}]"), why.to_string());
            }
        }
        if let Some(text) = &self.metrics_listen {
            // Metrics name addresses and peers: not for strangers.
            let loopback = text.parse::<SocketAddr>().is_ok_and(|addr| addr.ip().is_loopback());
            let rule = "must be ADDRESS:PORT with a loopback address";
            invalids.check(loopback, "spec.metricsListen", rule);
        }
        self.auto_listen.validate(invalids);
        if let Some(proxy) = &self.proxy {
            proxy.validate(invalids);
        }
        if let Some(mib) = self.limits.memory_mib {
            let rule = format!("must be at least {MEMORY_MIB_MIN}");
            invalids.check(mib >= MEMORY_MIB_MIN, "spec.limits.memoryMib", rule);
        }
        invalids.check(self.limits.flows != Some(0), "spec.limits.flows", "must be at least 1");
    }
}

/// Whether routers carry transit.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub enum Role {
    /// Carries transit.
    Interior,
    /// Never carries transit.
    Edge,
}

/// What a site runs on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub enum Platform {
    /// Found out at `init`.
    #[default]
    Auto,
    /// Processes on a Linux host.
    Linux,
}

/// What keeps the processes of a site running.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub enum Service {
    /// systemd where it is PID 1 of this machine and this network namespace, else none.
    #[default]
    Auto,
    /// systemd units.
    Systemd,
    /// Detached processes that restart each other.
    None,
}

/// Which addresses get a local endpoint without a `Listener`: `all`, `none`, or a pattern (`payments.*`).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(transparent)]
pub struct AutoListen(pub String);

impl Default for AutoListen {
    fn default() -> Self {
        Self("all".to_owned())
    }
}

impl AutoListen {
    /// Whether `address` gets an endpoint.
    #[must_use]
    pub fn matches(&self, address: &str) -> bool {
        match self.0.as_str() {
            "all" => true,
            "none" => false,
            pattern => pattern.split_once('*').map_or(pattern == address, |(head, tail)| {
                address.len() >= head.len() + tail.len()
                    && address.starts_with(head)
                    && address.ends_with(tail)
            }),
        }
    }

    fn validate(&self, invalids: &mut Invalids) {
        let legal = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b"-.*".contains(&b);
        let holds = !self.0.is_empty()
            && self.0.len() <= skein_core::ADDRESS_LEN_MAX
            && self.0.bytes().all(legal)
            && self.0.matches('*').count() <= 1;
        let rule = "must be all, none, or a pattern of a-z, 0-9, '-', '.' and at most one '*'";
        invalids.check(holds, "spec.autoListen", rule);
    }
}

/// Ceilings of each router.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct Limits {
    /// For flow buffers, MiB. Absent: the router's default.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub memory_mib: Option<u64>,
    /// Flows at once. Absent: the router's default.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub flows: Option<u32>,
}

impl Limits {
    fn is_default(&self) -> bool {
        *self == Self::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns_have_one_star() {
        let matches = |pattern: &str, address: &str| AutoListen(pattern.into()).matches(address);
        assert!(matches("all", "x") && !matches("none", "x"));
        assert!(matches("pay.*", "pay.prod") && !matches("pay.*", "play.prod"));
        assert!(matches("*.prod", "pay.prod") && !matches("*.prod", "prod"));
        assert!(matches("a*a", "aa") && !matches("a*a", "a"));
        assert!(matches("db", "db") && !matches("db", "db2"));
    }

    #[test]
    fn the_url_of_a_proxy_has_one_form_and_earlier_ones_are_put_in_it() {
        let proxy = |url: &str| ProxySpec { url: url.into(), ..ProxySpec::default() };
        for (url, now) in [
            ("http://proxy:3128", "http://proxy:3128"),
            ("http://proxy:3128/", "http://proxy:3128"),
            ("HTTP://proxy", "http://proxy:80"),
            ("https://[2001:db8::1]/", "https://[2001:db8::1]:443"),
        ] {
            let mut stored = proxy(url);
            assert_eq!(stored.check().is_ok(), url == now, "{url}");
            stored.normalise();
            assert_eq!(stored, proxy(now));
            stored.check().unwrap();
        }
        for url in ["http://10.1:3128", "http://u:p@proxy:1", "socks5://proxy:1", "http://a:1/b"] {
            let mut stored = proxy(url);
            stored.normalise();
            stored.check().unwrap_err();
        }
    }

    #[test]
    fn a_site_that_does_not_listen_is_an_edge() {
        let quiet = SiteSpec { listen: Vec::new(), ..SiteSpec::default() };
        assert_eq!(quiet.effective_role(), Role::Edge);
        assert_eq!(SiteSpec::default().effective_role(), Role::Interior);
    }
}
