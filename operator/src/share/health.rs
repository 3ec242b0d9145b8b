//! How an export does, read out of its status.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use virtiofs_crds::v1alpha1::conditions::{DEGRADED, READY, REMEDY_FAILED};
use virtiofs_crds::v1alpha1::{Baseline, ExportMode, VirtiofsExport};

/// What comes up within this time after a revision came to a node is put down to the revision, in seconds.
pub(crate) const BLAMED_FOR: i64 = 600;

/// Does it serve?
pub(crate) fn is_ready(export: &VirtiofsExport) -> bool {
    condition(export, READY).is_some_and(|condition| condition.status == "True")
}

/// Has the node taken up the revision it was asked for?
pub(crate) fn is_settled(export: &VirtiofsExport) -> bool {
    let observed = export.status.as_ref().and_then(|status| status.observed_revision.as_deref());
    observed == Some(export.spec.revision.as_str())
}

/// Sessions that it has, as far as it has said.
pub(crate) fn sessions(export: &VirtiofsExport) -> i64 {
    export.status.as_ref().and_then(|status| status.sessions).unwrap_or(0)
}

/// Has the node let go of it: told to drain, answered to that, and with no session left?
pub(crate) fn is_drained(export: &VirtiofsExport) -> bool {
    let answered = export.status.as_ref().and_then(|status| status.observed_generation);
    export.spec.mode == ExportMode::Drain
        && answered.is_some()
        && answered == export.metadata.generation
        && sessions(export) == 0
}

/// Has no agent ever said anything about it?
pub(crate) fn is_untouched(export: &VirtiofsExport) -> bool {
    export.status.as_ref().is_none_or(|status| status.observed_generation.is_none())
}

/// What an export does worse than before its revision came.
pub(crate) fn worse(export: &VirtiofsExport, max_recoveries: i64) -> Option<String> {
    let before = export.spec.baseline.as_ref()?;
    if !is_settled(export) {
        return None;
    }
    lost(export, before).or_else(|| failed(export, before)).or_else(|| restless(export, before, max_recoveries))
}

fn lost(export: &VirtiofsExport, before: &Baseline) -> Option<String> {
    let ready = condition(export, READY).filter(|it| it.status != "True")?;
    let blamed = before.ready && soon_after(&ready.last_transition_time, &before.time);
    blamed.then(|| format!("it no longer serves the share: {}", told(ready)))
}

fn failed(export: &VirtiofsExport, before: &Baseline) -> Option<String> {
    let degraded = condition(export, DEGRADED).filter(|_| !before.remedy_failed && remedy_failed(export))?;
    soon_after(&degraded.last_transition_time, &before.time).then(|| told(degraded))
}

fn restless(export: &VirtiofsExport, before: &Baseline, most: i64) -> Option<String> {
    let recent = recent_recoveries(export);
    (recent > most && recent > before.recent_recoveries)
        .then(|| format!("{recent} engines were recovered within ten minutes; spec.rollout.maxRecoveries is {most}"))
}

/// How an export does now, for comparison after `time`. What its present revision has spoilt counts as well: it was
/// not so before the change that goes on with this.
pub(crate) fn baseline(export: &VirtiofsExport, time: Time) -> Baseline {
    let spoilt = export.spec.baseline.as_ref();
    let spoilt_ready = spoilt.is_some_and(|before| is_settled(export) && lost(export, before).is_some());
    let spoilt_names = spoilt.is_some_and(|before| failed(export, before).is_some());
    Baseline {
        time,
        ready: is_ready(export) || spoilt_ready,
        remedy_failed: remedy_failed(export) && !spoilt_names,
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
    at.0.as_second() - since.0.as_second() <= BLAMED_FOR
}

/// A condition of an export.
pub(crate) fn condition<'a>(export: &'a VirtiofsExport, kind: &str) -> Option<&'a Condition> {
    export.status.as_ref()?.conditions.iter().find(|condition| condition.type_ == kind)
}

/// Why a condition is as it is, in one line.
pub(crate) fn told(condition: &Condition) -> String {
    match condition.message.as_str() {
        "" => condition.reason.clone(),
        message => format!("{}: {message}", condition.reason),
    }
}
