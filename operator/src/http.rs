//! /metrics, /healthz and /readyz.

use std::net::SocketAddr;
use std::sync::Arc;

use anyhow::Context;
use axum::Router;
use axum::http::{StatusCode, header};
use axum::response::IntoResponse;
use axum::routing::get;
use tokio::net::TcpListener;

use crate::metrics::Metrics;

/// Binds the address, so that a wrong one fails at start.
pub(crate) async fn bind(address: SocketAddr) -> anyhow::Result<TcpListener> {
    TcpListener::bind(address).await.with_context(|| format!("cannot listen at --metrics {address}"))
}

/// Serves until the program ends.
pub(crate) async fn serve(listener: TcpListener, metrics: Arc<Metrics>) {
    let ready = metrics.clone();
    let routes = Router::new()
        .route("/metrics", get(move || page(metrics.clone())))
        .route("/healthz", get(|| async { "alive\n" }))
        .route("/readyz", get(move || readiness(ready.clone())));
    if let Err(error) = axum::serve(listener, routes).await {
        tracing::error!(%error, "metrics are no longer served");
    }
}

async fn page(metrics: Arc<Metrics>) -> impl IntoResponse {
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
