//! Step 5: a share that is to be deleted stays until nobody uses it any more. A pure function.
//!
//! It cannot wedge a cluster: a node that is gone is not asked, and whoever says so in an annotation is believed.

use kube::ResourceExt;
use virtiofs_crds::VirtiofsShare;

use super::health::{is_drained, sessions};
use super::place::{Member, Placement};

/// The finalizer on each share.
pub(crate) const FINALIZER: &str = "virtiofs.dev/in-use";
/// The annotation with which a share is deleted whoever uses it.
pub(crate) const FORCE: &str = "virtiofs.dev/force-delete";
/// How many users are named.
const NAMED: usize = 8;

/// Is a share to stay?
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Stay {
    /// Nobody wants to delete it.
    Wanted,
    /// It is to be deleted, and VMs use it: how many sessions, and whose.
    InUse { sessions: i64, by: String },
    /// It is to be deleted, and nodes have not let go of it yet.
    Withdrawing { nodes: usize },
    /// Nothing holds it.
    MayGo,
}

/// Decides whether a share stays.
pub(crate) fn stay(object: &VirtiofsShare, placement: &Placement) -> Stay {
    if object.metadata.deletion_timestamp.is_none() {
        return Stay::Wanted;
    }
    if object.annotations().get(FORCE).is_some_and(|value| value == "true") {
        return Stay::MayGo;
    }
    let left: Vec<&Member> = placement.leavers.values().filter(|member| !is_drained(&member.export)).collect();
    let used: i64 = left.iter().map(|member| sessions(&member.export)).sum();
    match (left.is_empty(), used) {
        (true, _) => Stay::MayGo,
        (false, 0) => Stay::Withdrawing { nodes: left.len() },
        (false, sessions) => Stay::InUse { sessions, by: users(&left) },
    }
}

/// Who uses a share, node by node.
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
    let reach = if member.reachable { "" } else { ", which cannot be reached" };
    let node = format!("node {}{reach}", export.spec.node_name);
    match shown.is_empty() {
        true => format!("{node}: {} sessions", sessions(export)),
        false => format!("{node}: {shown}"),
    }
}
