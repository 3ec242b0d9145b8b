//! How a change reaches the nodes.

use super::*;

#[test]
fn a_change_reaches_so_many_nodes_at_a_time() {
    for (max, at_a_time) in [(json!(1), 1), (json!("25%"), 2), (json!("1%"), 1), (json!("100%"), 6), (json!(50), 6)] {
        let rollout = json!({"rollout": {"maxUnavailable": max}});
        let mut bench = Bench::served(6, rollout.clone());
        bench.edit(json!({"rollout": {"maxUnavailable": max}, "content": "Immutable"}));
        let first = bench.turn();
        assert_eq!(first.len(), at_a_time, "{max}");
        assert_eq!(bench.turn(), Vec::<String>::new(), "nobody before the first have answered");
        if at_a_time < 6 {
            assert_eq!(bench.reason(RECONCILING), ROLLING_OUT);
        }
        let mut reached = first.len();
        while reached < 6 {
            bench.answer_all();
            let next = bench.turn();
            assert!(next.len() <= at_a_time && !next.is_empty(), "{max}: {next:?}");
            reached += next.len();
        }
        bench.answer_all();
        assert_eq!(bench.reason(RECONCILING), COMPLETE);
    }
}

#[test]
fn a_change_goes_no_further_than_the_first_node_that_does_worse() {
    let mut bench = Bench::served(3, json!({"rollout": {"maxUnavailable": 1}}));
    bench.turn();
    bench.edit(json!({"rollout": {"maxUnavailable": 1}, "content": "Immutable"}));
    assert_eq!(bench.turn(), ["n0"]);
    bench.answer("n0", false, 0);
    assert_eq!(bench.turn(), Vec::<String>::new());
    let (rollout, _, status) = bench.decide();
    let Stage::Halted { node, how, unasked } = rollout.stage else { panic!("{rollout:?}") };
    assert_eq!((node.as_str(), unasked), ("n0", 2));
    assert!(how.contains("SourceMissing: /srv/images does not exist"), "{how}");
    let progress = status.conditions.iter().find(|it| it.type_ == RECONCILING).unwrap();
    assert_eq!((progress.status.as_str(), progress.reason.as_str()), ("False", ROLLOUT_HALTED));

    // Another change starts with the node that is broken, and still knows that it was not.
    bench.edit(json!({"rollout": {"maxUnavailable": 1}, "content": "Exclusive"}));
    assert_eq!(bench.turn(), ["n0"]);
    assert!(bench.export("n0").spec.baseline.as_ref().unwrap().ready);
    bench.answer("n0", false, 0);
    assert_eq!(bench.turn(), Vec::<String>::new(), "the second change is no better");
    // It goes on by itself when the node is well again.
    bench.answer("n0", true, 0);
    assert_eq!(bench.turn(), ["n1"]);
}

#[test]
fn a_node_that_was_broken_before_goes_first_and_holds_nobody_up() {
    let mut bench = Bench::served(3, json!({"rollout": {"maxUnavailable": 1}}));
    bench.answer("n2", false, 0);
    bench.edit(json!({"rollout": {"maxUnavailable": 1}, "content": "Immutable"}));
    assert_eq!(bench.turn(), ["n2"]);
    bench.answer("n2", false, 0);
    assert_eq!(bench.turn(), ["n0"]);
}

#[test]
fn what_breaks_long_after_a_change_is_not_put_down_to_it() {
    let mut bench = Bench::served(2, json!({"rollout": {"maxUnavailable": 1}}));
    bench.edit(json!({"rollout": {"maxUnavailable": 1}, "content": "Immutable"}));
    assert_eq!(bench.turn(), ["n0"]);
    bench.answer("n0", true, 0);
    bench.second += health::BLAMED_FOR + 10;
    bench.answer("n0", false, 0);
    assert_eq!(bench.turn(), ["n1"].map(String::from).to_vec()[..0].to_vec(), "one node is down as it is");
    assert!(matches!(bench.decide().0.stage, Stage::Under { .. }));
}

