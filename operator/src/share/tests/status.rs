//! The status of a share and its Events.

use super::*;

#[test]
fn ready_names_the_nodes_that_do_not_serve() {
    let mut cluster = TestCluster::served(6, json!({}));
    for node in ["n1", "n2", "n3", "n4", "n5"] {
        cluster.report(node, false, 0);
    }
    let (.., status) = cluster.decide();
    let ready = status.conditions.iter().find(|it| it.type_ == READY).unwrap();
    assert_eq!(ready.reason, NODES_NOT_READY);
    assert!(ready.message.starts_with("1 of 6 nodes serve the share; n1: SourceMissing: "), "{}", ready.message);
    assert!(ready.message.ends_with("n3: SourceMissing: /srv/images does not exist and 2 more"), "{}", ready.message);
}

#[test]
fn an_invalid_share_keeps_its_status_but_the_conditions() {
    let mut object = share(json!({"content": "Immutable", "access": "ReadWrite"}));
    object.status = Some(VirtiofsShareStatus { sessions: Some(7), ..VirtiofsShareStatus::default() });
    let refusals = desired(&object).unwrap_err();
    let status = status_step::rejected(&object, &refusals, &time(0));
    assert_eq!(status.sessions, Some(7));
    assert!(status.conditions[0].message.contains("spec.access"), "{:?}", status.conditions);
    assert_eq!(events(object.status.as_ref(), &status).len(), 1);
    assert_eq!(events(Some(&status), &status).len(), 0);
}

#[test]
fn a_change_of_reason_publishes_one_event() {
    let mut cluster = TestCluster::served(2, json!({"rollout": {"maxUnavailable": 1}}));
    cluster.reconcile();
    let reasons = |before: &VirtiofsShareStatus, after: &VirtiofsShareStatus| {
        events(Some(before), after).into_iter().map(|event| event.reason).collect::<Vec<_>>()
    };
    let steady = cluster.share.status.clone().unwrap();
    cluster.edit(json!({"rollout": {"maxUnavailable": 1}, "content": "Immutable"}));
    cluster.reconcile();
    let changing = cluster.share.status.clone().unwrap();
    assert_eq!(reasons(&steady, &changing), [ROLLING_OUT]);
    assert_eq!(reasons(&changing, &changing), Vec::<String>::new());
    cluster.report("n0", false, 0);
    cluster.reconcile();
    let halted = cluster.share.status.clone().unwrap();
    assert_eq!(reasons(&changing, &halted), [ROLLOUT_HALTED, NODES_NOT_READY]);
    assert_eq!(events(None, &steady).len(), 0, "the first status publishes nothing");
}

/// Status and reason of a condition, such as `True:AllNodesReady`.
fn condition(cluster: &TestCluster, kind: &str) -> String {
    let (.., status) = cluster.decide();
    let found = status.conditions.iter().find(|it| it.type_ == kind).unwrap();
    format!("{}:{}", found.status, found.reason)
}

#[test]
fn ready_is_false_while_most_nodes_are_unreachable() {
    let mut cluster = TestCluster::served(4, json!({}));
    for (unreachable, ready, degraded) in [
        (0, format!("True:{ALL_NODES_READY}"), format!("False:{AS_EXPECTED}")),
        (2, format!("True:{ALL_NODES_READY}"), format!("True:{NODES_UNREACHABLE}")),
        (3, format!("False:{NODES_UNREACHABLE}"), format!("True:{NODES_UNREACHABLE}")),
        (4, format!("False:{NODES_UNREACHABLE}"), format!("True:{NODES_UNREACHABLE}")),
    ] {
        cluster.nodes.iter_mut().take(unreachable).for_each(|node| node.reachable = false);
        assert_eq!((condition(&cluster, READY), condition(&cluster, DEGRADED)), (ready, degraded), "{unreachable}");
    }
}

#[test]
fn a_degraded_node_degrades_the_share() {
    let mut cluster = TestCluster::served(2, json!({}));
    let second = cluster.second;
    let degraded = json!({"type": "Degraded", "status": "True", "reason": "NearLimit", "message": "4 of 5",
                          "lastTransitionTime": time(second)});
    cluster.export("n1").status.as_mut().unwrap().conditions.push(serde_json::from_value(degraded).unwrap());
    assert_eq!(condition(&cluster, READY), format!("True:{ALL_NODES_READY}"));
    assert_eq!(condition(&cluster, DEGRADED), format!("True:{NODES_DEGRADED}"));
    let (.., status) = cluster.decide();
    assert_eq!(status.conditions.iter().find(|it| it.type_ == DEGRADED).unwrap().message, "n1: NearLimit: 4 of 5");
}

#[test]
fn a_halted_rollout_and_an_invalid_spec_stall_a_share() {
    let mut cluster = TestCluster::served(2, json!({"rollout": {"maxUnavailable": 1}}));
    assert_eq!(condition(&cluster, STALLED), format!("False:{NOT_STALLED}"));
    cluster.edit(json!({"rollout": {"maxUnavailable": 1}, "content": "Immutable"}));
    cluster.reconcile();
    assert_eq!(condition(&cluster, RECONCILING), format!("True:{ROLLING_OUT}"));
    cluster.report("n0", false, 0);
    assert_eq!(condition(&cluster, STALLED), format!("True:{ROLLOUT_HALTED}"));
    assert_eq!(condition(&cluster, RECONCILING), format!("False:{ROLLOUT_HALTED}"));

    let object = share(json!({"content": "Immutable", "access": "ReadWrite"}));
    let status = status_step::rejected(&object, &desired(&object).unwrap_err(), &time(0));
    let stalled = status.conditions.iter().find(|it| it.type_ == STALLED).unwrap();
    assert_eq!((stalled.status.as_str(), stalled.reason.as_str()), ("True", INVALID_SPEC));
}
