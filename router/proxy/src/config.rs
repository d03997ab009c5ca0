//! A proxy as configured.

use crate::Bypass;
use data_encoding::BASE64;
use http::HeaderValue;
use rustix::fs::{Mode, OFlags};
use std::{
    fmt, fs, io,
    path::{Path, PathBuf},
    str::FromStr,
};
use zeroize::Zeroizing;

/// Longest file of credentials; they go into one header.
const CREDENTIALS_LEN_MAX: u64 = 1_024;

/// Why a text is not the URL of a proxy. It is not repeated in the message: it may contain a password.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum UrlError {
    /// Another scheme, or none.
    #[error("must begin with http:// or https://")]
    Scheme,
    /// No host or port where they should be.
    #[error("must be http://HOST:PORT or https://HOST:PORT")]
    Form,
    /// A user name before the host.
    #[error("must not contain a user name or password: those go into a file of their own")]
    Credentials,
}

/// Where a proxy is: `http://HOST:PORT` or `https://HOST:PORT`, never with credentials.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Url {
    /// Whether the connection to the proxy itself is TLS.
    pub is_tls: bool,
    /// Name or address, without brackets.
    pub host: String,
    /// Port.
    pub port: u16,
}

impl Url {
    /// `HOST:PORT`, for resolving.
    #[must_use]
    pub fn endpoint(&self) -> String {
        endpoint(&self.host, self.port)
    }

    /// Reads a URL as environments have it: the scheme may be missing, credentials may be there.
    ///
    /// # Errors
    /// When the text is not a proxy's URL.
    pub fn parse_with_credentials(text: &str) -> Result<(Self, Option<Credentials>), UrlError> {
        let (is_tls, rest) = match text.split_once("://") {
            Some((scheme, rest)) if scheme.eq_ignore_ascii_case("http") => (false, rest),
            Some((scheme, rest)) if scheme.eq_ignore_ascii_case("https") => (true, rest),
            Some(_) => return Err(UrlError::Scheme),
            None => (false, text),
        };
        let rest = rest.strip_suffix('/').unwrap_or(rest);
        let (user_info, authority) = match rest.rsplit_once('@') {
            Some((user_info, authority)) => (Some(user_info), authority),
            None => (None, rest),
        };
        let (host, port) = match split_endpoint(authority) {
            Some(parts) => parts,
            None => (unbracketed(authority).ok_or(UrlError::Form)?, if is_tls { 443 } else { 80 }),
        };
        let legal = |b: u8| b.is_ascii_alphanumeric() || b"-._:".contains(&b);
        if host.is_empty() || !host.bytes().all(legal) {
            return Err(UrlError::Form);
        }
        let credentials = user_info.map(percent_decoded).transpose()?.map(Credentials);
        Ok((Self { is_tls, host: host.to_owned(), port }, credentials))
    }
}

impl FromStr for Url {
    type Err = UrlError;

    fn from_str(text: &str) -> Result<Self, UrlError> {
        if !text.contains("://") {
            return Err(UrlError::Scheme);
        }
        match Self::parse_with_credentials(text)? {
            (url, None) => Ok(url),
            (_, Some(_)) => Err(UrlError::Credentials),
        }
    }
}

impl fmt::Display for Url {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let scheme = if self.is_tls { "https" } else { "http" };
        write!(f, "{scheme}://{}", self.endpoint())
    }
}

/// `user:password`, shown to nobody.
#[derive(Clone, PartialEq, Eq)]
pub struct Credentials(Zeroizing<String>);

impl Credentials {
    /// Takes the first line of a text.
    #[must_use]
    pub fn from_text(text: &str) -> Option<Self> {
        let line = text.lines().next()?.trim_end();
        let plain = !line.bytes().any(|b| b.is_ascii_control());
        (line.contains(':') && plain).then(|| Self(Zeroizing::new(line.to_owned())))
    }

    /// What a file keeps of them.
    #[must_use]
    pub fn expose(&self) -> &str {
        &self.0
    }

    /// The value of `Proxy-Authorization`.
    pub(crate) fn header(&self) -> HeaderValue {
        let text = Zeroizing::new(format!("Basic {}", BASE64.encode(self.0.as_bytes())));
        let mut value = HeaderValue::from_str(&text).expect("invariant: base64 is visible ASCII");
        value.set_sensitive(true);
        value
    }
}

impl fmt::Debug for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Credentials(..)")
    }
}

