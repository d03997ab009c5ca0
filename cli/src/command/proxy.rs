//! `--proxy` of `skctl init` and `skctl link`, and what the environment says of proxies.

use std::path::Path;

use clap::Args;
use skein_api::{Invalids, Manifest, ProxySpec, Resource, SiteSpec};
use skein_controller::{
    Paths,
    site::{self, InitOptions},
    store::ProxyDefault,
};
use skein_proxy::{Credentials, Proxy, Url, UrlError};
use skein_wire::proto::site::Change;

use crate::{client::Client, error::Failure, input};

/// How TCP leaves this network.
#[derive(Clone, Debug, Default, Args)]
pub(crate) struct ProxyArgs {
    /// HTTP proxy for links and claims over TCP, http://HOST:PORT or https://HOST:PORT, kept for the site; none takes it out.
    /// Default for a site that has none: HTTPS_PROXY, with NO_PROXY
    #[arg(long, value_name = "URL|none")]
    proxy: Option<String>,
    /// File with one line, USER:PASSWORD, for the proxy; readable by its owner alone, and read whenever it is needed
    #[arg(long, value_name = "FILE", requires = "proxy")]
    proxy_credentials: Option<String>,
}

/// What the arguments and the environment ask for.
#[derive(Debug, Default)]
pub(crate) struct Wanted {
    /// By arguments: a proxy, or none.
    given: Option<Option<ProxySpec>>,
    /// By the environment, for a site that has none; with credentials.
    found: Option<(ProxySpec, Option<Credentials>)>,
}

/// The first that is there counts.
const VARIABLES: [&str; 2] = ["HTTPS_PROXY", "https_proxy"];

impl ProxyArgs {
    /// What the user should know of an environment that is not used.
    pub(crate) fn note(&self) -> Option<String> {
        if self.proxy.is_some() {
            return None;
        }
        let why = from_environment(&variable).err()?;
        Some(format!("HTTPS_PROXY of the environment is not used: {why}"))
    }

    /// Checks everything before anything is changed.
    pub(crate) fn wanted(&self) -> Result<Wanted, Failure> {
        let Some(url) = &self.proxy else {
            // What makes no sense is said in a note and left alone: it is not ours.
            let found = from_environment(&variable).unwrap_or_default();
            return Ok(Wanted { given: None, found });
        };
        if url == "none" {
            return match self.proxy_credentials {
                Some(_) => Err(Failure::usage("--proxy none has no credentials")),
                None => Ok(Wanted { given: Some(None), found: None }),
            };
        }
        let url: Url = url.parse().map_err(|error| match error {
            UrlError::Credentials => Failure::usage(
                "a password does not belong on the command line",
            )
            .because(
                "other users can read it in the process list, and shells keep it in their history",
            )
            .next("write USER:PASSWORD to a file of mode 0600: --proxy-credentials FILE"),
            UrlError::Scheme | UrlError::Form => Failure::usage(format_args!("--proxy {error}")),
        })?;
        let credentials_file = self.proxy_credentials.as_deref().map(absolute).transpose()?;
        let proxy = Proxy {
            url,
            bypass: skein_proxy::Bypass::default(),
            credentials_file: credentials_file.as_ref().map(Into::into),
        };
        proxy.credentials().map_err(Failure::new)?;
        let spec = ProxySpec {
            url: proxy.url.to_string(),
            credentials_file,
            no_proxy: no_proxy(&variable),
        };
        Ok(Wanted { given: Some(Some(spec)), found: None })
    }
}

impl Wanted {
    /// Puts it into options.
    pub(crate) fn into_options(self, paths: &Paths, options: InitOptions) -> InitOptions {
        let Self { given, found } = self;
        let found = found.map(|(spec, credentials)| ProxyDefault::new(paths, spec, credentials));
        InitOptions { proxy: given, proxy_default: found, ..options }
    }

    /// Changes a running site; returns what the user should know.
    pub(crate) async fn apply(
        self,
        client: &mut Client,
        paths: &Paths,
    ) -> Result<Vec<String>, Failure> {
        let has_credentials = self.found.as_ref().is_some_and(|(_, given)| given.is_some());
        let is_given = self.given.is_some();
        if !is_given && self.found.is_none() {
            return Ok(Vec::new());
        }
        let before = site_of(client).await?;
        let has_one = before.as_ref().is_some_and(|site| site.spec.proxy.is_some());
        // It keeps the one that it has, and gets no more of the environment than another password for that.
        if !is_given && has_one && !has_credentials {
            return Ok(Vec::new());
        }
        let options = self.into_options(paths, InitOptions::default());
        let merged = change(client, before, options).await?.map_err(Failure::new)?;
        let mut notes = merged.notes;
        if let Some(proxy) = merged.site.spec.proxy.filter(|_| is_given || !has_one) {
            notes.push(format!("connections over TCP go through the proxy {}", proxy.url));
        }
        Ok(notes)
    }
}

/// A running site's resource.
pub(crate) async fn site_of(client: &mut Client) -> Result<Option<Manifest<SiteSpec>>, Failure> {
    let found = client.get("Site", "").await?;
    Ok(found.into_iter().find_map(|resource| match resource {
        Resource::Site(site) => Some(Manifest { status: None, ..site }),
        _ => None,
    }))
}

