//! Step 6: the status of a share. A pure function: equal inputs give an equal status, so that nothing is written when
//! nothing has changed.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use virtiofs_crds::v1alpha1::conditions::{
    ALL_NODES_READY, AS_EXPECTED, COMPLETE, DEGRADED, DELETING, DRAINING, IN_USE, INVALID_SPEC, NO_NODES_SELECTED,
    NODES_DEGRADED, NODES_NOT_READY, NODES_UNREACHABLE, NOT_STALLED, READY, RECONCILING, ROLLING_OUT, ROLLOUT_HALTED,
    STALLED,
};
use virtiofs_crds::v1alpha1::{NodeCounts, VirtiofsShareStatus};
use virtiofs_crds::{Refusal, VirtiofsShare};

use super::deletion::Deletion;
use super::desired::Desired;
use super::health::{condition, is_current, is_ready, sessions, summary};
use super::placement::{Member, Placement};
use super::rollout::{Rollout, Stage};

/// How many nodes a message names.
const NAMED: usize = 3;
/// Longest message, in characters.
const MESSAGE_MAX: usize = 1000;

/// A condition without its transition time.
struct Draft {
    kind: &'static str,
    status: bool,
    reason: &'static str,
    message: String,
}

impl Draft {
    fn new(kind: &'static str, status: bool, reason: &'static str, message: impl Into<String>) -> Self {
        Draft { kind, status, reason, message: message.into() }
    }
}

/// The status of a valid share.
pub(crate) fn status(
    object: &VirtiofsShare,
    desired: &Desired,
    placement: &Placement,
    rollout: &Rollout,
    deletion: &Deletion,
    now: &Time,
) -> VirtiofsShareStatus {
    let counts = counts(desired, placement);
    let mut drafts = vec![
        ready(placement, &counts, deletion),
        reconciling(rollout, &counts),
        stalled(rollout),
        degraded(placement, &counts),
    ];
    drafts.extend(deleting(deletion));
    let all = placement.members.values().chain(placement.leaving.values());
    VirtiofsShareStatus {
        observed_generation: object.metadata.generation,
        revision: Some(desired.template.revision.clone()),
        engine: Some(desired.engine.clone()),
        nodes: Some(counts),
        sessions: Some(all.map(|member| sessions(&member.export)).sum()),
        conditions: conditions(object, drafts, now),
    }
}

/// The status of a share whose spec is rejected. Everything but the conditions stays, as it does on the nodes.
pub(crate) fn rejected(object: &VirtiofsShare, refusals: &[Refusal], now: &Time) -> VirtiofsShareStatus {
    let message = refusals.iter().map(Refusal::to_string).collect::<Vec<_>>().join("; ");
    let drafts = vec![
        Draft::new(READY, false, INVALID_SPEC, message.clone()),
        Draft::new(RECONCILING, false, INVALID_SPEC, ""),
        Draft::new(STALLED, true, INVALID_SPEC, message),
    ];
    let mut status = object.status.clone().unwrap_or_default();
    status.observed_generation = object.metadata.generation;
    status.conditions = conditions(object, drafts, now);
    status
}

fn counts(desired: &Desired, placement: &Placement) -> NodeCounts {
    let count = |what: &dyn Fn(&Member) -> bool| placement.members.values().filter(|it| what(it)).count() as i64;
    let is_current = |it: &Member| it.export.spec.revision == desired.template.revision && is_current(&it.export);
    NodeCounts {
        selected: (placement.members.len() + placement.pending.len()) as i64,
        updated: count(&|it| is_current(it)),
        ready: count(&|it| it.reachable && is_ready(&it.export)),
        unreachable: count(&|it| !it.reachable),
    }
}

fn ready(placement: &Placement, counts: &NodeCounts, deletion: &Deletion) -> Draft {
    if *deletion != Deletion::NotRequested {
        return Draft::new(READY, false, DELETING, "the share is being deleted; no VM can connect any more");
    }
    if counts.selected == 0 {
        return Draft::new(READY, false, NO_NODES_SELECTED, "no node has the labels of spec.nodes.selector");
    }
    let unreachable = match counts.unreachable {
        0 => String::new(),
        nodes => format!("; {nodes} unreachable"),
    };
    let serving = format!("{} of {} nodes serve the share{unreachable}", counts.ready, counts.selected);
    let pending = placement.pending.iter().map(|node| format!("{node}: no export yet"));
    let unready = placement.members.iter().filter(|(_, it)| it.reachable && !is_ready(&it.export));
    let unready: Vec<String> = unready.map(|(node, it)| format!("{node}: {}", why(it))).chain(pending).collect();
    if counts.unreachable * 2 > counts.selected {
        return Draft::new(READY, false, NODES_UNREACHABLE, serving);
    }
    if unready.is_empty() {
        return Draft::new(READY, true, ALL_NODES_READY, serving);
    }
    Draft::new(READY, false, NODES_NOT_READY, format!("{serving}; {}", few(&unready)))
}

