//! Steps 1 to 7 on whole shares, by tables.

use std::sync::Arc;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use kube::ResourceExt;
use serde_json::{Value, json};
use virtiofs_crds::v1alpha1::VirtiofsShareStatus;
use virtiofs_crds::v1alpha1::conditions::{
    ALL_NODES_READY, COMPLETE, DELETING, IN_USE, NO_NODES, NODES_NOT_READY, PROGRESSING, READY, ROLLING_OUT,
    ROLLOUT_HALTED, WITHDRAWING,
};
use virtiofs_crds::{ExportMode, VirtiofsExport, VirtiofsShare};

use super::declare::{Declared, declare};
use super::deletion::{FORCE, Stay, stay};
use super::events::events;
use super::exports::{Changes, changes};
use super::place::{Placement, place};
use super::rollout::{Rollout, Stage, rollout};
use super::{health, status};
use crate::cluster::NodeFacts;

fn time(second: i64) -> Time {
    Time(k8s_openapi::jiff::Timestamp::from_second(1_800_000_000 + second).unwrap())
}

fn share(spec: Value) -> VirtiofsShare {
    let mut object = json!({
        "apiVersion": "virtiofs.dev/v1alpha1",
        "kind": "VirtiofsShare",
        "metadata": {"name": "images", "uid": "u", "generation": 1},
        "spec": {"source": {"hostPath": {"path": "/srv/images"}}},
    });
    object["spec"].as_object_mut().unwrap().extend(spec.as_object().unwrap().clone());
    serde_json::from_value(object).unwrap()
}

/// Nodes n0, n1, ..., all reachable.
fn nodes(count: usize) -> Vec<NodeFacts> {
    let node = |n| NodeFacts { name: format!("n{n}"), labels: [("kvm".into(), "true".into())].into(), reachable: true };
    (0..count).map(node).collect()
}

/// A cluster without an API server: what is decided is carried out on these exports.
struct Bench {
    share: VirtiofsShare,
    nodes: Vec<NodeFacts>,
    exports: Vec<VirtiofsExport>,
    second: i64,
}

impl Bench {
    /// A share that every node serves.
    fn served(count: usize, spec: Value) -> Self {
        let mut bench = Bench { share: share(spec), nodes: nodes(count), exports: Vec::new(), second: 0 };
        bench.turn();
        bench.answer_all();
        bench
    }

    fn declared(&self) -> Declared {
        declare(&self.share).unwrap()
    }

    fn placement(&self) -> Placement {
        let declared = self.declared();
        let wanted = self.share.metadata.deletion_timestamp.is_none().then_some(&declared);
        place(wanted, &self.nodes, self.exports.iter().cloned().map(Arc::new).collect())
    }

    fn decide(&self) -> (Rollout, Changes, VirtiofsShareStatus) {
        let (declared, placement) = (self.declared(), self.placement());
        let rollout = rollout(&declared, &placement.members);
        let wanted = self.share.metadata.deletion_timestamp.is_none().then_some(&declared);
        let changes = changes(wanted, &placement, &rollout, &time(self.second));
        let stay = stay(&self.share, &placement);
        let status = status::status(&self.share, &declared, &placement, &rollout, &stay, &time(self.second));
        (rollout, changes, status)
    }

    /// Decides and carries it out; returns the nodes that were written to.
    fn turn(&mut self) -> Vec<String> {
        self.second += 1;
        let (_, changes, status) = self.decide();
        self.share.status = Some(status);
        let mut touched = Vec::new();
        for spec in changes.create {
            touched.push(spec.node_name.clone());
            let mut export = VirtiofsExport::new(&format!("images-{}", spec.node_name), spec);
            export.metadata.generation = Some(1);
            self.exports.push(export);
        }
        for (export, spec) in changes.update {
            touched.push(spec.node_name.clone());
            let found = self.exports.iter_mut().find(|it| it.name_any() == export.name_any()).unwrap();
            found.spec = spec;
            found.metadata.generation = found.metadata.generation.map(|it| it + 1);
        }
        for export in changes.delete {
            touched.push(export.spec.node_name.clone());
            self.exports.retain(|it| it.name_any() != export.name_any());
        }
        touched.sort();
        touched
    }

    fn export(&mut self, node: &str) -> &mut VirtiofsExport {
        self.exports.iter_mut().find(|it| it.spec.node_name == node).unwrap()
    }

    /// The node's agent has taken up what it was asked, and says so.
    fn answer(&mut self, node: &str, ready: bool, sessions: i64) {
        let second = self.second;
        let export = self.export(node);
        let was = health::condition(export, READY).map(|it| it.status == "True");
        let since = if was == Some(ready) {
            health::condition(export, READY).unwrap().last_transition_time.clone()
        } else {
            time(second)
        };
        export.status = serde_json::from_value(json!({
            "observedGeneration": export.metadata.generation,
            "observedRevision": export.spec.revision,
            "sessions": sessions,
            "users": (0..sessions).map(|n| format!("vm-{n}")).collect::<Vec<_>>(),
            "conditions": [{
                "type": READY, "status": if ready { "True" } else { "False" },
                "reason": if ready { "Serving" } else { "SourceMissing" },
                "message": if ready { "" } else { "/srv/images does not exist" },
                "lastTransitionTime": since,
            }],
        }))
        .unwrap();
    }

    fn answer_all(&mut self) {
        let nodes: Vec<_> = self.exports.iter().map(|it| it.spec.node_name.clone()).collect();
        nodes.iter().for_each(|node| self.answer(node, true, 0));
    }

