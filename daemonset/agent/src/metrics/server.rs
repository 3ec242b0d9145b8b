//! `/metrics`, `/healthz` and `/readyz`.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context;
use axum::Router;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::middleware::from_fn_with_state;
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use prometheus::{TEXT_FORMAT, TextEncoder};
use tokio::net::TcpListener;
use tokio::sync::{Mutex, watch};
use tokio::task::JoinHandle;
use virtiofs_client::metrics::families;
use virtiofs_http::authorization::require;
use virtiofs_http::{Certificate, Reviewer, serve};

use super::volumes;
use crate::broker::observer::Observer;
use crate::csi::RejectionCounts;
use crate::model::pass::Pass;

/// Clients within this time get the same page: the broker is not read for each of many.
const PAGE_VALID: Duration = Duration::from_millis(200);

/// Where an agent serves pages.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Addresses {
    /// All pages.
    pub(crate) metrics: Option<SocketAddr>,
    /// `/healthz` and `/readyz` alone.
    pub(crate) probes: Option<SocketAddr>,
}

/// Listeners at these addresses.
#[derive(Debug, Default)]
pub(crate) struct Listeners {
    metrics: Option<TcpListener>,
    probes: Option<TcpListener>,
}

impl Addresses {
    /// Where the pages of a standby agent are served.
    pub(crate) fn of_probes(self) -> Option<SocketAddr> {
        self.probes.or(self.metrics)
    }

    /// Binds the addresses.
    ///
    /// # Errors
    /// One is in use, for example by another agent.
    pub(crate) async fn bind(self) -> anyhow::Result<Listeners> {
        Ok(Listeners { metrics: bind("metrics", self.metrics).await?, probes: bind("probes", self.probes).await? })
    }
}

async fn bind(what: &str, address: Option<SocketAddr>) -> anyhow::Result<Option<TcpListener>> {
    let Some(address) = address else { return Ok(None) };
    let bound = TcpListener::bind(address).await;
    bound.map(Some).with_context(|| format!("cannot serve {what} at {address}"))
}

/// How the port of metrics is protected.
#[derive(Default)]
pub(crate) struct Access {
    /// For TLS.
    pub(crate) certificate: Option<Certificate>,
    /// Reviews clients of `/metrics`.
    pub(crate) reviewer: Option<Reviewer>,
}

/// What the pages are made from.
pub(crate) struct Serving {
    observer: Arc<Observer>,
    passes: watch::Receiver<Pass>,
    rejections: RejectionCounts,
    page: Mutex<Option<(Instant, String)>>,
}

impl Serving {
    /// Pages of these shares and volumes; `observer` reads the broker's status, `rejections` counts rejected volume
    /// requests.
    pub(crate) fn new(observer: Arc<Observer>, passes: watch::Receiver<Pass>, rejections: RejectionCounts) -> Self {
        Serving { observer, passes, rejections, page: Mutex::default() }
    }
}

/// Serves the pages until the program ends.
pub(crate) fn start(listeners: Listeners, serving: Serving, access: Access) {
    let serving = Arc::new(serving);
    let probes =
        Router::new().route("/healthz", get(healthz)).route("/readyz", get(readyz)).with_state(serving.clone());
    let mut page = Router::new().route("/metrics", get(metrics)).with_state(serving);
    if let Some(reviewer) = access.reviewer {
        page = page.layer(from_fn_with_state(Arc::new(reviewer), require));
    }
    if let Some(listener) = listeners.metrics {
        tokio::spawn(serve(listener, page.merge(probes.clone()), access.certificate));
    }
    if let Some(listener) = listeners.probes {
        tokio::spawn(serve(listener, probes, None));
    }
}

/// The pages of an agent that stands by: alive, not ready.
pub(crate) struct Standby(JoinHandle<()>);

impl Standby {
    /// Serves at this address.
    ///
    /// # Errors
    /// The address is in use.
    pub(crate) fn serve_at(address: SocketAddr) -> std::io::Result<Self> {
        let listener = std::net::TcpListener::bind(address)?;
        listener.set_nonblocking(true)?;
        let listener = TcpListener::from_std(listener)?;
        let stands_by = || async { (StatusCode::SERVICE_UNAVAILABLE, "another agent runs here; this one stands by\n") };
        let router = Router::new().route("/healthz", get(|| async { "ok\n" })).route("/readyz", get(stands_by));
        Ok(Standby(tokio::spawn(serve(listener, router, None))))
    }

    /// Ends it and frees the address.
    pub(crate) async fn end(self) {
        self.0.abort();
        let _ = self.0.await;
    }
}

async fn metrics(State(serving): State<Arc<Serving>>) -> Response {
    let mut page = serving.page.lock().await;
    let valid = page.as_ref().filter(|(at, _)| at.elapsed() < PAGE_VALID);
    if let Some((_, text)) = valid {
        return text_response(text.clone());
    }
    match render(&serving).await {
        Ok(text) => {
            *page = Some((Instant::now(), text.clone()));
            text_response(text)
        }
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, error.to_string()).into_response(),
    }
}

fn text_response(text: String) -> Response {
    ([(header::CONTENT_TYPE, TEXT_FORMAT)], text).into_response()
}

async fn render(serving: &Serving) -> prometheus::Result<String> {
    let observation = serving.observer.observe().await;
    let (report, volumes) = {
        let pass = serving.passes.borrow();
        (pass.report.clone(), pass.volumes.clone())
    };
    let mut families = families(&report, observation.status.as_ref().ok(), &observation.totals);
    families.extend(volumes::families(&volumes, &serving.rejections));
    TextEncoder::new().encode_to_string(&families)
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
