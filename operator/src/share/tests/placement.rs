//! Which nodes have an export, and for how long.

use super::*;

#[test]
fn each_selected_node_gets_one_export() {
    let mut cluster = TestCluster::served(3, json!({}));
    assert_eq!(cluster.exports.len(), 3);
    cluster.reconcile();
    assert_eq!((cluster.reason(READY), cluster.reason(RECONCILING)), (ALL_NODES_READY.into(), COMPLETE.into()));
    let before = cluster.share.status.clone();
    assert_eq!(cluster.reconcile(), Vec::<String>::new());
    assert_eq!(cluster.share.status, before);
}

#[test]
fn nodes_are_selected_by_their_labels() {
    let selector = json!({"nodes": {"selector": {"matchLabels": {"kvm": "true"}, "matchExpressions": [
        {"key": "retired", "operator": "NotIn", "values": ["yes"]},
    ]}}});
    let mut cluster = TestCluster::served(3, selector);
    assert_eq!(cluster.exports.len(), 3);
    cluster.nodes[1].labels.insert("retired".into(), "yes".into());
    cluster.nodes[2].labels.clear();
    assert_eq!(cluster.reconcile(), ["n1", "n2"]);
    assert_eq!(cluster.export("n1").spec.mode, ExportMode::Drain);
    for node in &mut cluster.nodes {
        node.labels.clear();
    }
    assert_eq!(cluster.reason(READY), NO_NODES_SELECTED);
}

#[test]
fn changes_by_other_writers_are_reverted() {
    let mut cluster = TestCluster::served(1, json!({}));
    cluster.export("n0").spec.engine.max_inodes = 5000;
    assert_eq!(cluster.reconcile(), ["n0"]);
    assert_eq!(cluster.reconcile(), Vec::<String>::new());
}

#[test]
fn an_export_is_deleted_after_its_last_session() {
    let mut cluster = TestCluster::served(1, json!({"nodes": {"selector": {"matchLabels": {"kvm": "true"}}}}));
    cluster.report("n0", true, 2);
    let labels = std::mem::take(&mut cluster.nodes[0].labels);
    assert_eq!(cluster.reconcile(), ["n0"]);
    assert_eq!(cluster.reconcile(), Vec::<String>::new(), "the agent has not reported yet");
    cluster.report("n0", false, 2);
    assert_eq!(cluster.reconcile(), Vec::<String>::new(), "it is in use");
    // Selected again meanwhile, it serves at once.
    cluster.nodes[0].labels = labels;
    assert_eq!(cluster.reconcile(), ["n0"]);
    assert_eq!(cluster.export("n0").spec.mode, ExportMode::Serve);
    cluster.nodes[0].labels.clear();
    cluster.reconcile();
    cluster.report("n0", false, 0);
    assert_eq!(cluster.reconcile(), ["n0"]);
    assert!(cluster.exports.is_empty());
}

#[test]
fn the_export_of_a_deleted_node_is_deleted() {
    let mut cluster = TestCluster::served(2, json!({}));
    cluster.report("n0", true, 5);
    cluster.nodes.remove(0);
    assert_eq!(cluster.reconcile(), ["n0"]);
    assert_eq!(cluster.exports.len(), 1);
    cluster.nodes.insert(0, nodes(1).remove(0));
    assert_eq!(cluster.reconcile(), ["n0"], "a node that is back has a new export");
}
