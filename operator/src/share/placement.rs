//! Step 2: the nodes of a share. Depends on what was observed alone.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use kube::ResourceExt;
use kube::core::SelectorExt;
use virtiofs_crds::VirtiofsExport;

use super::desired::Desired;
use crate::cluster::NodeFacts;

/// Nodes and exports of a share, matched with each other.
#[derive(Clone, Debug, Default)]
pub(crate) struct Placement {
    /// Selected nodes that have an export, by name.
    pub(crate) members: BTreeMap<String, Member>,
    /// Selected nodes that have no export yet.
    pub(crate) pending: BTreeSet<String>,
    /// Nodes that have an export and are not selected any more, by name.
    pub(crate) leaving: BTreeMap<String, Member>,
    /// Exports whose node was deleted.
    pub(crate) orphans: Vec<Arc<VirtiofsExport>>,
}

/// A node with its export.
#[derive(Clone, Debug)]
pub(crate) struct Member {
    /// True if the node and its agent are up.
    pub(crate) reachable: bool,
    /// Its export.
    pub(crate) export: Arc<VirtiofsExport>,
}

/// Matches nodes and exports. Without a desired state no node is selected.
pub(crate) fn placement(
    desired: Option<&Desired>,
    nodes: &[NodeFacts],
    exports: Vec<Arc<VirtiofsExport>>,
) -> Placement {
    let nodes: BTreeMap<&str, &NodeFacts> = nodes.iter().map(|node| (node.name.as_str(), node)).collect();
    let selected = |node: &NodeFacts| desired.is_some_and(|it| it.selector.matches(&node.labels));
    let mut placement = Placement::default();
    for export in exports {
        let name = export.spec.node_name.clone();
        match nodes.get(name.as_str()) {
            None => placement.orphans.push(export),
            Some(node) => {
                let members = if selected(node) { &mut placement.members } else { &mut placement.leaving };
                members.insert(name, Member { reachable: node.reachable, export });
            }
        }
    }
    placement.orphans.sort_by_key(|export| export.name_any());
    let has_export = |name: &str| placement.members.contains_key(name);
    placement.pending =
        nodes.values().filter(|node| selected(node) && !has_export(&node.name)).map(|node| node.name.clone()).collect();
    placement
}