/// Why a proxy that is configured cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file of credentials cannot be read.
    #[error("the proxy's credentials cannot be read: {}: {error}", path.display())]
    Credentials {
        /// The file.
        path: PathBuf,
        /// Why.
        error: io::Error,
    },
    /// It contains something else.
    #[error("{} must have one line, USER:PASSWORD", .0.display())]
    Malformed(PathBuf),
    /// A directory, a pipe or a device.
    #[error("{} is not a file", .0.display())]
    NotAFile(PathBuf),
    /// Other users may read it.
    #[error("{} can be read by others: chmod 600 it", .0.display())]
    Exposed(PathBuf),
}

/// A proxy, which endpoints it is for, and where its credentials are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Proxy {
    /// Where it is.
    pub url: Url,
    /// Endpoints that are reached directly.
    pub bypass: Bypass,
    /// A file with `USER:PASSWORD`, read whenever they are needed: they may change.
    pub credentials_file: Option<PathBuf>,
}

impl Proxy {
    /// Whether connections to `endpoint` (`HOST:PORT`) go through the proxy.
    #[must_use]
    pub fn is_for(&self, endpoint: &str) -> bool {
        split_endpoint(endpoint)
            .is_some_and(|(host, port)| !is_here(host) && !self.bypass.matches(host, port))
    }

    /// What the proxy asks for.
    ///
    /// # Errors
    /// When the file is not there, exposed, or something else. May take as long as the file system does.
    pub fn credentials(&self) -> Result<Option<Credentials>, ConfigError> {
        self.credentials_file.as_deref().map(read_credentials).transpose()
    }
}

/// Reads `USER:PASSWORD` from a file that only its owner may read.
fn read_credentials(path: &Path) -> Result<Credentials, ConfigError> {
    use std::{io::Read as _, os::unix::fs::PermissionsExt as _};
    let failed = |error| ConfigError::Credentials { path: path.to_owned(), error };
    // A pipe without a writer is opened at once as well, and told from a file once nobody can put another in its place.
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
    let opened = rustix::fs::open(path, flags, Mode::empty());
    let file = fs::File::from(opened.map_err(|error| failed(error.into()))?);
    let metadata = file.metadata().map_err(failed)?;
    if !metadata.is_file() {
        return Err(ConfigError::NotAFile(path.to_owned()));
    }
    if metadata.permissions().mode() & 0o077 != 0 {
        return Err(ConfigError::Exposed(path.to_owned()));
    }
    let mut text = Zeroizing::new(String::new());
    file.take(CREDENTIALS_LEN_MAX).read_to_string(&mut text).map_err(failed)?;
    Credentials::from_text(&text).ok_or_else(|| ConfigError::Malformed(path.to_owned()))
}

/// No proxy leads back to this host.
fn is_here(host: &str) -> bool {
    host.eq_ignore_ascii_case("localhost")
        || host.parse::<std::net::IpAddr>().is_ok_and(|ip| ip.to_canonical().is_loopback())
}

/// `HOST:PORT` with an address of IPv6 in brackets.
pub(crate) fn endpoint(host: &str, port: u16) -> String {
    if host.contains(':') { format!("[{host}]:{port}") } else { format!("{host}:{port}") }
}

/// Host, without brackets, and port.
fn split_endpoint(text: &str) -> Option<(&str, u16)> {
    let (host, port) = text.rsplit_once(':')?;
    Some((unbracketed(host)?, port.parse().ok()?))
}

fn unbracketed(host: &str) -> Option<&str> {
    match host.strip_prefix('[') {
        Some(rest) => rest.strip_suffix(']'),
        None => (!host.contains([':', ']'])).then_some(host),
    }
}

