//! Exports that the operator did not write. Agents do not serve them; they are deleted, so that they cannot be mistaken for
//! exports, and do not take the name of one. The admission policy of the chart rejects them when they are created.

use std::sync::Arc;
use std::time::Instant;

use kube::api::Api;
use kube::runtime::controller::Action;
use kube::{Resource, ResourceExt};
use serde_json::json;
use virtiofs_crds::export::controller_of;
use virtiofs_crds::{VirtiofsExport, VirtiofsShare};

use crate::backoff::Backoff;
use crate::cluster::Cluster;
use crate::error::{Chain, Step, StepError};
use crate::metrics::Metrics;
use crate::share::{foreign_finalizers_removed, is_own};
use crate::writer::Writer;

/// What all reconciles of exports share.
pub(crate) struct Context {
    /// The watched objects.
    pub(crate) cluster: Arc<Cluster>,
    /// Writes to the API server.
    pub(crate) writer: Writer,
    /// The metrics.
    pub(crate) metrics: Arc<Metrics>,
    /// When a failed reconcile is repeated.
    pub(crate) backoff: Backoff,
}

/// Deletes an export that the operator did not write. All others are reconciled with their share; the garbage collector
/// deletes those of a share that does not exist.
pub(crate) async fn reconcile(export: Arc<VirtiofsExport>, context: Arc<Context>) -> Result<Action, StepError> {
    if controller_of(&export).is_ok() && export.metadata.deletion_timestamp.is_none() {
        return Ok(Action::await_change());
    }
    let share = context.cluster.shares.find(|share| share.name_any() == export.spec.share_name);
    if share.is_some_and(|share| is_own(&export, share.meta())) {
        return Ok(Action::await_change());
    }
    let result = delete(&context, &export).await;
    let outcome = if result.is_ok() { "done" } else { "failed" };
    context.metrics.reconciles.with_label_values(&["VirtiofsExport", outcome]).inc();
    match result {
        Err(error) if !error.is_gone() => Err(error),
        _ => {
            context.backoff.succeeded(&export.name_any());
            Ok(Action::await_change())
        }
    }
}

async fn delete(context: &Context, export: &VirtiofsExport) -> Result<(), StepError> {
    let (name, share) = (export.name_any(), &export.spec.share_name);
    // The watch may not have returned the share yet.
    let shares = Api::<VirtiofsShare>::all(context.writer.client.clone());
    let found = shares.get_metadata_opt(share).await.step(|| format!("read share {share}"))?;
    if found.is_some_and(|share| is_own(export, &share.metadata)) {
        return Ok(());
    }
    if export.metadata.deletion_timestamp.is_none() {
        tracing::warn!(
            export = name,
            share,
            node = export.spec.node_name,
            "export was not written by the operator; deleted"
        );
        return context.writer.delete(export).await.step(|| format!("delete export {name}"));
    }
    let finalizers = foreign_finalizers_removed(&export.metadata);
    if export.finalizers() == finalizers {
        return Ok(());
    }
    let patch = json!({"metadata": {"uid": export.uid(), "finalizers": finalizers}});
    let written = context.writer.merge::<VirtiofsExport>(&name, &patch).await;
    written.map(drop).step(|| format!("remove the finalizers of export {name}"))
}

/// Schedules the next reconcile after a failed one.
pub(crate) fn retry(export: Arc<VirtiofsExport>, error: &StepError, context: Arc<Context>) -> Action {
    let name = export.name_any();
    let wait = context.backoff.failed(&name, Instant::now(), rand::random());
    tracing::warn!(export = name, error = %Chain(error), ?wait, "reconcile of an export failed; it is repeated");
    Action::requeue(wait)
}
