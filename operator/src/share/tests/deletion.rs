//! Deletion of a share.

use super::*;

#[test]
fn a_share_in_use_is_kept_and_names_its_users() {
    let mut cluster = TestCluster::served(3, json!({}));
    cluster.report("n1", true, 2);
    cluster.delete_share();
    assert_eq!(cluster.reconcile(), ["n0", "n1", "n2"], "no VM can connect any more");
    for (node, sessions) in [("n0", 0), ("n1", 2), ("n2", 0)] {
        cluster.report(node, false, sessions);
    }
    assert_eq!(cluster.reconcile(), ["n0", "n2"]);
    let Deletion::InUse { sessions: 2, by } = deletion(&cluster.share, &cluster.placement()) else { panic!() };
    assert_eq!(by, "node n1: vm-0, vm-1");
    assert_eq!((cluster.reason(READY), cluster.reason(DELETING)), (DELETING.into(), IN_USE.into()));
    cluster.report("n1", false, 0);
    assert_eq!(deletion(&cluster.share, &cluster.placement()), Deletion::Done);
}

#[test]
fn a_deletion_does_not_wait_for_deleted_nodes_and_can_be_forced() {
    // Deleted nodes are not waited for.
    let mut cluster = TestCluster::served(1, json!({}));
    cluster.report("n0", true, 2);
    cluster.delete_share();
    cluster.reconcile();
    assert_eq!(cluster.reason(DELETING), IN_USE);
    let mut gone = TestCluster { nodes: Vec::new(), ..cluster };
    assert_eq!(deletion(&gone.share, &gone.placement()), Deletion::Done);
    // An unreachable node may still run VMs, so it is waited for unless the deletion is forced.
    gone.nodes = nodes(1);
    gone.nodes[0].reachable = false;
    let Deletion::InUse { by, .. } = deletion(&gone.share, &gone.placement()) else { panic!() };
    assert_eq!(by, "node n0 (unreachable): vm-0, vm-1");
    gone.share.metadata.annotations = Some([(FORCE.to_owned(), "true".to_owned())].into());
    assert_eq!(deletion(&gone.share, &gone.placement()), Deletion::Done);
}

#[test]
fn a_deletion_waits_for_every_node_that_may_serve() {
    let mut cluster = TestCluster { share: share(json!({})), nodes: nodes(1), exports: Vec::new(), second: 0 };
    cluster.reconcile();
    cluster.delete_share();
    cluster.reconcile();
    assert_eq!(
        (deletion(&cluster.share, &cluster.placement()), cluster.reason(DELETING).as_str()),
        (Deletion::Draining { nodes: 1 }, DRAINING)
    );
    cluster.nodes[0].reachable = false;
    assert_eq!(cluster.reconcile(), ["n0"]);
    assert_eq!(deletion(&cluster.share, &cluster.placement()), Deletion::Done);
}
