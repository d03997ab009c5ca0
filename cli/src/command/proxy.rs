//! `--proxy` of `skctl init` and `skctl link`, and what the environment says of proxies.

use std::path::Path;

use clap::Args;
use skein_api::{Manifest, ProxySpec, Resource};
use skein_controller::{
    Paths,
    site::{self, InitOptions},
};
use skein_proxy::{Credentials, Proxy, Url, UrlError};

use crate::{client::Client, error::Failure, input};

/// In the site's state directory: credentials that came from the environment.
const CREDENTIALS_FILE: &str = "proxy-credentials";

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

impl ProxyArgs {
    /// Checks everything before anything is changed.
    pub(crate) fn wanted(&self) -> Result<Wanted, Failure> {
        let Some(url) = &self.proxy else {
            return Ok(Wanted { given: None, found: from_environment(&variable) });
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
    /// Puts it into options; credentials of the environment are kept in the state directory.
    pub(crate) fn into_options(
        self,
        paths: &Paths,
        options: InitOptions,
    ) -> Result<InitOptions, Failure> {
        let Self { given, found } = self;
        let found =
            found.map(|(spec, credentials)| with_file(paths, spec, credentials)).transpose()?;
        Ok(InitOptions { proxy: given, proxy_default: found, ..options })
    }

    /// Changes a running site; returns the proxy's URL if it has got one.
    pub(crate) async fn apply(
        self,
        client: &mut Client,
        paths: &Paths,
    ) -> Result<Option<String>, Failure> {
        if self.given.is_none() && self.found.is_none() {
            return Ok(None);
        }
        let found = client.get("Site", "").await?;
        let before = found.into_iter().find_map(|resource| match resource {
            Resource::Site(site) => Some(Manifest { status: None, ..site }),
            _ => None,
        });
        let paths = paths.clone();
        let site = input::blocking(move || {
            if self.given.is_none() && before.as_ref().is_some_and(|site| site.spec.proxy.is_some())
            {
                return Ok(None);
            }
            let options = self.into_options(&paths, InitOptions::default())?;
            let (site, _) = site::merged(before, &options).map_err(Failure::new)?;
            Ok(Some(site))
        });
        let Some(site) = site.await? else { return Ok(None) };
        let url = site.spec.proxy.as_ref().map(|proxy| proxy.url.clone());
        client.apply(&[Resource::Site(site)], false).await?;
        Ok(url)
    }
}

fn with_file(
    paths: &Paths,
    spec: ProxySpec,
    credentials: Option<Credentials>,
) -> Result<ProxySpec, Failure> {
    let Some(credentials) = credentials else { return Ok(spec) };
    paths.create().map_err(Failure::new)?;
    let path = paths.state().join(CREDENTIALS_FILE);
    input::write_secret(&path, format!("{}\n", credentials.expose()).as_bytes(), true)?;
    let credentials_file = Some(path.to_string_lossy().into_owned());
    Ok(ProxySpec { credentials_file, ..spec })
}

/// Links and claims are TLS, for which programs look at `HTTPS_PROXY`. What makes no sense is left alone: it is not ours.
fn from_environment(
    variable: &dyn Fn(&str) -> Option<String>,
) -> Option<(ProxySpec, Option<Credentials>)> {
    let text = ["HTTPS_PROXY", "https_proxy"].into_iter().find_map(variable)?;
    let (url, credentials) = Url::parse_with_credentials(&text).ok()?;
    let no_proxy = no_proxy(variable);
    Some((ProxySpec { url: url.to_string(), credentials_file: None, no_proxy }, credentials))
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

    fn found(variables: &[(&str, &str)]) -> Option<(ProxySpec, Option<Credentials>)> {
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
        .unwrap();
        assert_eq!(spec.url, "http://proxy:3128");
        assert_eq!(spec.no_proxy, ["localhost", ".corp.example", "10.0.0.0/8"]);
        assert_eq!(credentials.unwrap().expose(), "user:pass!");
        assert!(found(&[("HTTPS_PROXY", "socks5://x:1")]).is_none());
        assert!(found(&[("HTTP_PROXY", "http://x:1")]).is_none());
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
