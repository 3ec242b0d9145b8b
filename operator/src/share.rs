//! A share: from its spec and the observed exports to new exports, status and Events, one step a file. Steps 1 to 7 are
//! pure, and their types prove that they ran; [`apply`] writes.
//!
//! ```text
//! observe ─> desired ─> placement ─> rollout ─> exports ─> (apply) ─> status ─> (apply) ─> events
//!                          └───────> deletion ──────────────────────────┘
//! ```

mod apply;
mod deletion;
mod desired;
mod events;
mod exports;
mod health;
mod observe;
mod placement;
mod rollout;
mod status;
#[cfg(test)]
mod tests;

use std::sync::Arc;
use std::time::{Duration, Instant};

use kube::runtime::controller::Action;
use kube::runtime::events::Recorder;
use kube::{Resource, ResourceExt};
use virtiofs_crds::VirtiofsShare;
use virtiofs_crds::v1alpha1::VirtiofsShareStatus;

use self::deletion::{Deletion, deletion};
use self::desired::{Desired, desired};
use self::observe::{Observed, Written, observe};
use self::placement::placement;
use self::rollout::{Rollout, rollout};
use crate::backoff::Backoff;
use crate::cluster::{Cluster, Recent};
use crate::error::{Chain, StepError};
use crate::metrics::Metrics;
use crate::throttle::Throttle;
use crate::writer::Writer;

pub(crate) use self::apply::identity;
pub(crate) use self::deletion::FINALIZER;
pub(crate) use self::exports::foreign_finalizers_removed;
pub(crate) use self::health::is_ready;
pub(crate) use self::observe::is_own;

/// Shortest time between two reconciles of a share. Changes of its exports in between are seen by the next.
const INTERVAL: Duration = Duration::from_millis(500);
/// What each of its nodes adds. The more nodes, the longer until all have reported, and the more often the status would
/// be written until then.
const INTERVAL_PER_NODE: Duration = Duration::from_millis(5);
/// When a share is reconciled again whose last writes a watch should have confirmed by then.
const CONFIRM: Duration = Duration::from_secs(6);

/// What all reconciles of shares share.
pub(crate) struct Context {
    /// The watched objects.
    pub(crate) cluster: Arc<Cluster>,
    /// Writes to the API server.
    pub(crate) writer: Writer,
    /// Publishes Events.
    pub(crate) recorder: Recorder,
    /// The metrics.
    pub(crate) metrics: Arc<Metrics>,
    /// How often one share is reconciled.
    pub(crate) throttle: Throttle,
    /// When a failed reconcile is repeated.
    pub(crate) backoff: Backoff,
    /// Shares that were written recently.
    pub(crate) shares_written: Recent<String, Arc<VirtiofsShare>>,
    /// Exports that were written recently.
    pub(crate) exports_written: Recent<String, Written>,
}

/// Reconciles a share.
pub(crate) async fn reconcile(object: Arc<VirtiofsShare>, context: Arc<Context>) -> Result<Action, StepError> {
    if let Err(wait) = context.throttle.admit(&object.name_any(), interval(&object), Instant::now()) {
        return Ok(Action::requeue(wait));
    }
    context.metrics.retain_shares(|name| context.cluster.shares.find(|share| share.name_any() == name).is_some());
    let observed = observe(&context, object);
    let result = run(&context, &observed).await;
    let outcome = if result.is_ok() { "done" } else { "failed" };
    context.metrics.reconciles.with_label_values(&["VirtiofsShare", outcome]).inc();
    if result.is_ok() {
        context.backoff.succeeded(&observed.object.name_any());
    }
    match result {
        Err(error) if error.is_gone() => {
            tracing::debug!(share = %observed.object.name_any(), error = %Chain(&error), "an object changed meanwhile");
            Ok(Action::requeue(INTERVAL))
        }
        Err(error) => Err(error),
        Ok(wrote) if wrote || observed.unconfirmed => Ok(Action::requeue(CONFIRM)),
        Ok(_) => Ok(Action::await_change()),
    }
}

