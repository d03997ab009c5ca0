//! The tunnel: a connection to the proxy becomes one to the target.

use crate::{ConfigError, Credentials, Proxy, config::endpoint};
use http::{Method, Request, StatusCode, Version, header};
use http_body_util::Empty;
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use rustls::{ClientConfig, RootCertStore};
use rustls_pki_types::ServerName;
use std::{
    io,
    pin::Pin,
    sync::{Arc, OnceLock},
    task::{Context, Poll},
    time::Duration,
};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    sync::Semaphore,
    task, time,
};
use tokio_rustls::{TlsConnector, client::TlsStream};

/// For TLS with the proxy, and again for its answer, which waits until it has reached the target.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);
/// Longest head of an answer. hyper takes no less.
const HEAD_LEN_MAX: usize = 8 << 10;
const HEADERS_MAX: usize = 64;

/// Why there is no tunnel, in words for people.
#[derive(Debug, thiserror::Error)]
pub enum TunnelError {
    /// The credentials cannot be used.
    #[error("{0}")]
    Config(#[from] ConfigError),
    /// The credentials or the certificates of this host are on a file system that does not answer.
    #[error("this host does not read a file within {} s: the proxy's credentials or its own CA certificates", ANSWER_TIMEOUT.as_secs())]
    Unread,
    /// TLS with the proxy fails.
    #[error("TLS with the proxy fails: {0}")]
    Tls(io::Error),
    /// The host has no certificates to judge the proxy by.
    #[error("this host has no CA certificates to check the proxy's by")]
    NoRoots,
    /// The target is not `HOST:PORT`.
    #[error("{0} is no endpoint")]
    Target(String),
    /// 407, or 401, without credentials.
    #[error("the proxy wants credentials")]
    WantsCredentials,
    /// 407 in spite of them.
    #[error("the proxy refuses the credentials")]
    WrongCredentials,
    /// 403, or 405.
    #[error("the proxy does not allow connections to {0}")]
    Forbidden(String),
    /// 502, 503 or 504.
    #[error("the proxy cannot reach {target}: {status}")]
    Unreachable {
        /// Where to.
        target: String,
        /// What it said.
        status: StatusCode,
    },
    /// Any other answer.
    #[error("what should be a proxy answers \"{0}\"")]
    Refused(StatusCode),
    /// Not HTTP.
    #[error("what should be a proxy does not speak HTTP")]
    NotHttp,
    /// It closes the connection instead of answering.
    #[error("the proxy closes the connection without an answer")]
    Closed,
    /// It takes too long.
    #[error("the proxy does not complete its answer within {} s", ANSWER_TIMEOUT.as_secs())]
    Timeout,
    /// It goes on talking in the target's place.
    #[error("the proxy answers in the place of {0}")]
    Impostor(String),
}

/// A connection through a proxy.
#[derive(Debug)]
pub enum Tunnel<S> {
    /// Plain to the proxy.
    Plain(S),
    /// TLS to the proxy; what goes through is inside.
    Tls(Box<TlsStream<S>>),
}

impl Proxy {
    /// Has the proxy at the other end of `stream` connect it to `target` (`HOST:PORT`), which the proxy resolves.
    ///
    /// # Errors
    /// See [`TunnelError`].
    ///
    /// # Cancel safety
    /// Cancelled, the connection is closed.
    pub async fn tunnel<S>(&self, stream: S, target: &str) -> Result<Tunnel<S>, TunnelError>
    where
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let proxy = self.clone();
        let credentials = match self.credentials_file {
            Some(_) => off_thread(move || proxy.credentials()).await??,
            None => None,
        };
        let request = request(target, credentials)?;
        let stream = if self.url.is_tls {
            let config = off_thread(platform_config).await?.ok_or(TunnelError::NoRoots)?;
            let secured = secure(stream, &self.url.host, config);
            let secured = time::timeout(ANSWER_TIMEOUT, secured).await;
            Tunnel::Tls(Box::new(secured.map_err(|_| TunnelError::Timeout)??))
        } else {
            Tunnel::Plain(stream)
        };
        let has_credentials = request.headers().contains_key(header::PROXY_AUTHORIZATION);
        match time::timeout(ANSWER_TIMEOUT, ask(stream, request, target)).await {
            Ok(Err(TunnelError::WantsCredentials)) if has_credentials => {
                Err(TunnelError::WrongCredentials)
            }
            Ok(outcome) => outcome,
            Err(_) => Err(TunnelError::Timeout),
        }
    }
}