#[test]
fn recoveries_and_failed_remedies_halt_a_change_too() {
    let worse = |recent: i64, remedy: bool, allowed: i64| {
        let mut bench = Bench::served(2, json!({"rollout": {"maxUnavailable": 1, "maxRecoveries": allowed}}));
        bench.edit(json!({"rollout": {"maxUnavailable": 1, "maxRecoveries": allowed}, "content": "Immutable"}));
        assert_eq!(bench.turn(), ["n0"]);
        bench.answer("n0", true, 0);
        let second = bench.second;
        let status = bench.export("n0").status.as_mut().unwrap();
        status.recent_recoveries = Some(recent);
        if remedy {
            let degraded = json!({"type": "Degraded", "status": "True", "reason": "RemedyFailed", "message": "ESTALE",
                                  "lastTransitionTime": time(second)});
            status.conditions.push(serde_json::from_value(degraded).unwrap());
        }
        matches!(bench.decide().0.stage, Stage::Halted { .. })
    };
    assert!(!worse(0, false, 5) && !worse(5, false, 5) && worse(6, false, 5) && worse(1, false, 0));
    assert!(worse(0, true, 5));
}

#[test]
fn a_node_that_cannot_be_reached_is_neither_asked_nor_waited_for() {
    let mut bench = Bench::served(3, json!({"rollout": {"maxUnavailable": 1}}));
    bench.nodes[0].reachable = false;
    bench.edit(json!({"rollout": {"maxUnavailable": 1}, "content": "Immutable"}));
    assert_eq!(bench.turn(), ["n1"]);
    bench.answer("n1", true, 0);
    assert_eq!(bench.turn(), ["n2"]);
    bench.answer("n2", true, 0);
    let (.., status) = bench.decide();
    let nodes = status.nodes.unwrap();
    assert_eq!((nodes.selected, nodes.updated, nodes.ready, nodes.unreachable), (3, 2, 2, 1));
    assert_eq!((bench.reason(READY), bench.reason(RECONCILING)), (ALL_NODES_READY.into(), COMPLETE.into()));
    bench.nodes[0].reachable = true;
    assert_eq!(bench.turn(), ["n0"], "it follows when it is back");
}

#[test]
fn a_share_that_is_edited_during_a_roll_out_goes_straight_to_the_last_word() {
    let mut bench = Bench::served(4, json!({"rollout": {"maxUnavailable": 1}}));
    bench.edit(json!({"rollout": {"maxUnavailable": 1}, "content": "Immutable"}));
    bench.turn();
    bench.answer_all();
    bench.edit(json!({"rollout": {"maxUnavailable": 1}, "content": "Exclusive"}));
    let mut written = Vec::new();
    for _ in 0..4 {
        written.extend(bench.turn());
        bench.answer_all();
    }
    assert_eq!(written, ["n0", "n1", "n2", "n3"]);
    let revision = bench.declared().template.revision;
    assert!(bench.exports.iter().all(|export| export.spec.revision == revision));
}

#[test]
fn whom_a_share_admits_holds_everywhere_at_once() {
    let admits = |names: &[&str], more: Value| {
        let mut spec = json!({"rollout": {"maxUnavailable": 1}, "consumers": {"namespaces": {"matchNames": names}}});
        spec.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        spec
    };
    let mut bench = Bench::served(3, admits(&["a"], json!({})));
    bench.edit(admits(&["b"], json!({})));
    assert_eq!(bench.turn(), ["n0", "n1", "n2"]);
    assert_eq!((bench.turn(), bench.reason(RECONCILING)), (Vec::new(), COMPLETE.into()));
    // Whatever a roll-out does meanwhile, and where it has halted, too.
    bench.edit(admits(&["c"], json!({"content": "Immutable"})));
    assert_eq!(bench.turn(), ["n0", "n1", "n2"]);
    bench.answer("n0", false, 0);
    bench.turn();
    assert_eq!(bench.reason(RECONCILING), ROLLOUT_HALTED);
    bench.edit(json!({"rollout": {"maxUnavailable": 1}, "content": "Immutable"}));
    assert_eq!(bench.turn(), ["n0", "n1", "n2"]);
    assert!(bench.exports.iter().all(|export| export.spec.consumers.namespaces.is_none()));
    let immutable = |export: &&VirtiofsExport| export.spec.content == virtiofs_crds::v1alpha1::Content::Immutable;
    assert_eq!(bench.exports.iter().filter(immutable).count(), 1);
    assert_eq!(bench.turn(), Vec::<String>::new());
}