fn why(member: &Member) -> String {
    condition(&member.export, READY).map_or_else(|| "no status yet".to_owned(), summary)
}

fn reconciling(rollout: &Rollout, counts: &NodeCounts) -> Draft {
    match &rollout.stage {
        Stage::Complete if counts.unreachable > 0 => {
            let message = format!("{} unreachable nodes follow when they are back", counts.unreachable);
            Draft::new(RECONCILING, false, COMPLETE, message)
        }
        Stage::Complete => Draft::new(RECONCILING, false, COMPLETE, ""),
        Stage::InProgress { changing, pending } => {
            let message = format!("waiting for {}; {pending} nodes pending", few(changing));
            Draft::new(RECONCILING, true, ROLLING_OUT, message)
        }
        Stage::Halted { pending, .. } => {
            Draft::new(RECONCILING, false, ROLLOUT_HALTED, format!("{pending} nodes pending"))
        }
    }
}

fn stalled(rollout: &Rollout) -> Draft {
    match &rollout.stage {
        Stage::Halted { node, how, pending } => {
            let message = format!("{node} regressed after the change: {how}; {pending} nodes pending");
            Draft::new(STALLED, true, ROLLOUT_HALTED, message)
        }
        Stage::Complete | Stage::InProgress { .. } => Draft::new(STALLED, false, NOT_STALLED, ""),
    }
}

fn degraded(placement: &Placement, counts: &NodeCounts) -> Draft {
    let complaint = |(node, member): (&String, &Member)| {
        let degraded = condition(&member.export, DEGRADED).filter(|it| member.reachable && it.status == "True")?;
        Some(format!("{node}: {}", summary(degraded)))
    };
    let complaints: Vec<String> = placement.members.iter().filter_map(complaint).collect();
    match (complaints.is_empty(), counts.unreachable) {
        (true, 0) => Draft::new(DEGRADED, false, AS_EXPECTED, ""),
        (true, nodes) => Draft::new(DEGRADED, true, NODES_UNREACHABLE, format!("{nodes} nodes are unreachable")),
        (false, _) => Draft::new(DEGRADED, true, NODES_DEGRADED, few(&complaints)),
    }
}

fn deleting(deletion: &Deletion) -> Option<Draft> {
    let (reason, message) = match deletion {
        Deletion::NotRequested => return None,
        Deletion::InUse { sessions, by } => (IN_USE, format!("{sessions} sessions: {by}")),
        Deletion::Draining { nodes } => (DRAINING, format!("{nodes} nodes have not confirmed yet")),
        Deletion::Done => (DRAINING, String::new()),
    };
    Some(Draft::new(DELETING, true, reason, message))
}

/// The first few of a list, and how many more there are.
fn few(items: &[String]) -> String {
    let shown = items.iter().take(NAMED).map(String::as_str).collect::<Vec<_>>().join(", ");
    match items.len().saturating_sub(NAMED) {
        0 if shown.is_empty() => "no node".to_owned(),
        0 => shown,
        more => format!("{shown} and {more} more"),
    }
}

/// Completes the drafts; the transition time of a condition stays while its status does.
fn conditions(object: &VirtiofsShare, drafts: Vec<Draft>, now: &Time) -> Vec<Condition> {
    let before = object.status.as_ref().map(|status| status.conditions.as_slice()).unwrap_or_default();
    let complete = |draft: Draft| {
        let status = if draft.status { "True" } else { "False" };
        let old = before.iter().find(|old| old.type_ == draft.kind && old.status == status);
        Condition {
            last_transition_time: old.map_or_else(|| now.clone(), |old| old.last_transition_time.clone()),
            message: draft.message.chars().take(MESSAGE_MAX).collect(),
            observed_generation: object.metadata.generation,
            reason: draft.reason.to_owned(),
            status: status.to_owned(),
            type_: draft.kind.to_owned(),
        }
    };
    drafts.into_iter().map(complete).collect()
}
