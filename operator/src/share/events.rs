//! Step 7: the Events of a change of status. A pure function of the status before and after.

use kube::runtime::events::{Event, EventType};
use virtiofs_crds::v1alpha1::VirtiofsShareStatus;
use virtiofs_crds::v1alpha1::conditions::{
    COMPLETE, DELETING, IN_USE, INVALID_SPEC, NODES_NOT_READY, NODES_UNREACHABLE, READY, RECONCILING, ROLLING_OUT,
    ROLLOUT_HALTED, STALLED,
};

/// Reasons that cause an Event when a condition takes them, and whether it is a warning.
const PUBLISHED: &[(&str, &str, bool)] = &[
    (READY, INVALID_SPEC, true),
    (RECONCILING, ROLLING_OUT, false),
    (STALLED, ROLLOUT_HALTED, true),
    (RECONCILING, COMPLETE, false),
    (DELETING, IN_USE, true),
];

/// The Events of a change of status.
pub(crate) fn events(before: Option<&VirtiofsShareStatus>, after: &VirtiofsShareStatus) -> Vec<Event> {
    let reason_before = |kind: &str| {
        let conditions = before.map(|status| status.conditions.as_slice()).unwrap_or_default();
        conditions.iter().find(|condition| condition.type_ == kind).map(|condition| condition.reason.as_str())
    };
    let changed = after.conditions.iter().filter(|now| reason_before(&now.type_) != Some(now.reason.as_str()));
    changed
        .filter_map(|now| {
            let published = |(kind, reason, _): &&(&str, &str, bool)| *kind == now.type_ && *reason == now.reason;
            let (.., warning) = PUBLISHED.iter().find(published)?;
            // The first status of a share completes nothing.
            if now.reason == COMPLETE && reason_before(RECONCILING).is_none() {
                return None;
            }
            let type_ = if *warning { EventType::Warning } else { EventType::Normal };
            let note = Some(now.message.clone()).filter(|message| !message.is_empty());
            let action = action(&now.type_).to_owned();
            Some(Event { type_, reason: now.reason.clone(), note, action, secondary: None })
        })
        .chain(lost_readiness(before, after))
        .collect()
}

/// The Event of a share that was ready and is not any more.
fn lost_readiness(before: Option<&VirtiofsShareStatus>, after: &VirtiofsShareStatus) -> Option<Event> {
    let ready = |status: &VirtiofsShareStatus| status.conditions.iter().find(|it| it.type_ == READY).cloned();
    let (then, now) = (before.and_then(ready)?, ready(after)?);
    let lost = then.status == "True" && (now.reason == NODES_NOT_READY || now.reason == NODES_UNREACHABLE);
    lost.then(|| Event {
        type_: EventType::Warning,
        reason: now.reason.clone(),
        note: Some(now.message),
        action: action(READY).to_owned(),
        secondary: None,
    })
}

fn action(condition: &str) -> &'static str {
    match condition {
        RECONCILING | STALLED => "RollOut",
        DELETING => "Delete",
        _ => "Serve",
    }
}