/// Reads files elsewhere: the caller's thread moves packets, and file systems may hang. One at a time, so that one that does costs one
/// thread, not another with every attempt.
async fn off_thread<T: Send + 'static>(
    read: impl FnOnce() -> T + Send + 'static,
) -> Result<T, TunnelError> {
    static ONE: Semaphore = Semaphore::const_new(1);
    let reading = async {
        let one = ONE.acquire().await.expect("invariant: never closed");
        let read = task::spawn_blocking(move || {
            let read = read();
            drop(one);
            read
        });
        read.await.map_err(|_panicked| TunnelError::Unread)
    };
    time::timeout(ANSWER_TIMEOUT, reading).await.map_err(|_| TunnelError::Unread)?
}

fn request(
    target: &str,
    credentials: Option<Credentials>,
) -> Result<Request<Empty<&'static [u8]>>, TunnelError> {
    let wrong = || TunnelError::Target(target.to_owned());
    let mut request = Request::builder()
        .method(Method::CONNECT)
        .uri(target)
        .version(Version::HTTP_11)
        .header(header::HOST, target);
    if let Some(credentials) = credentials {
        request = request.header(header::PROXY_AUTHORIZATION, credentials.header());
    }
    let request = request.body(Empty::new()).map_err(|_| wrong())?;
    let authority = request.uri().authority().ok_or_else(wrong)?;
    let port = authority.port_u16().ok_or_else(wrong)?;
    let host = authority.host().trim_matches(['[', ']']);
    if endpoint(host, port) == target { Ok(request) } else { Err(wrong()) }
}

/// The exchange of one request; the answer is bounded by hyper, the time by the caller.
async fn ask<S>(
    stream: Tunnel<S>,
    request: Request<Empty<&'static [u8]>>,
    target: &str,
) -> Result<Tunnel<S>, TunnelError>
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let (mut sender, connection) = http1::Builder::new()
        .max_buf_size(HEAD_LEN_MAX)
        .max_headers(HEADERS_MAX)
        .handshake(TokioIo::new(stream))
        .await
        .map_err(|error| failed(&error))?;
    let exchange = async {
        let response = sender.send_request(request).await.map_err(|error| failed(&error))?;
        match response.status() {
            status if status.is_success() => {}
            // The latter is what some say who mean the former.
            StatusCode::PROXY_AUTHENTICATION_REQUIRED | StatusCode::UNAUTHORIZED => {
                return Err(TunnelError::WantsCredentials);
            }
            StatusCode::FORBIDDEN | StatusCode::METHOD_NOT_ALLOWED => {
                return Err(TunnelError::Forbidden(target.to_owned()));
            }
            status @ (StatusCode::BAD_GATEWAY
            | StatusCode::SERVICE_UNAVAILABLE
            | StatusCode::GATEWAY_TIMEOUT) => {
                return Err(TunnelError::Unreachable { target: target.to_owned(), status });
            }
            status => return Err(TunnelError::Refused(status)),
        }
        hyper::upgrade::on(response).await.map_err(|error| failed(&error))
    };
    let connection = connection.with_upgrades();
    tokio::pin!(exchange, connection);
    let upgraded = tokio::select! {
        // Both are futures made here; the exchange ends first, for it holds the sender.
        biased;
        upgraded = &mut exchange => upgraded?,
        ended = &mut connection => {
            ended.map_err(|error| failed(&error))?;
            // What the connection had for the exchange is there by now.
            exchange.await?
        }
    };
    let parts = upgraded.downcast::<TokioIo<Tunnel<S>>>().map_err(|_| TunnelError::Closed)?;
    // In TLS the client speaks first.
    if parts.read_buf.is_empty() {
        Ok(parts.io.into_inner())
    } else {
        Err(TunnelError::Impostor(target.to_owned()))
    }
}

fn failed(error: &hyper::Error) -> TunnelError {
    if error.is_parse() || error.is_parse_too_large() {
        TunnelError::NotHttp
    } else {
        TunnelError::Closed
    }
}

async fn secure<S>(
    stream: S,
    host: &str,
    config: Arc<ClientConfig>,
) -> Result<TlsStream<S>, TunnelError>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let wrong = |_| TunnelError::Target(host.to_owned());
    let name = ServerName::try_from(host.to_owned()).map_err(wrong)?;
    TlsConnector::from(config).connect(name, stream).await.map_err(TunnelError::Tls)
}

