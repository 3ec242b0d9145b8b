//! Health of an export, from its status.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use virtiofs_crds::v1alpha1::conditions::{DEGRADED, READY, REMEDY_FAILED};
use virtiofs_crds::v1alpha1::{Baseline, ExportMode, VirtiofsExport};

/// A regression within this time after a revision reached a node is attributed to the revision, in seconds.
pub(crate) const ATTRIBUTION: i64 = 600;

/// True if the export is served.
pub(crate) fn is_ready(export: &VirtiofsExport) -> bool {
    condition(export, READY).is_some_and(|condition| condition.status == "True")
}

/// True if the export's revision is active on its node.
pub(crate) fn is_current(export: &VirtiofsExport) -> bool {
    let observed = export.status.as_ref().and_then(|status| status.observed_revision.as_deref());
    observed == Some(export.spec.revision.as_str())
}

/// Number of sessions, as last reported.
pub(crate) fn sessions(export: &VirtiofsExport) -> i64 {
    export.status.as_ref().and_then(|status| status.sessions).unwrap_or(0)
}

/// True if the node has confirmed that it drains the export, and has no session left.
pub(crate) fn is_drained(export: &VirtiofsExport) -> bool {
    let observed = export.status.as_ref().and_then(|status| status.observed_generation);
    export.spec.mode == ExportMode::Drain
        && observed.is_some()
        && observed == export.metadata.generation
        && sessions(export) == 0
}

/// True if no agent has ever reported a status.
pub(crate) fn never_reported(export: &VirtiofsExport) -> bool {
    export.status.as_ref().is_none_or(|status| status.observed_generation.is_none())
}

/// How an export has regressed from its baseline.
pub(crate) fn regression(export: &VirtiofsExport, max_recoveries: i64) -> Option<String> {
    let before = export.spec.baseline.as_ref()?;
    if !is_current(export) {
        return None;
    }
    readiness_lost(export, before)
        .or_else(|| remedy_newly_failed(export, before))
        .or_else(|| too_many_recoveries(export, before, max_recoveries))
}

fn readiness_lost(export: &VirtiofsExport, before: &Baseline) -> Option<String> {
    let ready = condition(export, READY).filter(|it| it.status != "True")?;
    let attributed = before.ready && soon_after(&ready.last_transition_time, &before.time);
    attributed.then(|| format!("it no longer serves the share: {}", summary(ready)))
}

fn remedy_newly_failed(export: &VirtiofsExport, before: &Baseline) -> Option<String> {
    let degraded = condition(export, DEGRADED).filter(|_| !before.remedy_failed && remedy_failed(export))?;
    soon_after(&degraded.last_transition_time, &before.time).then(|| summary(degraded))
}

fn too_many_recoveries(export: &VirtiofsExport, before: &Baseline, max: i64) -> Option<String> {
    let recent = recent_recoveries(export);
    (recent > max && recent > before.recent_recoveries)
        .then(|| format!("{recent} engines were recovered within ten minutes; spec.rollout.maxRecoveries is {max}"))
}

/// The state of an export at `time`, as baseline of its next revision. What its present revision broke counts as
/// working: it did before the change, which the next revision continues.
pub(crate) fn baseline(export: &VirtiofsExport, time: Time) -> Baseline {
    let previous = export.spec.baseline.as_ref();
    let broke_readiness = previous.is_some_and(|it| is_current(export) && readiness_lost(export, it).is_some());
    let broke_remedy = previous.is_some_and(|it| remedy_newly_failed(export, it).is_some());
    Baseline {
        time,
        ready: is_ready(export) || broke_readiness,
        remedy_failed: remedy_failed(export) && !broke_remedy,
        recent_recoveries: recent_recoveries(export),
    }
}

fn remedy_failed(export: &VirtiofsExport) -> bool {
    condition(export, DEGRADED).is_some_and(|it| it.status == "True" && it.reason == REMEDY_FAILED)
}

fn recent_recoveries(export: &VirtiofsExport) -> i64 {
    export.status.as_ref().and_then(|status| status.recent_recoveries).unwrap_or(0)
}

fn soon_after(at: &Time, since: &Time) -> bool {
    at.0.as_second() - since.0.as_second() <= ATTRIBUTION
}

/// The condition of this type.
pub(crate) fn condition<'a>(export: &'a VirtiofsExport, kind: &str) -> Option<&'a Condition> {
    export.status.as_ref()?.conditions.iter().find(|condition| condition.type_ == kind)
}

/// Reason and message of a condition, in one line.
pub(crate) fn summary(condition: &Condition) -> String {
    match condition.message.as_str() {
        "" => condition.reason.clone(),
        message => format!("{}: {message}", condition.reason),
    }
}
