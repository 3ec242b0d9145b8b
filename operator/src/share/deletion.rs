//! Step 5: whether a share that is being deleted can go. A pure function.
//!
//! A deletion cannot block a cluster for good: a deleted node is not waited for, and an annotation forces it.

use kube::ResourceExt;
use virtiofs_crds::VirtiofsShare;

use super::health::{is_drained, sessions};
use super::placement::{Member, Placement};

/// The finalizer of each share.
pub(crate) const FINALIZER: &str = "virtiofs.dev/in-use";
/// The annotation that deletes a share although VMs use it.
pub(crate) const FORCE: &str = "virtiofs.dev/force-delete";
/// Largest number of users in a message.
const NAMED: usize = 8;

/// Progress of a deletion.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Deletion {
    /// The share is not being deleted.
    NotRequested,
    /// VMs use it: number of sessions, and whose.
    InUse { sessions: i64, by: String },
    /// Nodes have not confirmed yet that they stopped serving it.
    Draining { nodes: usize },
    /// Nothing blocks the deletion.
    Done,
}

/// The progress of a share's deletion.
pub(crate) fn deletion(object: &VirtiofsShare, placement: &Placement) -> Deletion {
    if object.metadata.deletion_timestamp.is_none() {
        return Deletion::NotRequested;
    }
    if object.annotations().get(FORCE).is_some_and(|value| value == "true") {
        return Deletion::Done;
    }
    let left: Vec<&Member> = placement.leaving.values().filter(|member| !is_drained(&member.export)).collect();
    let used: i64 = left.iter().map(|member| sessions(&member.export)).sum();
    match (left.is_empty(), used) {
        (true, _) => Deletion::Done,
        (false, 0) => Deletion::Draining { nodes: left.len() },
        (false, sessions) => Deletion::InUse { sessions, by: users(&left) },
    }
}

/// The users of a share, by node.
fn users(members: &[&Member]) -> String {
    let used: Vec<&&Member> = members.iter().filter(|member| sessions(&member.export) > 0).collect();
    let mut text: Vec<String> = used.iter().take(NAMED).map(|member| of_node(member)).collect();
    if used.len() > NAMED {
        text.push(format!("and {} more nodes", used.len() - NAMED));
    }
    text.join("; ")
}

fn of_node(member: &Member) -> String {
    let export = &member.export;
    let named = export.status.as_ref().map(|status| status.users.as_slice()).unwrap_or_default();
    let shown = named.iter().take(NAMED).map(String::as_str).collect::<Vec<_>>().join(", ");
    let unreachable = if member.reachable { "" } else { " (unreachable)" };
    let node = format!("node {}{unreachable}", export.spec.node_name);
    match shown.is_empty() {
        true => format!("{node}: {} sessions", sessions(export)),
        false => format!("{node}: {shown}"),
    }
}
