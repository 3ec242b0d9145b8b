//! The loop of one port.
//!
//! # Guarantees
//! - At most 64 connections are open, of one address at most 8. A newcomer is admitted at the expense of another.
//! - A connection carries one request, ends after [`DEADLINE`], and after [`HEADERS_WITHIN`] without a whole request.
//! - A request is at most 16 KiB with 32 headers. A body is never read.

use std::convert::Infallible;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use axum::Router;
use axum::response::Response;
use hyper::Request;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};
use tokio::time::{sleep, timeout};
use tower_service::Service;

use crate::connections::Connections;
use crate::tls::Certificate;

/// Time within which a client must send its request.
pub const HEADERS_WITHIN: Duration = Duration::from_secs(5);
/// Time after which a connection ends, whatever is in progress.
pub const DEADLINE: Duration = Duration::from_secs(30);
/// Largest size of a request.
const REQUEST_MAX: usize = 16 << 10;
/// Largest number of headers of a request.
const HEADERS_MAX: usize = 32;
/// Pause after a failed accept, such as without a free descriptor.
const ACCEPT_AGAIN: Duration = Duration::from_millis(100);

/// Serves the pages of a router, over TLS if there is a certificate. Never ends.
pub async fn serve(listener: TcpListener, router: Router, certificate: Option<Certificate>) {
    let certificate = certificate.map(Arc::new);
    let mut connections = Connections::default();
    loop {
        let (stream, peer) = match listener.accept().await {
            Ok(accepted) => accepted,
            Err(error) => {
                tracing::debug!(%error, "connection not accepted");
                sleep(ACCEPT_AGAIN).await;
                continue;
            }
        };
        let requested = Arc::new(AtomicBool::new(false));
        let connection = connection(stream, router.clone(), certificate.clone(), requested.clone());
        let task = tokio::spawn(async move {
            // A client that is too slow or sends nonsense is no event.
            let _ = timeout(DEADLINE, connection).await;
        });
        connections.admit(peer.ip(), task.abort_handle(), requested);
    }
}

async fn connection(
    stream: TcpStream,
    router: Router,
    certificate: Option<Arc<Certificate>>,
    requested: Arc<AtomicBool>,
) {
    let Some(certificate) = certificate else { return answer(stream, router, requested).await };
    if let Ok(Ok(stream)) = timeout(HEADERS_WITHIN, certificate.acceptor().accept(stream)).await {
        answer(stream, router, requested).await;
    }
}

/// Answers one request.
async fn answer(stream: impl AsyncRead + AsyncWrite + Unpin, router: Router, requested: Arc<AtomicBool>) {
    let service = service_fn(move |request: Request<Incoming>| {
        requested.store(true, Ordering::Relaxed);
        let mut router = router.clone();
        async move {
            let response: Result<Response, Infallible> = router.call(request).await;
            response
        }
    });
    let mut server = http1::Builder::new();
    server.timer(TokioTimer::new()).header_read_timeout(HEADERS_WITHIN);
    server.keep_alive(false).max_buf_size(REQUEST_MAX).max_headers(HEADERS_MAX);
    let _ = server.serve_connection(TokioIo::new(stream), service).await;
}