/// Shortest time until the next reconcile of a share.
fn interval(object: &VirtiofsShare) -> Duration {
    let nodes = object.status.as_ref().and_then(|status| status.nodes.as_ref()).map_or(0, |nodes| nodes.selected);
    INTERVAL + INTERVAL_PER_NODE * u32::try_from(nodes).unwrap_or(0)
}

/// Schedules the next reconcile after a failed one.
pub(crate) fn retry(object: Arc<VirtiofsShare>, error: &StepError, context: Arc<Context>) -> Action {
    let wait = context.backoff.failed(&object.name_any(), Instant::now(), rand::random());
    tracing::warn!(share = %object.name_any(), error = %Chain(error), ?wait, "reconcile of a share failed; it is repeated");
    Action::requeue(wait)
}

/// One reconcile. Returns true if anything was written.
async fn run(context: &Context, observed: &Observed) -> Result<bool, StepError> {
    let object = &observed.object;
    let is_deleted = object.metadata.deletion_timestamp.is_some();
    let desired = match desired(object) {
        Ok(desired) => desired,
        // Its nodes keep what they serve, unless the share is being deleted.
        Err(refusals) if !is_deleted => {
            return write_status(context, observed, &status::rejected(object, &refusals, &observed.now)).await;
        }
        Err(_) => return delete(context, observed, None).await,
    };
    if is_deleted {
        return delete(context, observed, Some(&desired)).await;
    }
    apply::add_finalizer(context, object).await?;
    let placement = placement(Some(&desired), &observed.nodes, observed.exports.clone());
    let rollout = rollout(&desired, &placement.members);
    let changes = exports::changes(Some(&desired), &placement, &rollout, &observed.now);
    // The status first: an operator that dies after it has left a record of what is changing.
    let status = status::status(object, &desired, &placement, &rollout, &Deletion::NotRequested, &observed.now);
    let wrote = write_status(context, observed, &status).await?;
    let corrections = exports::corrections(object, &placement);
    apply::corrections(context, &corrections).await?;
    apply::exports(context, object, &changes).await?;
    Ok(wrote || changes.len() + corrections.len() > 0)
}

/// Drains the exports of a share that is being deleted, and removes the finalizer when no VM uses it any more.
async fn delete(context: &Context, observed: &Observed, desired: Option<&Desired>) -> Result<bool, StepError> {
    let object = &observed.object;
    let placement = placement(None, &observed.nodes, observed.exports.clone());
    let changes = exports::changes(None, &placement, &Rollout::default(), &observed.now);
    let deletion = deletion(object, &placement);
    if deletion == Deletion::Done {
        apply::remove_finalizer(context, object).await?;
        return Ok(true);
    }
    if let Some(desired) = desired {
        let status = status::status(object, desired, &placement, &Rollout::default(), &deletion, &observed.now);
        write_status(context, observed, &status).await?;
    }
    apply::corrections(context, &exports::corrections(object, &placement)).await?;
    apply::exports(context, object, &changes).await?;
    Ok(true)
}

/// Writes a status that differs, and publishes its Events. Returns true if it differed.
async fn write_status(context: &Context, observed: &Observed, status: &VirtiofsShareStatus) -> Result<bool, StepError> {
    let object = &observed.object;
    context.metrics.share(&object.name_any(), status);
    if object.status.as_ref() == Some(status) {
        return Ok(false);
    }
    apply::status(context, object, status).await?;
    for event in events::events(object.status.as_ref(), status) {
        let note = event.note.as_deref().unwrap_or_default();
        tracing::info!(share = %object.name_any(), reason = event.reason, note, "share changed");
        if let Err(error) = context.recorder.publish(&event, &object.object_ref(&())).await {
            tracing::warn!(share = %object.name_any(), error = %Chain(&error), "cannot publish an Event");
        }
    }
    Ok(true)
}
