//! Roll-outs.

use super::*;

#[test]
fn at_most_max_unavailable_nodes_change_at_a_time() {
    for (max, at_a_time) in [(json!(1), 1), (json!("25%"), 2), (json!("1%"), 1), (json!("100%"), 6), (json!(50), 6)] {
        let rollout = json!({"rollout": {"maxUnavailable": max}});
        let mut cluster = TestCluster::served(6, rollout.clone());
        cluster.edit(json!({"rollout": {"maxUnavailable": max}, "content": "Immutable"}));
        let first = cluster.reconcile();
        assert_eq!(first.len(), at_a_time, "{max}");
        assert_eq!(cluster.reconcile(), Vec::<String>::new(), "no node before the first have reported");
        if at_a_time < 6 {
            assert_eq!(cluster.reason(RECONCILING), ROLLING_OUT);
        }
        let mut reached = first.len();
        while reached < 6 {
            cluster.report_all();
            let next = cluster.reconcile();
            assert!(next.len() <= at_a_time && !next.is_empty(), "{max}: {next:?}");
            reached += next.len();
        }
        cluster.report_all();
        assert_eq!(cluster.reason(RECONCILING), COMPLETE);
    }
}

#[test]
fn a_rollout_halts_at_the_first_node_that_regresses() {
    let mut cluster = TestCluster::served(3, json!({"rollout": {"maxUnavailable": 1}}));
    cluster.reconcile();
    cluster.edit(json!({"rollout": {"maxUnavailable": 1}, "content": "Immutable"}));
    assert_eq!(cluster.reconcile(), ["n0"]);
    cluster.report("n0", false, 0);
    assert_eq!(cluster.reconcile(), Vec::<String>::new());
    let (rollout, _, status) = cluster.decide();
    let Stage::Halted { node, how, pending } = rollout.stage else { panic!("{rollout:?}") };
    assert_eq!((node.as_str(), pending), ("n0", 2));
    assert!(how.contains("SourceMissing: /srv/images does not exist"), "{how}");
    let progress = status.conditions.iter().find(|it| it.type_ == RECONCILING).unwrap();
    assert_eq!((progress.status.as_str(), progress.reason.as_str()), ("False", ROLLOUT_HALTED));

    // The next change starts with the broken node, whose baseline says that it worked.
    cluster.edit(json!({"rollout": {"maxUnavailable": 1}, "content": "Exclusive"}));
    assert_eq!(cluster.reconcile(), ["n0"]);
    assert!(cluster.export("n0").spec.baseline.as_ref().unwrap().ready);
    cluster.report("n0", false, 0);
    assert_eq!(cluster.reconcile(), Vec::<String>::new(), "the second change is as bad");
    // The roll-out continues by itself when the node has recovered.
    cluster.report("n0", true, 0);
    assert_eq!(cluster.reconcile(), ["n1"]);
}

#[test]
fn a_node_that_was_broken_before_goes_first_and_blocks_nothing() {
    let mut cluster = TestCluster::served(3, json!({"rollout": {"maxUnavailable": 1}}));
    cluster.report("n2", false, 0);
    cluster.edit(json!({"rollout": {"maxUnavailable": 1}, "content": "Immutable"}));
    assert_eq!(cluster.reconcile(), ["n2"]);
    cluster.report("n2", false, 0);
    assert_eq!(cluster.reconcile(), ["n0"]);
}

#[test]
fn a_late_regression_is_not_attributed_to_the_change() {
    let mut cluster = TestCluster::served(2, json!({"rollout": {"maxUnavailable": 1}}));
    cluster.edit(json!({"rollout": {"maxUnavailable": 1}, "content": "Immutable"}));
    assert_eq!(cluster.reconcile(), ["n0"]);
    cluster.report("n0", true, 0);
    cluster.second += health::ATTRIBUTION + 10;
    cluster.report("n0", false, 0);
    assert_eq!(cluster.reconcile(), ["n1"].map(String::from).to_vec()[..0].to_vec(), "one node is unavailable already");
    assert!(matches!(cluster.decide().0.stage, Stage::InProgress { .. }));
}