/// User info in URLs writes reserved characters as `%XX`.
fn percent_decoded(text: &str) -> Result<Zeroizing<String>, UrlError> {
    let mut bytes = Zeroizing::new(Vec::with_capacity(text.len()));
    let mut rest = text.bytes();
    while let Some(byte) = rest.next() {
        let digit = |b: Option<u8>| char::from(b?).to_digit(16).and_then(|d| u8::try_from(d).ok());
        bytes.push(match byte {
            b'%' => {
                let (high, low) = (digit(rest.next()), digit(rest.next()));
                high.zip(low).map(|(high, low)| high << 4 | low).ok_or(UrlError::Form)?
            }
            byte => byte,
        });
    }
    let text = String::from_utf8(bytes.to_vec()).map_err(|_| UrlError::Form)?;
    if text.bytes().any(|b| b.is_ascii_control()) {
        return Err(UrlError::Form);
    }
    // A user without password has an empty one.
    Ok(Zeroizing::new(if text.contains(':') { text } else { format!("{text}:") }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::os::unix::fs::PermissionsExt as _;

    #[test]
    fn urls_are_read_and_never_with_credentials() {
        for (text, shown) in [
            ("http://proxy:3128", "http://proxy:3128"),
            ("HTTPS://proxy.example", "https://proxy.example:443"),
            ("http://192.0.2.1/", "http://192.0.2.1:80"),
            ("http://[2001:db8::1]:8080", "http://[2001:db8::1]:8080"),
        ] {
            assert_eq!(text.parse::<Url>().unwrap().to_string(), shown);
        }
        for (text, error) in [
            ("proxy:3128", UrlError::Scheme),
            ("socks5://proxy:1", UrlError::Scheme),
            ("http://", UrlError::Form),
            ("http://a b:1", UrlError::Form),
            ("http://proxy:70000", UrlError::Form),
            ("http://proxy/path", UrlError::Form),
            ("http://user:secret@proxy:3128", UrlError::Credentials),
            ("http://user@proxy:3128", UrlError::Credentials),
        ] {
            assert_eq!(text.parse::<Url>(), Err(error), "{text}");
        }
    }

    #[test]
    fn an_environment_may_have_credentials_and_no_scheme() {
        let (url, credentials) =
            Url::parse_with_credentials("http://us%40er:p%3A%25w@proxy:3128").unwrap();
        assert_eq!(url.to_string(), "http://proxy:3128");
        let credentials = credentials.unwrap();
        assert_eq!(credentials.expose(), "us@er:p:%w");
        assert_eq!(format!("{credentials:?}"), "Credentials(..)");
        let header = credentials.header();
        assert_eq!(header, "Basic dXNAZXI6cDoldw==");
        assert!(format!("{header:?}").contains("Sensitive"));
        let (url, credentials) = Url::parse_with_credentials("proxy:3128").unwrap();
        assert_eq!((url.to_string().as_str(), credentials), ("http://proxy:3128", None));
        let (_, credentials) = Url::parse_with_credentials("http://user@proxy").unwrap();
        assert_eq!(credentials.unwrap().expose(), "user:");
        assert!(Url::parse_with_credentials("http://a%0d%0aX:b@proxy").is_err());
    }

    #[test]
    fn credentials_are_read_from_a_private_file_alone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("credentials");
        let url = "http://proxy:1".parse::<Url>().unwrap();
        let credentials_file = Some(path.clone());
        let proxy = Proxy { url, bypass: Bypass::default(), credentials_file };
        assert!(matches!(proxy.credentials(), Err(ConfigError::Credentials { .. })));
        fs::write(&path, "user:secret\n").unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).unwrap();
        assert!(matches!(proxy.credentials(), Err(ConfigError::Exposed(_))));
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
        assert_eq!(proxy.credentials().unwrap().unwrap().expose(), "user:secret");
        fs::write(&path, "no colon").unwrap();
        assert!(matches!(proxy.credentials(), Err(ConfigError::Malformed(_))));
        let directory = Proxy { credentials_file: Some(dir.path().to_owned()), ..proxy };
        assert!(matches!(directory.credentials(), Err(ConfigError::NotAFile(_))));
    }

    /// Also where it has just taken the place of a file: it is not looked at before it is open.
    #[test]
    fn a_pipe_holds_nobody_up() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("pipe");
        rustix::fs::mkfifoat(rustix::fs::CWD, &path, Mode::RUSR | Mode::WUSR).unwrap();
        assert!(matches!(read_credentials(&path), Err(ConfigError::NotAFile(_))));
    }

    #[test]
    fn exceptions_and_this_host_are_reached_directly() {
        let url = "http://proxy:1".parse::<Url>().unwrap();
        let proxy = Proxy { url, bypass: Bypass::new(["example.com"]), credentials_file: None };
        assert!(proxy.is_for("hub.example.net:7443") && proxy.is_for("[2001:db8::1]:7443"));
        for direct in ["hub.example.com:7443", "localhost:1", "127.0.0.9:1", "[::1]:1", "no-port"] {
            assert!(!proxy.is_for(direct), "{direct}");
        }
    }

    proptest! {
        #[test]
        fn noise_is_no_url_or_one_that_is_read_again(text in ".{0,60}") {
            if let Ok((url, _)) = Url::parse_with_credentials(&text) {
                prop_assert_eq!(url.to_string().parse::<Url>(), Ok(url));
            }
        }
    }
}