/// What has become of a running site.
pub(crate) struct Merged {
    pub(crate) site: Manifest<SiteSpec>,
    pub(crate) notes: Vec<String>,
    pub(crate) changes: Vec<Change>,
}

/// Merges options into a running site, and lets it have the credentials of its proxy.
pub(crate) async fn change(
    client: &mut Client,
    before: Option<Manifest<SiteSpec>>,
    options: InitOptions,
) -> Result<Result<Merged, site::CreateError>, Failure> {
    let merged = input::blocking(move || {
        let default = options.proxy_default.clone();
        Ok(site::merged(before, &options).map(|(site, notes)| (site, notes, default)))
    });
    let (site, notes, default) = match merged.await? {
        Ok(merged) => merged,
        Err(error) => return Ok(Err(error)),
    };
    let given = default.as_ref().and_then(ProxyDefault::credentials);
    let changes = client.apply_site(&Resource::Site(site.clone()), given).await?;
    Ok(Ok(Merged { site, notes, changes }))
}

/// Links and claims are TLS, for which programs look at `HTTPS_PROXY`. What a site could not have is told without its text, which may
/// contain a password.
fn from_environment(
    variable: &dyn Fn(&str) -> Option<String>,
) -> Result<Option<(ProxySpec, Option<Credentials>)>, String> {
    let Some(text) = VARIABLES.into_iter().find_map(variable) else { return Ok(None) };
    let parsed = Url::parse_with_credentials(&text);
    let (url, credentials) = parsed.map_err(|error| format!("it {error}"))?;
    let no_proxy = no_proxy(variable);
    let spec = ProxySpec { url: url.to_string(), credentials_file: None, no_proxy };
    spec.check().map_err(|Invalids(broken)| {
        let of = |field: &str| if field.ends_with("noProxy") { "NO_PROXY" } else { "it" };
        let rules = broken.iter().map(|one| format!("{} {}", of(&one.field), one.rule));
        rules.collect::<Vec<_>>().join("; ")
    })?;
    Ok(Some((spec, credentials)))
}

fn no_proxy(variable: &dyn Fn(&str) -> Option<String>) -> Vec<String> {
    let text = ["NO_PROXY", "no_proxy"].into_iter().find_map(variable).unwrap_or_default();
    text.split(',').map(|entry| entry.trim().to_owned()).filter(|entry| !entry.is_empty()).collect()
}

fn variable(name: &str) -> Option<String> {
    std::env::var(name).ok().filter(|value| !value.is_empty())
}

fn absolute(file: &str) -> Result<String, Failure> {
    let path = std::path::absolute(Path::new(file))
        .map_err(|error| Failure::new(format_args!("cannot find {file}")).because(error))?;
    let text = path.to_str().ok_or_else(|| Failure::usage(format_args!("{file} is no text")))?;
    Ok(text.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(
        variables: &[(&str, &str)],
    ) -> Result<Option<(ProxySpec, Option<Credentials>)>, String> {
        let of = |name: &str| {
            let found = variables.iter().find(|(variable, _)| *variable == name);
            found.map(|(_, value)| (*value).to_owned())
        };
        from_environment(&of)
    }

    #[test]
    fn the_environment_is_read_and_its_password_kept_apart() {
        let (spec, credentials) = found(&[
            ("https_proxy", "http://user:pass%21@proxy:3128"),
            ("NO_PROXY", "localhost, .corp.example,10.0.0.0/8,"),
        ])
        .unwrap()
        .unwrap();
        assert_eq!(spec.url, "http://proxy:3128");
        assert_eq!(spec.no_proxy, ["localhost", ".corp.example", "10.0.0.0/8"]);
        assert_eq!(credentials.unwrap().expose(), "user:pass!");
        assert!(found(&[("HTTP_PROXY", "http://x:1")]).unwrap().is_none());
    }

    #[test]
    fn an_environment_that_makes_no_sense_is_told_without_its_password() {
        let many = ["a"; 65].join(",");
        for (variables, said) in [
            (vec![("HTTPS_PROXY", "socks5://u:secret@x:1")], "it must begin with http://"),
            (vec![("HTTPS_PROXY", "http://u:secret@10.1:3128")], "it must be http://HOST:PORT"),
            (vec![("HTTPS_PROXY", "http://x:1"), ("NO_PROXY", &many)], "NO_PROXY must have at"),
        ] {
            let why = found(&variables).unwrap_err();
            assert!(why.starts_with(said) && !why.contains("secret"), "{why}");
        }
    }

    #[test]
    fn passwords_are_refused_as_arguments() {
        let proxy = |url: &str| ProxyArgs { proxy: Some(url.into()), proxy_credentials: None };
        let failure = proxy("http://user:secret@proxy:1").wanted().unwrap_err().to_string();
        assert!(failure.contains("--proxy-credentials FILE"), "{failure}");
        assert!(!failure.contains("secret"), "{failure}");
        assert!(proxy("proxy:1").wanted().is_err());
        assert!(matches!(proxy("none").wanted(), Ok(Wanted { given: Some(None), .. })));
    }
}