/// Proxies have certificates of the CAs that this host trusts, unlike everything else Skein connects to.
fn platform_config() -> Option<Arc<ClientConfig>> {
    static CONFIG: OnceLock<Option<Arc<ClientConfig>>> = OnceLock::new();
    let make = || {
        let mut roots = RootCertStore::empty();
        // Some that cannot be read do not make the others useless.
        let (added, _) =
            roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
        (added > 0).then(|| trusting(roots))
    };
    CONFIG.get_or_init(make).clone()
}

fn trusting(roots: RootCertStore) -> Arc<ClientConfig> {
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let config = ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(rustls::DEFAULT_VERSIONS)
        .expect("invariant: the provider has suites of the default versions")
        .with_root_certificates(roots)
        .with_no_client_auth();
    Arc::new(config)
}

impl<S: AsyncRead + AsyncWrite + Unpin> AsyncRead for Tunnel<S> {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Plain(stream) => Pin::new(stream).poll_read(cx, buf),
            Self::Tls(stream) => Pin::new(stream).poll_read(cx, buf),
        }
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> AsyncWrite for Tunnel<S> {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Self::Plain(stream) => Pin::new(stream).poll_write(cx, buf),
            Self::Tls(stream) => Pin::new(stream).poll_write(cx, buf),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Plain(stream) => Pin::new(stream).poll_flush(cx),
            Self::Tls(stream) => Pin::new(stream).poll_flush(cx),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Plain(stream) => Pin::new(stream).poll_shutdown(cx),
            Self::Tls(stream) => Pin::new(stream).poll_shutdown(cx),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Bypass, Url};
    use std::path::PathBuf;
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, DuplexStream, duplex};

    fn proxy(credentials_file: Option<PathBuf>) -> Proxy {
        let url = "http://proxy:3128".parse::<Url>().unwrap();
        Proxy { url, bypass: Bypass::default(), credentials_file }
    }

    /// What becomes of a tunnel when the proxy answers like this, and then ends or says nothing more; and the request it saw.
    async fn answered(
        proxy: &Proxy,
        target: &str,
        answer: &[u8],
        ends: bool,
    ) -> (Result<Tunnel<DuplexStream>, TunnelError>, String, DuplexStream) {
        let (near, mut far) = duplex(64 << 10);
        let server = async {
            let mut request = Vec::new();
            while !request.ends_with(b"\r\n\r\n") {
                match far.read_u8().await {
                    Ok(byte) => request.push(byte),
                    Err(_) => break,
                }
            }
            // Whoever is refused before does not read it.
            let _ = far.write_all(answer).await;
            if ends {
                far.shutdown().await.unwrap();
            }
            (String::from_utf8(request).unwrap(), far)
        };
        let (outcome, (request, far)) = tokio::join!(proxy.tunnel(near, target), server);
        (outcome, request, far)
    }

    #[tokio::test]
    async fn a_tunnel_passes_bytes_on_and_brackets_addresses() {
        let ok = b"HTTP/1.1 200 Connection established\r\nVia: x\r\n\r\n";
        for target in ["hub.example:7443", "[2001:db8::1]:7443", "192.0.2.1:443"] {
            let (tunnel, request, mut far) = answered(&proxy(None), target, ok, false).await;
            let head = format!("CONNECT {target} HTTP/1.1\r\nhost: {target}\r\n\r\n");
            assert_eq!(request, head);
            let mut tunnel = tunnel.unwrap();
            tunnel.write_all(b"hello").await.unwrap();
            let mut bytes = [0; 5];
            far.read_exact(&mut bytes).await.unwrap();
            far.write_all(b"world").await.unwrap();
            tunnel.read_exact(&mut bytes).await.unwrap();
            assert_eq!(&bytes, b"world");
        }
        for target in ["hub.example", "a b:1", "hub.example:7443/x", "2001:db8::1:7443", "u@h:1"] {
            let outcome = proxy(None).tunnel(duplex(64).0, target).await;
            assert!(matches!(outcome, Err(TunnelError::Target(_))), "{target}: {outcome:?}");
        }
    }

    #[tokio::test]
    async fn answers_are_told_apart() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("credentials");
        std::fs::write(&file, "user:secret\n").unwrap();
        use std::os::unix::fs::PermissionsExt as _;
        std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o600)).unwrap();
        let long = [b"HTTP/1.1 200 OK\r\nX: ".as_slice(), &[b'x'; 20_000]].concat();
        let cases: [(&[u8], &str); 9] = [
            (
                b"HTTP/1.1 407 Proxy Authentication Required\r\nContent-Length: 0\r\n\r\n",
                "wants credentials",
            ),
            (b"HTTP/1.1 403 Forbidden\r\n\r\n", "does not allow"),
            (
                b"HTTP/1.0 502 Bad Gateway\r\nContent-Type: text/html\r\n\r\n<html>",
                "cannot reach hub:1: 502",
            ),
            (b"HTTP/1.1 400 Bad Request\r\n\r\n", "400 Bad Request"),
            (b"<html><body>Welcome to our web site</body></html>\r\n\r\n", "does not speak HTTP"),
            (b"SSH-2.0-OpenSSH_9.2\r\n", "does not speak HTTP"),
            (b"", "without an answer"),
            (b"HTTP/1.1 200 OK\r\n\r\nHTTP/1.1 surprise", "in the place of hub:1"),
            (&long, "does not speak HTTP"),
        ];
        for (answer, expected) in cases {
            let (outcome, request, _far) = answered(&proxy(None), "hub:1", answer, true).await;
            let error = outcome.unwrap_err().to_string();
            assert!(error.contains(expected), "{error}, not {expected}");
            assert!(!request.contains("uthorization"));
        }
        let (outcome, request, _far) =
            answered(&proxy(Some(file)), "hub:1", cases[0].0, true).await;
        assert!(matches!(outcome, Err(TunnelError::WrongCredentials)), "{outcome:?}");
        assert!(request.contains("proxy-authorization: Basic dXNlcjpzZWNyZXQ=\r\n"), "{request}");
    }

    #[tokio::test]
    async fn a_proxy_behind_tls_must_be_who_it_is_called() {
        let certified = rcgen::generate_simple_self_signed(vec!["proxy.example".into()]).unwrap();
        let key = rustls_pki_types::PrivatePkcs8KeyDer::from(certified.signing_key.serialize_der());
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let server = rustls::ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(vec![certified.cert.der().clone()], key.into())
            .unwrap();
        let server = tokio_rustls::TlsAcceptor::from(Arc::new(server));
        let mut roots = RootCertStore::empty();
        roots.add(certified.cert.der().clone()).unwrap();
        let ours = trusting(roots);
        for (name, config, expected) in [
            ("proxy.example", Some(Arc::clone(&ours)), true),
            ("other.example", Some(ours), false),
            ("proxy.example", platform_config(), false),
        ] {
            // A host without any certificates trusts nobody either.
            let Some(config) = config else { continue };
            let (near, far) = duplex(16 << 10);
            let (secured, accepted) = tokio::join!(secure(near, name, config), server.accept(far));
            assert_eq!(secured.is_ok(), expected, "{name}: {secured:?}");
            let (Ok(secured), Ok(mut accepted)) = (secured, accepted) else { continue };
            let answer = async {
                let mut request = [0; 7];
                accepted.read_exact(&mut request).await.unwrap();
                accepted.write_all(b"HTTP/1.1 200 OK\r\n\r\n").await.unwrap();
                accepted.flush().await.unwrap();
                (request, accepted)
            };
            let request = request("hub:1", None).unwrap();
            let stream = Tunnel::Tls(Box::new(secured));
            let (tunnel, (seen, _accepted)) = tokio::join!(ask(stream, request, "hub:1"), answer);
            assert!(tunnel.is_ok() && &seen == b"CONNECT", "{tunnel:?}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_byte_a_second_is_too_slow() {
        let (near, mut far) = duplex(1_024);
        let drip = async {
            for byte in b"HTTP/1.1 200 Connection established".iter().cycle() {
                far.write_u8(*byte).await?;
                time::sleep(Duration::from_secs(1)).await;
            }
            io::Result::Ok(())
        };
        let proxy = proxy(None);
        tokio::select! {
            biased;
            outcome = proxy.tunnel(near, "hub:1") => {
                assert!(matches!(outcome, Err(TunnelError::Timeout)), "{outcome:?}");
            }
            at = drip => panic!("it gave up first: {at:?}"),
        }
    }
}
