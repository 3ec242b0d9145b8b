//! Step 8: does what the steps before have decided. Decides nothing.

use std::sync::Arc;
use std::time::Instant;

use futures::StreamExt;
use futures::future::{BoxFuture, FutureExt};
use futures::stream;
use kube::api::ObjectMeta;
use kube::{Resource, ResourceExt};
use serde_json::{Value, json};
use virtiofs_crds::export::export_name;
use virtiofs_crds::schema::{API_VERSION, KIND};
use virtiofs_crds::v1alpha1::VirtiofsShareStatus;
use virtiofs_crds::{VirtiofsExport, VirtiofsExportSpec, VirtiofsShare};

use super::Context;
use super::deletion::FINALIZER;
use super::exports::Changes;
use super::observe::Written;

/// The label of exports by which those of a share are found.
const SHARE_LABEL: &str = "virtiofs.dev/share";

/// How many exports of a share are written at a time.
const AT_A_TIME: usize = 16;

/// Makes sure that the share does not go before its exports have.
pub(crate) async fn protect(context: &Context, object: &VirtiofsShare) -> kube::Result<()> {
    if object.finalizers().iter().any(|it| it == FINALIZER) {
        return Ok(());
    }
    let mut protected = identity(object);
    protected["metadata"]["finalizers"] = json!([FINALIZER]);
    apply_share(context, object, protected).await
}

/// Lets the share go: applied without the finalizer, it loses the one that was applied before.
pub(crate) async fn let_go(context: &Context, object: &VirtiofsShare) -> kube::Result<()> {
    if !object.finalizers().iter().any(|it| it == FINALIZER) {
        return Ok(());
    }
    apply_share(context, object, identity(object)).await
}

async fn apply_share(context: &Context, object: &VirtiofsShare, applied: Value) -> kube::Result<()> {
    let written = context.writer.apply_value::<VirtiofsShare>(&object.name_any(), &applied).await?;
    context.shares_written.put(object.name_any(), Arc::new(written), Instant::now());
    Ok(())
}

/// Writes the status.
pub(crate) async fn report(
    context: &Context,
    object: &VirtiofsShare,
    status: &VirtiofsShareStatus,
) -> kube::Result<()> {
    let mut reported = identity(object);
    reported["status"] = json!(status);
    let written = context.writer.apply_status::<VirtiofsShare>(&object.name_any(), &reported).await?;
    context.shares_written.put(object.name_any(), Arc::new(written), Instant::now());
    Ok(())
}

/// Writes and deletes exports, several at a time, all of them even when some fail.
///
/// # Errors
/// The first failure.
pub(crate) async fn exports(context: &Context, object: &VirtiofsShare, changes: &Changes) -> kube::Result<()> {
    let create = changes.create.iter().map(|spec| write(context, object, None, spec));
    let update = changes.update.iter().map(|(export, spec)| write(context, object, Some(export), spec));
    let delete = changes.delete.iter().map(|export| delete(context, export));
    let all: Vec<BoxFuture<'_, kube::Result<()>>> = create.chain(update).chain(delete).collect();
    let results: Vec<_> = stream::iter(all).buffer_unordered(AT_A_TIME).collect().await;
    results.into_iter().collect()
}

fn write<'a>(
    context: &'a Context,
    object: &'a VirtiofsShare,
    current: Option<&'a Arc<VirtiofsExport>>,
    spec: &'a VirtiofsExportSpec,
) -> BoxFuture<'a, kube::Result<()>> {
    async move {
        let mut export = VirtiofsExport::new(&export_name(&spec.share_name, &spec.node_name), spec.clone());
        export.metadata = ObjectMeta {
            name: export.metadata.name.take(),
            uid: current.and_then(|current| current.uid()),
            labels: Some([(SHARE_LABEL.to_owned(), spec.share_name.clone())].into()),
            owner_references: object.controller_owner_ref(&()).map(|owner| vec![owner]),
            ..ObjectMeta::default()
        };
        let written = Arc::new(context.writer.apply(&export).await?);
        context.exports_written.put(written.name_any(), Written::Applied(written), Instant::now());
        Ok(())
    }
    .boxed()
}

fn delete<'a>(context: &'a Context, export: &'a Arc<VirtiofsExport>) -> BoxFuture<'a, kube::Result<()>> {
    async move {
        context.writer.delete(export.as_ref()).await?;
        context.exports_written.put(export.name_any(), Written::Deleted(export.clone()), Instant::now());
        Ok(())
    }
    .boxed()
}

/// What says which share is meant: this one, not one that has taken its name since.
pub(crate) fn identity(object: &VirtiofsShare) -> Value {
    json!({
        "apiVersion": API_VERSION,
        "kind": KIND,
        "metadata": {"name": object.name_any(), "uid": object.uid()},
    })
}
