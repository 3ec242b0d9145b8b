//! /metrics, /healthz and /readyz.

use std::net::SocketAddr;
use std::sync::Arc;

use anyhow::Context;
use axum::Router;
use axum::http::{StatusCode, header};
use axum::middleware::from_fn_with_state;
use axum::response::IntoResponse;
use axum::routing::get;
use kube::Client;
use tokio::net::TcpListener;
use tokio::task::JoinSet;
use virtiofs_http::authorization::require;
use virtiofs_http::serve;

use crate::args::Arguments;
use crate::metrics::Metrics;

/// Serves the pages at the addresses of the command line, until the program ends.
///
/// # Errors
/// An address is in use, or the certificate cannot be used.
pub(crate) async fn start(
    arguments: &Arguments,
    client: &Client,
    metrics: &Arc<Metrics>,
    tasks: &mut JoinSet<()>,
) -> anyhow::Result<()> {
    let (page, ready) = (metrics.clone(), metrics.clone());
    let probes = Router::new()
        .route("/healthz", get(|| async { "alive\n" }))
        .route("/readyz", get(move || readiness(ready.clone())));
    let mut pages = Router::new().route("/metrics", get(move || metrics_page(page.clone())));
    if let Some(reviewer) = arguments.access.reviewer(client) {
        pages = pages.layer(from_fn_with_state(Arc::new(reviewer), require));
    }
    let certificate = arguments.access.certificate().context("--metrics-tls-cert, --metrics-tls-key")?;
    if let Some(address) = arguments.metrics {
        tasks.spawn(serve(bind("metrics", address).await?, pages.merge(probes.clone()), certificate));
    }
    if let Some(address) = arguments.probes {
        tasks.spawn(serve(bind("probes", address).await?, probes, None));
    }
    Ok(())
}

async fn bind(what: &str, address: SocketAddr) -> anyhow::Result<TcpListener> {
    TcpListener::bind(address).await.with_context(|| format!("cannot listen at --{what} {address}"))
}

async fn metrics_page(metrics: Arc<Metrics>) -> impl IntoResponse {
    match metrics.text() {
        Ok(text) => (StatusCode::OK, [(header::CONTENT_TYPE, "text/plain; version=0.0.4")], text),
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, [(header::CONTENT_TYPE, "text/plain")], error.to_string()),
    }
}

/// An operator that stands by is ready too.
async fn readiness(metrics: Arc<Metrics>) -> impl IntoResponse {
    match metrics.is_ready() {
        true => (StatusCode::OK, "ready\n"),
        false => (StatusCode::SERVICE_UNAVAILABLE, "the API server has not been reached yet\n"),
    }
}
