//! Serves `/metrics` and `/healthz` over plain HTTP on loopback.

use super::Page;
use crate::net::TcpListener;
use bytes::Bytes;
use http::{Method, Request, Response, StatusCode, header::CONTENT_TYPE};
use http_body_util::Full;
use hyper::{body::Incoming, server::conn::http1, service::service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use std::{convert::Infallible, sync::Arc, time::Duration};
use tokio::{task::JoinSet, time};
use tokio_util::sync::CancellationToken;

/// Scrapers and people with a browser; more connections at once wait.
const CONNECTIONS_MAX: usize = 16;
/// A scraper sends its request at once.
const HEADER_TIMEOUT: Duration = Duration::from_secs(5);
/// Pause after a failed accept, so that running out of file descriptors does not become a busy loop.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
const OPEN_METRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// Answers until cancelled.
///
/// # Cancel safety
/// Dropping it closes the listener and every connection.
pub(crate) async fn serve(listener: TcpListener, page: Arc<Page>, cancel: CancellationToken) {
    let mut connections = JoinSet::new();
    loop {
        let has_room = connections.len() < CONNECTIONS_MAX;
        tokio::select! {
            () = cancel.cancelled() => return, // cancel-safe
            Some(_ended) = connections.join_next() => {} // cancel-safe
            accepted = listener.accept(), if has_room => match accepted { // cancel-safe
                Ok((stream, _)) => {
                    let page = Arc::clone(&page);
                    let answer = service_fn(move |request| answer(request, Arc::clone(&page)));
                    let connection = http1::Builder::new()
                        .timer(TokioTimer::new())
                        .header_read_timeout(HEADER_TIMEOUT)
                        .serve_connection(TokioIo::new(stream), answer);
                    connections.spawn(async move {
                        if let Err(error) = connection.await {
                            tracing::debug!(%error, "metrics connection failed");
                        }
                    });
                }
                Err(error) => {
                    tracing::debug!(%error, "metrics connection not accepted");
                    time::sleep(ACCEPT_PAUSE).await;
                }
            },
        }
    }
}

#[allow(clippy::unused_async, reason = "hyper wants a future")]
async fn answer(
    request: Request<Incoming>,
    page: Arc<Page>,
) -> Result<Response<Full<Bytes>>, Infallible> {
    let (status, kind, body) = match (request.method(), request.uri().path()) {
        (&Method::GET | &Method::HEAD, "/metrics") => match page.encode() {
            Ok(text) => (StatusCode::OK, OPEN_METRICS, text),
            Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, "text/plain", error.to_string()),
        },
        (&Method::GET | &Method::HEAD, "/healthz") => (StatusCode::OK, "text/plain", "ok\n".into()),
        _ => (StatusCode::NOT_FOUND, "text/plain", "see /metrics and /healthz\n".into()),
    };
    let mut response = Response::new(Full::new(Bytes::from(body)));
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, http::HeaderValue::from_static(kind));
    Ok(response)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::net;
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    #[tokio::test]
    async fn answers_what_it_knows_and_nothing_else() {
        let listener = net::tcp_listen("127.0.0.1:0".parse().unwrap()).unwrap();
        let address = listener.local_addr().unwrap();
        let page = Arc::new(Page::new(crate::data::tests::sources().await));
        let cancel = CancellationToken::new();
        let mut tasks = JoinSet::new();
        tasks.spawn(serve(listener, page, cancel.clone()));
        for (path, status, body) in [
            ("/metrics", "200", "skein_build_info{version="),
            ("/healthz", "200", "ok"),
            ("/", "404", "see /metrics"),
        ] {
            let mut stream = net::tcp_connect(address, None).await.unwrap();
            let request = format!("GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n");
            stream.write_all(request.as_bytes()).await.unwrap();
            let mut answer = String::new();
            stream.read_to_string(&mut answer).await.unwrap();
            assert!(answer.starts_with(&format!("HTTP/1.1 {status}")), "{path}: {answer}");
            assert!(answer.contains(body), "{path}: {answer}");
        }
        cancel.cancel();
        tasks.join_next().await.unwrap().unwrap();
    }
}
