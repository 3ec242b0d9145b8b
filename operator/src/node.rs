//! A node: its labels name the shares that it serves, so that VMs can be scheduled there.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use k8s_openapi::api::core::v1::Node;
use kube::ResourceExt;
use kube::runtime::controller::Action;
use serde_json::{Value, json};
use virtiofs_crds::{ExportMode, VirtiofsExport};

use crate::backoff::Backoff;
use crate::cluster::{Cluster, LABEL_PREFIX, share_labels};
use crate::error::{Chain, Step, StepError};
use crate::metrics::Metrics;
use crate::share::is_ready;
use crate::throttle::Throttle;
use crate::writer::Writer;

/// Shortest time between two reconciles of a node. Its shares become ready together and are worth one write.
const INTERVAL: Duration = Duration::from_secs(1);

/// What all reconciles of nodes share.
pub(crate) struct Context {
    /// The watched objects.
    pub(crate) cluster: Arc<Cluster>,
    /// Writes to the API server.
    pub(crate) writer: Writer,
    /// The metrics.
    pub(crate) metrics: Arc<Metrics>,
    /// How often one node is reconciled.
    pub(crate) throttle: Throttle,
    /// When a failed reconcile is repeated.
    pub(crate) backoff: Backoff,
}

/// Changes the labels of a node where they differ from what its exports serve.
pub(crate) async fn reconcile(node: Arc<Node>, context: Arc<Context>) -> Result<Action, StepError> {
    let name = node.name_any();
    if let Err(wait) = context.throttle.admit(&name, INTERVAL, Instant::now()) {
        return Ok(Action::requeue(wait));
    }
    let result = match difference(&share_labels(&node), &desired_labels(&context.cluster.exports_on(&name))) {
        None => Ok(()),
        Some(labels) => {
            // A merge patch of what differs, on this very node: an apply would leave labels that others have set.
            let patch = json!({"metadata": {"uid": node.uid(), "labels": labels}});
            context.writer.merge::<Node>(&name, &patch).await.map(drop).step(|| format!("label node {name}"))
        }
    };
    let outcome = if result.is_ok() { "done" } else { "failed" };
    context.metrics.reconciles.with_label_values(&["Node", outcome]).inc();
    match result {
        Err(error) if error.is_gone() => Ok(Action::await_change()),
        Err(error) => Err(error),
        Ok(()) => {
            context.backoff.succeeded(&name);
            Ok(Action::await_change())
        }
    }
}

/// Schedules the next reconcile after a failed one.
pub(crate) fn retry(node: Arc<Node>, error: &StepError, context: Arc<Context>) -> Action {
    let wait = context.backoff.failed(&node.name_any(), Instant::now(), rand::random());
    tracing::warn!(node = %node.name_any(), error = %Chain(error), ?wait, "reconcile of a node failed; it is repeated");
    Action::requeue(wait)
}

/// The labels that a node should have. The name of a share has at most 63 characters, as that of a label.
fn desired_labels(exports: &[Arc<VirtiofsExport>]) -> BTreeMap<String, String> {
    let serving = |export: &&Arc<VirtiofsExport>| export.spec.mode == ExportMode::Serve && is_ready(export);
    let label = |export: &Arc<VirtiofsExport>| (format!("{LABEL_PREFIX}{}", export.spec.share_name), "true".to_owned());
    exports.iter().filter(serving).map(label).collect()
}

/// The patch of the labels; none if they are correct.
fn difference(current: &BTreeMap<String, String>, desired: &BTreeMap<String, String>) -> Option<Value> {
    let set =
        desired.iter().filter(|(key, value)| current.get(*key) != Some(*value)).map(|(key, value)| (key, json!(value)));
    let unset = current.keys().filter(|key| !desired.contains_key(*key)).map(|key| (key, Value::Null));
    let labels: serde_json::Map<String, Value> = set.chain(unset).map(|(key, value)| (key.clone(), value)).collect();
    (!labels.is_empty()).then_some(Value::Object(labels))
}

#[cfg(test)]
mod tests {
    use virtiofs_config::{Access, EngineConfig};
    use virtiofs_crds::v1alpha1::ResolvedEngine;
    use virtiofs_crds::v1alpha1::conditions::READY;

    use super::*;

    fn export(share: &str, mode: &str, ready: &str) -> Arc<VirtiofsExport> {
        let export = json!({
            "apiVersion": "virtiofs.dev/v1alpha1",
            "kind": "VirtiofsExport",
            "metadata": {"name": share},
            "spec": {
                "shareName": share, "nodeName": "n1", "revision": "1", "mode": mode, "access": "ReadOnly",
                "content": "Shared", "source": {"hostPath": {"path": "/srv"}},
                "engine": ResolvedEngine::from(&EngineConfig::stock(Access::ReadOnly)),
            },
            "status": {"conditions": [{
                "type": READY, "status": ready, "reason": "Any", "message": "",
                "lastTransitionTime": "2026-01-01T00:00:00Z",
            }]},
        });
        Arc::new(serde_json::from_value(export).unwrap())
    }

    #[test]
    fn a_node_is_labelled_with_the_shares_it_serves() {
        let exports = [export("a", "Serve", "True"), export("b", "Serve", "False"), export("c", "Drain", "True")];
        assert_eq!(desired_labels(&exports), [("share.virtiofs.dev/a".to_owned(), "true".to_owned())].into());
    }

    #[test]
    fn only_differing_labels_are_written() {
        let labels = |names: &[&str]| names.iter().map(|it| ((*it).to_owned(), "true".to_owned())).collect();
        assert_eq!(difference(&labels(&["a", "b"]), &labels(&["a", "b"])), None);
        assert_eq!(difference(&labels(&["a", "b"]), &labels(&["b", "c"])), Some(json!({"a": null, "c": "true"})));
        let other = [("a".to_owned(), "yes".to_owned())].into();
        assert_eq!(difference(&other, &labels(&["a"])), Some(json!({"a": "true"})));
    }
}
