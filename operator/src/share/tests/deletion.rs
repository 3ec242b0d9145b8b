//! A share that is to go.

use super::*;

#[test]
fn a_share_in_use_stays_and_says_who_uses_it() {
    let mut bench = Bench::served(3, json!({}));
    bench.answer("n1", true, 2);
    bench.delete_share();
    assert_eq!(bench.turn(), ["n0", "n1", "n2"], "nobody may connect any more");
    for (node, sessions) in [("n0", 0), ("n1", 2), ("n2", 0)] {
        bench.answer(node, false, sessions);
    }
    assert_eq!(bench.turn(), ["n0", "n2"]);
    let Stay::InUse { sessions: 2, by } = stay(&bench.share, &bench.placement()) else { panic!() };
    assert_eq!(by, "node n1: vm-0, vm-1");
    assert_eq!((bench.reason(READY), bench.reason(DELETING)), (DELETING.into(), IN_USE.into()));
    bench.answer("n1", false, 0);
    assert_eq!(stay(&bench.share, &bench.placement()), Stay::MayGo);
}

#[test]
fn deletion_cannot_wedge_a_cluster() {
    // Nodes that are gone are not waited for.
    let mut bench = Bench::served(1, json!({}));
    bench.answer("n0", true, 2);
    bench.delete_share();
    bench.turn();
    assert_eq!(bench.reason(DELETING), IN_USE);
    let mut gone = Bench { nodes: Vec::new(), ..bench };
    assert_eq!(stay(&gone.share, &gone.placement()), Stay::MayGo);
    // A node that is down might still run VMs, so it is waited for, until somebody says otherwise.
    gone.nodes = nodes(1);
    gone.nodes[0].reachable = false;
    let Stay::InUse { by, .. } = stay(&gone.share, &gone.placement()) else { panic!() };
    assert_eq!(by, "node n0, which cannot be reached: vm-0, vm-1");
    gone.share.metadata.annotations = Some([(FORCE.to_owned(), "true".to_owned())].into());
    assert_eq!(stay(&gone.share, &gone.placement()), Stay::MayGo);
}

#[test]
fn a_node_that_has_not_answered_is_waited_for_unless_it_is_down_and_never_did() {
    let mut bench = Bench { share: share(json!({})), nodes: nodes(1), exports: Vec::new(), second: 0 };
    bench.turn();
    bench.delete_share();
    bench.turn();
    assert_eq!(
        (stay(&bench.share, &bench.placement()), bench.reason(DELETING).as_str()),
        (Stay::Withdrawing { nodes: 1 }, DRAINING)
    );
    bench.nodes[0].reachable = false;
    assert_eq!(bench.turn(), ["n0"]);
    assert_eq!(stay(&bench.share, &bench.placement()), Stay::MayGo);
}
