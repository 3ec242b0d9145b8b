//! `/metrics`, `/healthz` and `/readyz`.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Instant;

use anyhow::Context;
use axum::Router;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use prometheus::{TEXT_FORMAT, TextEncoder};
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use virtiofs_client::metrics::families;

use super::volumes;
use crate::broker::observer::Observer;
use crate::csi::RejectionCounts;
use crate::model::pass::Pass;

/// What the pages are made from.
pub(crate) struct Serving {
    /// Reads the broker's status at each scrape.
    pub(crate) observer: Arc<Observer>,
    /// State of shares and volumes.
    pub(crate) passes: watch::Receiver<Pass>,
    /// Rejected volume requests.
    pub(crate) rejections: RejectionCounts,
}

/// Binds the address.
///
/// # Errors
/// The address is in use, for example by another agent.
pub(crate) async fn bind(address: SocketAddr) -> anyhow::Result<TcpListener> {
    TcpListener::bind(address).await.with_context(|| format!("cannot serve metrics at {address}"))
}

/// Serves the pages until the program ends.
pub(crate) async fn serve(listener: TcpListener, serving: Serving) {
    let router = Router::new()
        .route("/metrics", get(metrics))
        .route("/healthz", get(healthz))
        .route("/readyz", get(readyz))
        .with_state(Arc::new(serving));
    if let Err(error) = axum::serve(listener, router).await {
        tracing::error!(%error, "metrics are no longer served");
    }
}

/// The pages of an agent that stands by: alive, not ready.
pub(crate) struct Standby(JoinHandle<()>);

impl Standby {
    /// Serves at this address.
    ///
    /// # Errors
    /// The address is in use.
    pub(crate) fn serve_at(address: SocketAddr) -> io::Result<Self> {
        let listener = std::net::TcpListener::bind(address)?;
        listener.set_nonblocking(true)?;
        let listener = TcpListener::from_std(listener)?;
        let stands_by = || async { (StatusCode::SERVICE_UNAVAILABLE, "another agent runs here; this one stands by\n") };
        let router = Router::new().route("/healthz", get(|| async { "ok\n" })).route("/readyz", get(stands_by));
        Ok(Standby(tokio::spawn(async move {
            if let Err(error) = axum::serve(listener, router).await {
                tracing::warn!(%error, "health pages of the standby agent are not served");
            }
        })))
    }

    /// Ends it and frees the address.
    pub(crate) async fn end(self) {
        self.0.abort();
        let _ = self.0.await;
    }
}

async fn metrics(State(serving): State<Arc<Serving>>) -> Response {
    let observation = serving.observer.observe().await;
    let (report, volumes) = {
        let pass = serving.passes.borrow();
        (pass.report.clone(), pass.volumes.clone())
    };
    let mut families = families(&report, observation.status.as_ref().ok(), &observation.totals);
    families.extend(volumes::families(&volumes, &serving.rejections));
    match TextEncoder::new().encode_to_string(&families) {
        Ok(text) => ([(header::CONTENT_TYPE, TEXT_FORMAT)], text).into_response(),
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, error.to_string()).into_response(),
    }
}

/// Alive: the reconcile loop runs.
async fn healthz(State(serving): State<Arc<Serving>>) -> (StatusCode, &'static str) {
    match serving.passes.borrow().is_fresh(Instant::now()) {
        true => (StatusCode::OK, "ok\n"),
        false => (StatusCode::SERVICE_UNAVAILABLE, "the reconcile loop hangs\n"),
    }
}

/// Ready: the broker answers and the declarations have been read. Each share has its own metrics: one share that is not
/// served must not make the agent unready.
async fn readyz(State(serving): State<Arc<Serving>>) -> (StatusCode, &'static str) {
    let pass = serving.passes.borrow();
    match (pass.at, pass.report.broker) {
        (None, _) => (StatusCode::SERVICE_UNAVAILABLE, "the first reconcile pass has not ended\n"),
        (Some(_), false) => (StatusCode::SERVICE_UNAVAILABLE, "the broker does not answer\n"),
        (Some(_), true) => (StatusCode::OK, "ok\n"),
    }
}
