//! Step 3: which nodes take up a change now. A pure function of nodes and exports.

use std::collections::BTreeMap;

use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;

use super::declare::Declared;
use super::health::{is_ready, is_settled, worse};
use super::place::Member;

/// How a change of a share goes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Rollout {
    /// Nodes that take it up now.
    pub(crate) advance: Vec<String>,
    /// How far it is.
    pub(crate) stage: Stage,
}

/// How far a change is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) enum Stage {
    /// Every reachable node has taken it up.
    #[default]
    Complete,
    /// Nodes are taking it up; those that it waits for, by name, and how many have not been asked yet.
    Under { awaited: Vec<String>, unasked: usize },
    /// It goes no further: this node does worse.
    Halted { node: String, how: String, unasked: usize },
}

/// Decides which nodes take up the declared revision now.
///
/// # Guarantees
/// - At most `maxUnavailable` nodes that served before are between asked and serving again.
/// - None is asked while one does worse than before.
/// - Nodes that do not serve go first: there is nothing to lose on them, and the change may be the cure.
/// - A node that cannot be reached is neither asked nor waited for; it takes part when it is back.
pub(crate) fn rollout(declared: &Declared, members: &BTreeMap<String, Member>) -> Rollout {
    let reachable: Vec<(&String, &Member)> = members.iter().filter(|(_, member)| member.reachable).collect();
    let is_asked = |member: &Member| member.export.spec.revision == declared.template.revision;
    let (asked, mut unasked): (Vec<_>, Vec<_>) = reachable.iter().copied().partition(|(_, member)| is_asked(member));
    let awaited: Vec<String> =
        asked.iter().filter(|(_, member)| is_awaited(member)).map(|(name, _)| (*name).clone()).collect();
    let fallen = asked.iter().find_map(|(name, member)| Some((*name, worse(&member.export, declared.max_recoveries)?)));
    if let Some((node, how)) = fallen.filter(|_| !unasked.is_empty()) {
        let stage = Stage::Halted { node: node.clone(), how, unasked: unasked.len() };
        return Rollout { advance: Vec::new(), stage };
    }
    unasked.sort_by_key(|(name, member)| (is_ready(&member.export), *name));
    let budget = limit(&declared.max_unavailable, members.len()).saturating_sub(awaited.len());
    let advance: Vec<String> = unasked.iter().take(budget).map(|(name, _)| (*name).clone()).collect();
    let stage = match (awaited.is_empty(), unasked.is_empty()) {
        (true, true) => Stage::Complete,
        _ => {
            let unasked = unasked.len() - advance.len();
            Stage::Under { awaited: awaited.into_iter().chain(advance.iter().cloned()).collect(), unasked }
        }
    };
    Rollout { advance, stage }
}

/// Is a node between asked and serving? One that did not serve before is not waited for once it has answered.
fn is_awaited(member: &Member) -> bool {
    let export = &member.export;
    // A node's first revision changes nothing for anybody.
    let Some(before) = &export.spec.baseline else { return false };
    !is_settled(export) || (before.ready && !is_ready(export))
}

/// How many of `nodes` may be changing: never none, or nothing would ever change.
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
