//! Which nodes have an export, and until when.

use super::*;

#[test]
fn each_selected_node_gets_an_export_and_then_nothing_more_is_written() {
    let mut bench = Bench::served(3, json!({}));
    assert_eq!(bench.exports.len(), 3);
    bench.turn();
    assert_eq!((bench.reason(READY), bench.reason(RECONCILING)), (ALL_NODES_READY.into(), COMPLETE.into()));
    let before = bench.share.status.clone();
    assert_eq!(bench.turn(), Vec::<String>::new());
    assert_eq!(bench.share.status, before);
}

#[test]
fn nodes_are_selected_by_their_labels() {
    let selector = json!({"nodes": {"selector": {"matchLabels": {"kvm": "true"}, "matchExpressions": [
        {"key": "retired", "operator": "NotIn", "values": ["yes"]},
    ]}}});
    let mut bench = Bench::served(3, selector);
    assert_eq!(bench.exports.len(), 3);
    bench.nodes[1].labels.insert("retired".into(), "yes".into());
    bench.nodes[2].labels.clear();
    assert_eq!(bench.turn(), ["n1", "n2"]);
    assert_eq!(bench.export("n1").spec.mode, ExportMode::Drain);
    for node in &mut bench.nodes {
        node.labels.clear();
    }
    assert_eq!(bench.reason(READY), NO_NODES_SELECTED);
}

#[test]
fn an_export_that_somebody_has_written_into_is_put_right() {
    let mut bench = Bench::served(1, json!({}));
    bench.export("n0").spec.engine.max_inodes = Some(5000);
    assert_eq!(bench.turn(), ["n0"]);
    assert_eq!(bench.turn(), Vec::<String>::new());
}

#[test]
fn an_export_leaves_when_its_last_session_has() {
    let mut bench = Bench::served(1, json!({"nodes": {"selector": {"matchLabels": {"kvm": "true"}}}}));
    bench.answer("n0", true, 2);
    let labels = std::mem::take(&mut bench.nodes[0].labels);
    assert_eq!(bench.turn(), ["n0"]);
    assert_eq!(bench.turn(), Vec::<String>::new(), "the agent has not answered yet");
    bench.answer("n0", false, 2);
    assert_eq!(bench.turn(), Vec::<String>::new(), "it is still used");
    // Wanted again meanwhile, it serves at once.
    bench.nodes[0].labels = labels;
    assert_eq!(bench.turn(), ["n0"]);
    assert_eq!(bench.export("n0").spec.mode, ExportMode::Serve);
    bench.nodes[0].labels.clear();
    bench.turn();
    bench.answer("n0", false, 0);
    assert_eq!(bench.turn(), ["n0"]);
    assert!(bench.exports.is_empty());
}

#[test]
fn a_node_that_is_gone_takes_its_export_along() {
    let mut bench = Bench::served(2, json!({}));
    bench.answer("n0", true, 5);
    bench.nodes.remove(0);
    assert_eq!(bench.turn(), ["n0"]);
    assert_eq!(bench.exports.len(), 1);
    bench.nodes.insert(0, nodes(1).remove(0));
    assert_eq!(bench.turn(), ["n0"], "and has another when it is back");
}
