//! Step 3: the nodes that change to the desired revision now. A pure function of nodes and exports.

use std::collections::BTreeMap;

use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;

use super::desired::Desired;
use super::health::{is_current, is_ready, regression};
use super::placement::Member;

/// A roll-out.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Rollout {
    /// Nodes that get the desired revision now.
    pub(crate) advance: Vec<String>,
    /// Its progress.
    pub(crate) stage: Stage,
}

/// Progress of a roll-out.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) enum Stage {
    /// The desired revision is active on every reachable node.
    #[default]
    Complete,
    /// Nodes are changing: their names, and the number of nodes that follow.
    InProgress { changing: Vec<String>, pending: usize },
    /// This node regressed: how, and the number of nodes that do not have the revision.
    Halted { node: String, how: String, pending: usize },
}

/// Decides which nodes get the desired revision now.
///
/// # Guarantees
/// - At most `maxUnavailable` nodes that served before are changing and not serving again yet.
/// - No node is changed while one has regressed.
/// - Nodes that do not serve go first: a change can only improve them.
/// - An unreachable node is neither changed nor waited for; it follows when it is back.
pub(crate) fn rollout(desired: &Desired, members: &BTreeMap<String, Member>) -> Rollout {
    let reachable: Vec<(&String, &Member)> = members.iter().filter(|(_, member)| member.reachable).collect();
    let has_revision = |member: &Member| member.export.spec.revision == desired.template.revision;
    let (given, mut pending): (Vec<_>, Vec<_>) =
        reachable.iter().copied().partition(|(_, member)| has_revision(member));
    let mut changing: Vec<String> =
        given.iter().filter(|(_, member)| is_changing(member)).map(|(name, _)| (*name).clone()).collect();
    let regressed =
        given.iter().find_map(|(name, member)| Some((*name, regression(&member.export, desired.max_recoveries)?)));
    if let Some((node, how)) = regressed.filter(|_| !pending.is_empty()) {
        let stage = Stage::Halted { node: node.clone(), how, pending: pending.len() };
        return Rollout { advance: Vec::new(), stage };
    }
    pending.sort_by_key(|(name, member)| (is_ready(&member.export), *name));
    let free = limit(&desired.max_unavailable, members.len()).saturating_sub(changing.len());
    let advance: Vec<String> = pending.iter().take(free).map(|(name, _)| (*name).clone()).collect();
    if changing.is_empty() && pending.is_empty() {
        return Rollout { advance, stage: Stage::Complete };
    }
    changing.extend(advance.iter().cloned());
    let pending = pending.len() - advance.len();
    Rollout { advance, stage: Stage::InProgress { changing, pending } }
}

/// True if a node has got a revision and does not serve with it yet. A node that did not serve before is not waited for
/// once it has reported.
fn is_changing(member: &Member) -> bool {
    let export = &member.export;
    // The first revision of a node interrupts nobody.
    let Some(before) = &export.spec.baseline else { return false };
    !is_current(export) || (before.ready && !is_ready(export))
}

/// Number of nodes that may change at a time, at least one.
fn limit(max_unavailable: &IntOrString, nodes: usize) -> usize {
    let limit = match max_unavailable {
        IntOrString::Int(number) => usize::try_from(*number).unwrap_or(1),
        IntOrString::String(text) => {
            let percent: usize = text.trim_end_matches('%').parse().unwrap_or(1);
            (nodes * percent).div_ceil(100)
        }
    };
    limit.max(1)
}