#[test]
fn recoveries_and_failed_remedies_halt_a_rollout() {
    let halts = |recent: i64, remedy: bool, allowed: i64| {
        let mut cluster = TestCluster::served(2, json!({"rollout": {"maxUnavailable": 1, "maxRecoveries": allowed}}));
        cluster.edit(json!({"rollout": {"maxUnavailable": 1, "maxRecoveries": allowed}, "content": "Immutable"}));
        assert_eq!(cluster.reconcile(), ["n0"]);
        cluster.report("n0", true, 0);
        let second = cluster.second;
        let status = cluster.export("n0").status.as_mut().unwrap();
        status.recent_recoveries = Some(recent);
        if remedy {
            let degraded = json!({"type": "Degraded", "status": "True", "reason": "RemedyFailed", "message": "ESTALE",
                                  "lastTransitionTime": time(second)});
            status.conditions.push(serde_json::from_value(degraded).unwrap());
        }
        matches!(cluster.decide().0.stage, Stage::Halted { .. })
    };
    assert!(!halts(0, false, 5) && !halts(5, false, 5) && halts(6, false, 5) && halts(1, false, 0));
    assert!(halts(0, true, 5));
}

#[test]
fn unreachable_nodes_are_skipped() {
    let mut cluster = TestCluster::served(3, json!({"rollout": {"maxUnavailable": 1}}));
    cluster.nodes[0].reachable = false;
    cluster.edit(json!({"rollout": {"maxUnavailable": 1}, "content": "Immutable"}));
    assert_eq!(cluster.reconcile(), ["n1"]);
    cluster.report("n1", true, 0);
    assert_eq!(cluster.reconcile(), ["n2"]);
    cluster.report("n2", true, 0);
    let (.., status) = cluster.decide();
    let nodes = status.nodes.unwrap();
    assert_eq!((nodes.selected, nodes.updated, nodes.ready, nodes.unreachable), (3, 2, 2, 1));
    assert_eq!((cluster.reason(READY), cluster.reason(RECONCILING)), (ALL_NODES_READY.into(), COMPLETE.into()));
    cluster.nodes[0].reachable = true;
    assert_eq!(cluster.reconcile(), ["n0"], "it follows when it is reachable");
}

#[test]
fn an_edit_during_a_rollout_goes_to_the_last_revision() {
    let mut cluster = TestCluster::served(4, json!({"rollout": {"maxUnavailable": 1}}));
    cluster.edit(json!({"rollout": {"maxUnavailable": 1}, "content": "Immutable"}));
    cluster.reconcile();
    cluster.report_all();
    cluster.edit(json!({"rollout": {"maxUnavailable": 1}, "content": "Exclusive"}));
    let mut written = Vec::new();
    for _ in 0..4 {
        written.extend(cluster.reconcile());
        cluster.report_all();
    }
    assert_eq!(written, ["n0", "n1", "n2", "n3"]);
    let revision = cluster.desired().template.revision;
    assert!(cluster.exports.iter().all(|export| export.spec.revision == revision));
}

#[test]
fn consumers_change_on_all_nodes_at_once() {
    let admits = |names: &[&str], more: Value| {
        let mut spec = json!({"rollout": {"maxUnavailable": 1}, "consumers": {"namespaces": {"matchNames": names}}});
        spec.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        spec
    };
    let mut cluster = TestCluster::served(3, admits(&["a"], json!({})));
    cluster.edit(admits(&["b"], json!({})));
    assert_eq!(cluster.reconcile(), ["n0", "n1", "n2"]);
    assert_eq!((cluster.reconcile(), cluster.reason(RECONCILING)), (Vec::new(), COMPLETE.into()));
    // Also during a roll-out, and on nodes that a halted one has not reached.
    cluster.edit(admits(&["c"], json!({"content": "Immutable"})));
    assert_eq!(cluster.reconcile(), ["n0", "n1", "n2"]);
    cluster.report("n0", false, 0);
    cluster.reconcile();
    assert_eq!(cluster.reason(RECONCILING), ROLLOUT_HALTED);
    cluster.edit(json!({"rollout": {"maxUnavailable": 1}, "content": "Immutable"}));
    assert_eq!(cluster.reconcile(), ["n0", "n1", "n2"]);
    assert!(cluster.exports.iter().all(|export| export.spec.consumers.namespaces.is_none()));
    let immutable = |export: &&VirtiofsExport| export.spec.content == virtiofs_crds::v1alpha1::Content::Immutable;
    assert_eq!(cluster.exports.iter().filter(immutable).count(), 1);
    assert_eq!(cluster.reconcile(), Vec::<String>::new());
}
