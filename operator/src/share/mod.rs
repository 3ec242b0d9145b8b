//! A share: from what is declared and observed to exports, status and Events, one step a file. Steps 1 to 7 are pure
//! and hand on types that say that they were taken; [`apply`] acts.
//!
//! ```text
//! observe ─> declare ─> place ─> rollout ─> exports ─> (apply) ─> status ─> (apply) ─> events
//!                          └───> deletion ──────────────────────────┘
//! ```

mod apply;
mod declare;
mod deletion;
mod events;
mod exports;
mod health;
mod observe;
mod place;
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

use self::declare::{Declared, declare};
use self::deletion::{Stay, stay};
use self::observe::{Observed, Written, observe};
use self::place::place;
use self::rollout::{Rollout, rollout};
use crate::cluster::{Cluster, Recent};
use crate::metrics::Metrics;
use crate::pace::Pace;
use crate::retries::Retries;
use crate::writer::{Writer, is_gone};

pub(crate) use self::apply::identity;
pub(crate) use self::deletion::FINALIZER;
pub(crate) use self::health::is_ready;

/// How long a share rests between two looks. What happens to its exports meanwhile is seen by the next.
const REST: Duration = Duration::from_millis(500);
/// How much longer for each of its nodes. The more there are, the longer it takes until all have answered, and the
/// more often its status would be written meanwhile.
const REST_FOR_A_NODE: Duration = Duration::from_millis(5);
/// When something is looked at again that a watch should have confirmed.
const CONFIRM: Duration = Duration::from_secs(6);

/// What looks at shares share.
pub(crate) struct Context {
    /// What is reflected.
    pub(crate) cluster: Arc<Cluster>,
    /// What changes something.
    pub(crate) writer: Writer,
    /// What publishes Events.
    pub(crate) recorder: Recorder,
    /// What counts.
    pub(crate) metrics: Arc<Metrics>,
    /// How often one share is looked at.
    pub(crate) pace: Pace,
    /// When those are looked at again with which that failed.
    pub(crate) retries: Retries,
    /// Shares written a moment ago.
    pub(crate) shares_written: Recent<String, Arc<VirtiofsShare>>,
    /// Exports written a moment ago.
    pub(crate) exports_written: Recent<String, Written>,
}

/// Looks at a share, and does what is to be done.
pub(crate) async fn reconcile(object: Arc<VirtiofsShare>, context: Arc<Context>) -> kube::Result<Action> {
    if let Err(wait) = context.pace.take(&object.name_any(), rest(&object), Instant::now()) {
        return Ok(Action::requeue(wait));
    }
    context.metrics.keep_shares(|name| context.cluster.shares.find(|share| share.name_any() == name).is_some());
    let observed = observe(&context, object);
    let result = look(&context, &observed).await;
    let outcome = if result.is_ok() { "done" } else { "failed" };
    context.metrics.reconciles.with_label_values(&["VirtiofsShare", outcome]).inc();
    if result.is_ok() {
        context.retries.went_well(&observed.object.name_any());
    }
    match result {
        Err(error) if is_gone(&error) => {
            tracing::debug!(share = %observed.object.name_any(), %error, "changed meanwhile");
            Ok(Action::requeue(REST))
        }
        Err(error) => Err(error),
        Ok(wrote) if wrote || observed.ahead => Ok(Action::requeue(CONFIRM)),
        Ok(_) => Ok(Action::await_change()),
    }
}

/// How long a share rests after a look.
fn rest(object: &VirtiofsShare) -> Duration {
    let nodes = object.status.as_ref().and_then(|status| status.nodes.as_ref()).map_or(0, |nodes| nodes.selected);
    REST + REST_FOR_A_NODE * u32::try_from(nodes).unwrap_or(0)
}

/// What to do after a look that failed.
pub(crate) fn retry(object: Arc<VirtiofsShare>, error: &kube::Error, context: Arc<Context>) -> Action {
    let wait = context.retries.failed(&object.name_any(), Instant::now(), rand::random());
    tracing::warn!(share = %object.name_any(), %error, ?wait, "cannot be brought to its nodes; trying again");
    Action::requeue(wait)
}

/// One look. Was anything written?
async fn look(context: &Context, observed: &Observed) -> kube::Result<bool> {
    let object = &observed.object;
    let leaving = object.metadata.deletion_timestamp.is_some();
    let declared = match declare(object) {
        Ok(declared) => declared,
        // Its nodes go on with what they have, unless it is to go.
        Err(refusals) if !leaving => {
            return tell(context, observed, &status::refused(object, &refusals, &observed.now)).await;
        }
        Err(_) => return leave(context, observed, None).await,
    };
    if leaving {
        return leave(context, observed, Some(&declared)).await;
    }
    apply::protect(context, object).await?;
    let placement = place(Some(&declared), &observed.nodes, observed.exports.clone());
    let rollout = rollout(&declared, &placement.members);
    let changes = exports::changes(Some(&declared), &placement, &rollout, &observed.now);
    // First it is said that nodes are changing, then they are: what breaks after that finds it written down.
    let status = status::status(object, &declared, &placement, &rollout, &Stay::Wanted, &observed.now);
    let told = tell(context, observed, &status).await?;
    apply::exports(context, object, &changes).await?;
    Ok(told || changes.len() > 0)
}

/// Winds a share up, and lets it go when nobody uses it any more.
async fn leave(context: &Context, observed: &Observed, declared: Option<&Declared>) -> kube::Result<bool> {
    let object = &observed.object;
    let placement = place(None, &observed.nodes, observed.exports.clone());
    let changes = exports::changes(None, &placement, &Rollout::default(), &observed.now);
    let stay = stay(object, &placement);
    if stay == Stay::MayGo {
        apply::let_go(context, object).await?;
        return Ok(true);
    }
    if let Some(declared) = declared {
        let status = status::status(object, declared, &placement, &Rollout::default(), &stay, &observed.now);
        tell(context, observed, &status).await?;
    }
    apply::exports(context, object, &changes).await?;
    Ok(true)
}

/// Writes a status that says something new, and the Events that it is worth. Was it new?
async fn tell(context: &Context, observed: &Observed, status: &VirtiofsShareStatus) -> kube::Result<bool> {
    let object = &observed.object;
    context.metrics.share(&object.name_any(), status);
    if object.status.as_ref() == Some(status) {
        return Ok(false);
    }
    apply::report(context, object, status).await?;
    for event in events::events(object.status.as_ref(), status) {
        let note = event.note.as_deref().unwrap_or_default();
        tracing::info!(share = %object.name_any(), reason = event.reason, note, "share");
        if let Err(error) = context.recorder.publish(&event, &object.object_ref(&())).await {
            tracing::warn!(share = %object.name_any(), %error, "an Event could not be published");
        }
    }
    Ok(true)
}
