//! Step 8: writes what the steps before have decided. Decides nothing.

use std::sync::Arc;
use std::time::Instant;

use futures::StreamExt;
use futures::future::{BoxFuture, FutureExt};
use futures::stream;
use kube::api::ObjectMeta;
use kube::{Resource, ResourceExt};
use serde_json::{Value, json};
use virtiofs_crds::export::{SHARE_LABEL, export_name};
use virtiofs_crds::schema::{API_VERSION, KIND};
use virtiofs_crds::v1alpha1::VirtiofsShareStatus;
use virtiofs_crds::{VirtiofsExport, VirtiofsExportSpec, VirtiofsShare};

use super::Context;
use super::deletion::FINALIZER;
use super::exports::Changes;
use super::observe::Written;
use crate::error::{Step, StepError};

/// Number of concurrent writes for one share.
const CONCURRENT: usize = 16;

/// Adds the finalizer, so that a share is not deleted before its exports.
pub(crate) async fn add_finalizer(context: &Context, object: &VirtiofsShare) -> Result<(), StepError> {
    if object.finalizers().iter().any(|it| it == FINALIZER) {
        return Ok(());
    }
    let mut protected = identity(object);
    protected["metadata"]["finalizers"] = json!([FINALIZER]);
    apply_share(context, object, protected).await.step(|| format!("add the finalizer to share {}", object.name_any()))
}

/// Removes the finalizer: an apply without it drops the one that was applied before.
pub(crate) async fn remove_finalizer(context: &Context, object: &VirtiofsShare) -> Result<(), StepError> {
    if !object.finalizers().iter().any(|it| it == FINALIZER) {
        return Ok(());
    }
    let removed = apply_share(context, object, identity(object)).await;
    removed.step(|| format!("remove the finalizer from share {}", object.name_any()))
}

async fn apply_share(context: &Context, object: &VirtiofsShare, applied: Value) -> kube::Result<()> {
    let written = context.writer.apply_value::<VirtiofsShare>(&object.name_any(), &applied).await?;
    context.shares_written.put(object.name_any(), Arc::new(written), Instant::now());
    Ok(())
}

/// Writes the status.
pub(crate) async fn status(
    context: &Context,
    object: &VirtiofsShare,
    status: &VirtiofsShareStatus,
) -> Result<(), StepError> {
    let name = object.name_any();
    let mut applied = identity(object);
    applied["status"] = json!(status);
    let written = context.writer.apply_status::<VirtiofsShare>(&name, &applied).await;
    let written = written.step(|| format!("write the status of share {name}"))?;
    context.shares_written.put(name, Arc::new(written), Instant::now());
    Ok(())
}

/// Writes and deletes exports concurrently, all of them even if some fail.
///
/// # Errors
/// The first failure.
pub(crate) async fn exports(context: &Context, object: &VirtiofsShare, changes: &Changes) -> Result<(), StepError> {
    let create = changes.create.iter().map(|spec| write(context, object, None, spec));
    let update = changes.update.iter().map(|(export, spec)| write(context, object, Some(export), spec));
    let delete = changes.delete.iter().map(|export| delete(context, export));
    let all: Vec<BoxFuture<'_, Result<(), StepError>>> = create.chain(update).chain(delete).collect();
    let results: Vec<_> = stream::iter(all).buffer_unordered(CONCURRENT).collect().await;
    results.into_iter().collect()
}

/// Reverts what others have changed in the metadata of exports.
///
/// # Errors
/// The first failure.
pub(crate) async fn corrections(context: &Context, all: &[(Arc<VirtiofsExport>, Value)]) -> Result<(), StepError> {
    for (export, patch) in all {
        let name = export.name_any();
        tracing::warn!(export = name, "metadata of an export was changed by another writer; it is reverted");
        let written = context.writer.merge::<VirtiofsExport>(&name, patch).await;
        let written = written.step(|| format!("correct the metadata of export {name}"))?;
        context.exports_written.put(name, Written::Applied(Arc::new(written)), Instant::now());
    }
    Ok(())
}

fn write<'a>(
    context: &'a Context,
    object: &'a VirtiofsShare,
    current: Option<&'a Arc<VirtiofsExport>>,
    spec: &'a VirtiofsExportSpec,
) -> BoxFuture<'a, Result<(), StepError>> {
    async move {
        let name = export_name(&spec.share_name, &spec.node_name);
        let mut export = VirtiofsExport::new(&name, spec.clone());
        export.metadata = ObjectMeta {
            name: export.metadata.name.take(),
            uid: current.and_then(|current| current.uid()),
            labels: Some([(SHARE_LABEL.to_owned(), spec.share_name.clone())].into()),
            owner_references: object.controller_owner_ref(&()).map(|owner| vec![owner]),
            ..ObjectMeta::default()
        };
        let written = context.writer.apply(&export).await.step(|| format!("apply export {name}"))?;
        context.exports_written.put(name, Written::Applied(Arc::new(written)), Instant::now());
        Ok(())
    }
    .boxed()
}

fn delete<'a>(context: &'a Context, export: &'a Arc<VirtiofsExport>) -> BoxFuture<'a, Result<(), StepError>> {
    async move {
        let name = export.name_any();
        context.writer.delete(export.as_ref()).await.step(|| format!("delete export {name}"))?;
        context.exports_written.put(name, Written::Deleted(export.clone()), Instant::now());
        Ok(())
    }
    .boxed()
}

/// Identifies this very share, and not one that has its name since.
pub(crate) fn identity(object: &VirtiofsShare) -> Value {
    json!({
        "apiVersion": API_VERSION,
        "kind": KIND,
        "metadata": {"name": object.name_any(), "uid": object.uid()},
    })
}
