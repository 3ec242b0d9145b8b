//! Steps 1 to 7 on whole shares, by tables.

mod deletion;
mod placement;
mod rollouts;
mod status;

use std::sync::Arc;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use kube::ResourceExt;
use serde_json::{Value, json};
use virtiofs_crds::v1alpha1::VirtiofsShareStatus;
use virtiofs_crds::v1alpha1::conditions::{
    ALL_NODES_READY, AS_EXPECTED, COMPLETE, DEGRADED, DELETING, DRAINING, IN_USE, INVALID_SPEC, NO_NODES_SELECTED,
    NODES_DEGRADED, NODES_NOT_READY, NODES_UNREACHABLE, NOT_STALLED, READY, RECONCILING, ROLLING_OUT, ROLLOUT_HALTED,
    STALLED,
};
use virtiofs_crds::{ExportMode, VirtiofsExport, VirtiofsShare};

use super::deletion::{Deletion, FORCE, deletion};
use super::desired::{Desired, desired};
use super::events::events;
use super::exports::{Changes, changes};
use super::placement::{Placement, placement};
use super::rollout::{Rollout, Stage, rollout};
use super::{health, status as status_step};
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

/// A cluster without an API server: decisions are applied to these exports.
struct TestCluster {
    share: VirtiofsShare,
    nodes: Vec<NodeFacts>,
    exports: Vec<VirtiofsExport>,
    second: i64,
}

impl TestCluster {
    /// A cluster of which every node serves the share.
    fn served(count: usize, spec: Value) -> Self {
        let mut cluster = TestCluster { share: share(spec), nodes: nodes(count), exports: Vec::new(), second: 0 };
        cluster.reconcile();
        cluster.report_all();
        cluster
    }

    fn desired(&self) -> Desired {
        desired(&self.share).unwrap()
    }

    fn placement(&self) -> Placement {
        let desired = self.desired();
        let selecting = self.share.metadata.deletion_timestamp.is_none().then_some(&desired);
        placement(selecting, &self.nodes, self.exports.iter().cloned().map(Arc::new).collect())
    }

    fn decide(&self) -> (Rollout, Changes, VirtiofsShareStatus) {
        let (desired, placement) = (self.desired(), self.placement());
        let rollout = rollout(&desired, &placement.members);
        let selecting = self.share.metadata.deletion_timestamp.is_none().then_some(&desired);
        let changes = changes(selecting, &placement, &rollout, &time(self.second));
        let deletion = deletion(&self.share, &placement);
        let status = status_step::status(&self.share, &desired, &placement, &rollout, &deletion, &time(self.second));
        (rollout, changes, status)
    }

    /// One reconcile; returns the nodes whose export was written.
    fn reconcile(&mut self) -> Vec<String> {
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

    /// The agent of a node reports that it applied its export.
    fn report(&mut self, node: &str, ready: bool, sessions: i64) {
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

    fn report_all(&mut self) {
        let nodes: Vec<_> = self.exports.iter().map(|it| it.spec.node_name.clone()).collect();
        nodes.iter().for_each(|node| self.report(node, true, 0));
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
