//! Step 2: where the share is and where it should be. Needs nothing but what was observed.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use kube::ResourceExt;
use kube::core::SelectorExt;
use virtiofs_crds::VirtiofsExport;

use super::declare::Declared;
use crate::cluster::NodeFacts;

/// Nodes and exports of a share, brought together.
#[derive(Clone, Debug, Default)]
pub(crate) struct Placement {
    /// Nodes that are to serve it and have been asked to, by name.
    pub(crate) members: BTreeMap<String, Member>,
    /// Nodes that are to serve it and have not been asked yet.
    pub(crate) newcomers: BTreeSet<String>,
    /// Nodes that were asked and are not to serve it any more, by name.
    pub(crate) leavers: BTreeMap<String, Member>,
    /// Exports on nodes that are no more.
    pub(crate) orphans: Vec<Arc<VirtiofsExport>>,
}

/// A node with its export.
#[derive(Clone, Debug)]
pub(crate) struct Member {
    /// Can the node take up changes, and answer?
    pub(crate) reachable: bool,
    /// What it was asked and has answered.
    pub(crate) export: Arc<VirtiofsExport>,
}

/// Brings nodes and exports together; without a declaration no node is to serve.
pub(crate) fn place(declared: Option<&Declared>, nodes: &[NodeFacts], exports: Vec<Arc<VirtiofsExport>>) -> Placement {
    let nodes: BTreeMap<&str, &NodeFacts> = nodes.iter().map(|node| (node.name.as_str(), node)).collect();
    let selected = |node: &NodeFacts| declared.is_some_and(|it| it.selector.matches(&node.labels));
    let mut placement = Placement::default();
    for export in exports {
        let name = export.spec.node_name.clone();
        match nodes.get(name.as_str()) {
            None => placement.orphans.push(export),
            Some(node) => {
                let members = if selected(node) { &mut placement.members } else { &mut placement.leavers };
                members.insert(name, Member { reachable: node.reachable, export });
            }
        }
    }
    placement.orphans.sort_by_key(|export| export.name_any());
    let asked = |name: &str| placement.members.contains_key(name);
    placement.newcomers =
        nodes.values().filter(|node| selected(node) && !asked(&node.name)).map(|node| node.name.clone()).collect();
    placement
}
