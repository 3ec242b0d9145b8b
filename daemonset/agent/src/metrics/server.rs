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

use super::families::families;
use super::volumes;
use crate::broker::observer::Observer;
use crate::csi::RefusalCounts;
use crate::reconcile::Turn;

/// What the pages are made from.
pub(crate) struct Serving {
    /// Asks the broker at each scrape.
    pub(crate) observer: Arc<Observer>,
    /// How the shares are doing.
    pub(crate) turns: watch::Receiver<Turn>,
    /// How often pods were refused a volume.
    pub(crate) refusals: RefusalCounts,
}

/// Takes the address; a second agent's address clash is an error at once, not a log line.
pub(crate) async fn bind(address: SocketAddr) -> anyhow::Result<TcpListener> {
    TcpListener::bind(address).await.with_context(|| format!("cannot serve metrics at {address}"))
}

/// Answers for as long as the program runs.
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

/// What answers for an agent that stands by: it is alive, and not ready.
pub(crate) struct Standby(JoinHandle<()>);

impl Standby {
    /// Answers at this address.
    ///
    /// # Errors
    /// It is somebody else's.
    pub(crate) fn answer_at(address: SocketAddr) -> io::Result<Self> {
        let listener = std::net::TcpListener::bind(address)?;
        listener.set_nonblocking(true)?;
        let listener = TcpListener::from_std(listener)?;
        let stands_by =
            || async { (StatusCode::SERVICE_UNAVAILABLE, "another agent works here; this one stands by\n") };
        let router = Router::new().route("/healthz", get(|| async { "ok\n" })).route("/readyz", get(stands_by));
        Ok(Standby(tokio::spawn(async move {
            if let Err(error) = axum::serve(listener, router).await {
                tracing::warn!(%error, "nobody answers while this agent stands by");
            }
        })))
    }

    /// Ends it; the address is free then.
    pub(crate) async fn end(self) {
        self.0.abort();
        let _ = self.0.await;
    }
}

async fn metrics(State(serving): State<Arc<Serving>>) -> Response {
    let observation = serving.observer.observe().await;
    let (report, volumes) = {
        let turn = serving.turns.borrow();
        (turn.report.clone(), turn.volumes.clone())
    };
    let mut families = families(&report, &observation);
    families.extend(volumes::families(&volumes, &serving.refusals));
    match TextEncoder::new().encode_to_string(&families) {
        Ok(text) => ([(header::CONTENT_TYPE, TEXT_FORMAT)], text).into_response(),
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, error.to_string()).into_response(),
    }
}

/// Alive: the loop turns.
async fn healthz(State(serving): State<Arc<Serving>>) -> (StatusCode, &'static str) {
    match serving.turns.borrow().is_fresh(Instant::now()) {
        true => (StatusCode::OK, "ok\n"),
        false => (StatusCode::SERVICE_UNAVAILABLE, "the agent's loop hangs\n"),
    }
}

/// Ready: the broker answers, and the declarations have been read. Whether each share is served, or its source even
/// looked at yet, is for its own metric to say: one bad share must not take the others' agent out of service.
async fn readyz(State(serving): State<Arc<Serving>>) -> (StatusCode, &'static str) {
    let turn = serving.turns.borrow();
    match (turn.at, turn.report.broker) {
        (None, _) => (StatusCode::SERVICE_UNAVAILABLE, "shares have not been looked at yet\n"),
        (Some(_), false) => (StatusCode::SERVICE_UNAVAILABLE, "the broker does not answer\n"),
        (Some(_), true) => (StatusCode::OK, "ok\n"),
    }
}
