//! Step 6: what is said about a share. A pure function; equal inputs say the same, so that nothing is written when
//! nothing has changed.

use std::collections::BTreeMap;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use virtiofs_crds::v1alpha1::conditions::{
    ALL_NODES_READY, COMPLETE, DELETING, IN_USE, INVALID, NO_NODES, NODES_NOT_READY, PROGRESSING, READY, ROLLING_OUT,
    ROLLOUT_HALTED, WITHDRAWING,
};
use virtiofs_crds::v1alpha1::{NodeCounts, StaleCount, VirtiofsShareStatus};
use virtiofs_crds::{Refusal, VirtiofsShare};

use super::declare::Declared;
use super::deletion::Stay;
use super::health::{condition, is_ready, is_settled, sessions, told};
use super::place::{Member, Placement};
use super::rollout::{Rollout, Stage};

/// How many nodes a message names.
const NAMED: usize = 3;
/// Longest message, in characters.
const MESSAGE_MAX: usize = 1000;

/// A condition before it is known since when it holds.
struct Said {
    kind: &'static str,
    status: &'static str,
    reason: &'static str,
    message: String,
}

/// What is said about a share that makes sense.
pub(crate) fn status(
    object: &VirtiofsShare,
    declared: &Declared,
    placement: &Placement,
    rollout: &Rollout,
    stay: &Stay,
    now: &Time,
) -> VirtiofsShareStatus {
    let counts = counts(declared, placement);
    let mut said = vec![readiness(placement, &counts, stay), progress(rollout, &counts)];
    said.extend(deletion(stay));
    let everyone = || placement.members.values().chain(placement.leavers.values());
    VirtiofsShareStatus {
        observed_generation: object.metadata.generation,
        revision: Some(declared.template.revision.clone()),
        engine: Some(declared.template.engine.clone()),
        nodes: Some(counts),
        sessions: Some(everyone().map(|member| sessions(&member.export)).sum()),
        staleness: staleness(everyone()),
        conditions: conditions(object, said, now),
    }
}

/// What is said about a share that makes no sense: why. The rest stays as it was, as it does on the nodes.
pub(crate) fn refused(object: &VirtiofsShare, refusals: &[Refusal], now: &Time) -> VirtiofsShareStatus {
    let message = refusals.iter().map(Refusal::to_string).collect::<Vec<_>>().join("; ");
    let said = Said { kind: READY, status: "False", reason: INVALID, message };
    let mut status = object.status.clone().unwrap_or_default();
    status.observed_generation = object.metadata.generation;
    status.conditions = conditions(object, vec![said], now);
    status
}

fn counts(declared: &Declared, placement: &Placement) -> NodeCounts {
    let count = |what: &dyn Fn(&Member) -> bool| placement.members.values().filter(|it| what(it)).count() as i64;
    let is_current = |it: &Member| it.export.spec.revision == declared.template.revision && is_settled(&it.export);
    NodeCounts {
        selected: (placement.members.len() + placement.newcomers.len()) as i64,
        updated: count(&|it| is_current(it)),
        ready: count(&|it| it.reachable && is_ready(&it.export)),
        unreachable: count(&|it| !it.reachable),
    }
}

fn readiness(placement: &Placement, counts: &NodeCounts, stay: &Stay) -> Said {
    let said = |status, reason, message: String| Said { kind: READY, status, reason, message };
    if *stay != Stay::Wanted {
        return said("False", DELETING, "no more VMs may connect".into());
    }
    if counts.selected == 0 {
        return said("False", NO_NODES, "no node has the labels of spec.nodes.selector".into());
    }
    let silent = placement.newcomers.iter().map(|node| format!("{node}: not asked yet"));
    let unready = placement.members.iter().filter(|(_, it)| it.reachable && !is_ready(&it.export));
    let unready: Vec<String> = unready.map(|(node, it)| format!("{node}: {}", why(it))).chain(silent).collect();
    let down = match counts.unreachable {
        0 => String::new(),
        down => format!("; {down} cannot be reached"),
    };
    let serving = format!("{} of {} nodes serve it{down}", counts.ready, counts.selected);
    match (unready.is_empty(), counts.ready) {
        (true, 1..) => said("True", ALL_NODES_READY, serving),
        (true, _) => said("False", NODES_NOT_READY, serving),
        (false, _) => said("False", NODES_NOT_READY, format!("{serving}; {}", few(&unready))),
    }
}

fn why(member: &Member) -> String {
    condition(&member.export, READY).map_or_else(|| "no answer yet".to_owned(), told)
}

fn progress(rollout: &Rollout, counts: &NodeCounts) -> Said {
    let (status, reason, message) = match &rollout.stage {
        Stage::Complete if counts.unreachable > 0 => {
            ("False", COMPLETE, format!("{} nodes cannot be reached and follow when they are back", counts.unreachable))
        }
        Stage::Complete => ("False", COMPLETE, String::new()),
        Stage::Under { awaited, unasked } => {
            ("True", ROLLING_OUT, format!("waiting for {}; {unasked} more to come", few(awaited)))
        }
        Stage::Halted { node, how, unasked } => {
            ("False", ROLLOUT_HALTED, format!("since it was changed, {node} does worse: {how}; {unasked} more to come"))
        }
    };
    Said { kind: PROGRESSING, status, reason, message }
}

fn deletion(stay: &Stay) -> Option<Said> {
    let (reason, message) = match stay {
        Stay::Wanted => return None,
        Stay::InUse { sessions, by } => (IN_USE, format!("{sessions} sessions: {by}")),
        Stay::Withdrawing { nodes } => (WITHDRAWING, format!("{nodes} nodes have not let go yet")),
        Stay::MayGo => (WITHDRAWING, String::new()),
    };
    Some(Said { kind: DELETING, status: "True", reason, message })
}

/// Counts of all members by cause.
fn staleness<'a>(members: impl Iterator<Item = &'a Member>) -> Vec<StaleCount> {
    let mut causes: BTreeMap<&str, i64> = BTreeMap::new();
    for count in members.filter_map(|it| it.export.status.as_ref()).flat_map(|status| &status.staleness) {
        *causes.entry(&count.cause).or_default() += count.count;
    }
    causes.into_iter().map(|(cause, count)| StaleCount { cause: cause.to_owned(), count }).take(16).collect()
}

/// The first few of a list, and how many more there are.
fn few(items: &[String]) -> String {
    let shown = items.iter().take(NAMED).map(String::as_str).collect::<Vec<_>>().join(", ");
    match items.len().saturating_sub(NAMED) {
        0 if shown.is_empty() => "nobody".to_owned(),
        0 => shown,
        more => format!("{shown} and {more} more"),
    }
}

/// Conditions as they are written: each since when its status holds.
fn conditions(object: &VirtiofsShare, said: Vec<Said>, now: &Time) -> Vec<Condition> {
    let before = object.status.as_ref().map(|status| status.conditions.as_slice()).unwrap_or_default();
    let since = |it: &Said| {
        let old = before.iter().find(|old| old.type_ == it.kind && old.status == it.status);
        old.map_or_else(|| now.clone(), |old| old.last_transition_time.clone())
    };
    said.into_iter()
        .map(|it| Condition {
            last_transition_time: since(&it),
            message: it.message.chars().take(MESSAGE_MAX).collect(),
            observed_generation: object.metadata.generation,
            reason: it.reason.to_owned(),
            status: it.status.to_owned(),
            type_: it.kind.to_owned(),
        })
        .collect()
}