    /// Changes the share's spec.
    fn edit(&mut self, spec: Value) {
        let status = self.share.status.take();
        self.share = share(spec);
        self.share.status = status;
    }

    fn delete_share(&mut self) {
        self.share.metadata.deletion_timestamp = Some(time(self.second));
    }

    fn reason(&self, condition: &str) -> String {
        let (.., status) = self.decide();
        status.conditions.into_iter().find(|it| it.type_ == condition).map(|it| it.reason).unwrap_or_default()
    }
}

#[test]
fn each_selected_node_gets_an_export_and_then_nothing_more_is_written() {
    let mut bench = Bench::served(3, json!({}));
    assert_eq!(bench.exports.len(), 3);
    bench.turn();
    assert_eq!((bench.reason(READY), bench.reason(PROGRESSING)), (ALL_NODES_READY.into(), COMPLETE.into()));
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
    assert_eq!(bench.reason(READY), NO_NODES);
}

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
            assert_eq!(bench.reason(PROGRESSING), ROLLING_OUT);
        }
        let mut reached = first.len();
        while reached < 6 {
            bench.answer_all();
            let next = bench.turn();
            assert!(next.len() <= at_a_time && !next.is_empty(), "{max}: {next:?}");
            reached += next.len();
        }
        bench.answer_all();
        assert_eq!(bench.reason(PROGRESSING), COMPLETE);
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
    let progress = status.conditions.iter().find(|it| it.type_ == PROGRESSING).unwrap();
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
        status.recoveries = serde_json::from_value(json!({"total": recent, "recent": recent})).unwrap();
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
    assert_eq!((bench.reason(READY), bench.reason(PROGRESSING)), (ALL_NODES_READY.into(), COMPLETE.into()));
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
    assert_eq!((bench.turn(), bench.reason(PROGRESSING)), (Vec::new(), COMPLETE.into()));
    // Whatever a roll-out does meanwhile, and where it has halted, too.
    bench.edit(admits(&["c"], json!({"content": "Immutable"})));
    assert_eq!(bench.turn(), ["n0", "n1", "n2"]);
    bench.answer("n0", false, 0);
    bench.turn();
    assert_eq!(bench.reason(PROGRESSING), ROLLOUT_HALTED);
    bench.edit(json!({"rollout": {"maxUnavailable": 1}, "content": "Immutable"}));
    assert_eq!(bench.turn(), ["n0", "n1", "n2"]);
    assert!(bench.exports.iter().all(|export| export.spec.consumers.namespaces.is_none()));
    let immutable = |export: &&VirtiofsExport| export.spec.content == virtiofs_crds::v1alpha1::Content::Immutable;
    assert_eq!(bench.exports.iter().filter(immutable).count(), 1);
    assert_eq!(bench.turn(), Vec::<String>::new());
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
        (Stay::Withdrawing { nodes: 1 }, WITHDRAWING)
    );
    bench.nodes[0].reachable = false;
    assert_eq!(bench.turn(), ["n0"]);
    assert_eq!(stay(&bench.share, &bench.placement()), Stay::MayGo);
}

#[test]
fn status_names_the_nodes_that_do_not_serve() {
    let mut bench = Bench::served(6, json!({}));
    for node in ["n1", "n2", "n3", "n4", "n5"] {
        bench.answer(node, false, 0);
    }
    let (.., status) = bench.decide();
    let ready = status.conditions.iter().find(|it| it.type_ == READY).unwrap();
    assert_eq!(ready.reason, NODES_NOT_READY);
    assert!(ready.message.starts_with("1 of 6 nodes serve it; n1: SourceMissing: "), "{}", ready.message);
    assert!(ready.message.ends_with("n3: SourceMissing: /srv/images does not exist and 2 more"), "{}", ready.message);
}

#[test]
fn a_share_that_makes_no_sense_says_so_and_keeps_what_it_has() {
    let mut object = share(json!({"content": "Immutable", "access": "ReadWrite"}));
    object.status = Some(VirtiofsShareStatus { sessions: Some(7), ..VirtiofsShareStatus::default() });
    let refusals = declare(&object).unwrap_err();
    let status = status::refused(&object, &refusals, &time(0));
    assert_eq!(status.sessions, Some(7));
    assert!(status.conditions[0].message.contains("spec.access"), "{:?}", status.conditions);
    assert_eq!(events(object.status.as_ref(), &status).len(), 1);
    assert_eq!(events(Some(&status), &status).len(), 0);
}

#[test]
fn what_is_new_becomes_an_event_once() {
    let mut bench = Bench::served(2, json!({"rollout": {"maxUnavailable": 1}}));
    bench.turn();
    let reasons = |before: &VirtiofsShareStatus, after: &VirtiofsShareStatus| {
        events(Some(before), after).into_iter().map(|event| event.reason).collect::<Vec<_>>()
    };
    let steady = bench.share.status.clone().unwrap();
    bench.edit(json!({"rollout": {"maxUnavailable": 1}, "content": "Immutable"}));
    bench.turn();
    let changing = bench.share.status.clone().unwrap();
    assert_eq!(reasons(&steady, &changing), [ROLLING_OUT]);
    assert_eq!(reasons(&changing, &changing), Vec::<String>::new());
    bench.answer("n0", false, 0);
    bench.turn();
    let halted = bench.share.status.clone().unwrap();
    assert_eq!(reasons(&changing, &halted), [ROLLOUT_HALTED, NODES_NOT_READY]);
    assert_eq!(events(None, &steady).len(), 0, "a share that is new is no news");
}
