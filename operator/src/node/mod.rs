//! A node: its labels say which shares it serves, so that VMs can be scheduled there.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use k8s_openapi::api::core::v1::Node;
use kube::ResourceExt;
use kube::runtime::controller::Action;
use serde_json::{Value, json};
use virtiofs_crds::{ExportMode, VirtiofsExport};

use crate::cluster::{Cluster, LABEL_PREFIX, share_labels};
use crate::metrics::Metrics;
use crate::pace::Pace;
use crate::retries::Retries;
use crate::share::is_ready;
use crate::writer::{Writer, is_gone};

/// How long a node rests between two looks. Its shares become ready together, and are worth one write.
const REST: Duration = Duration::from_secs(1);

/// What looks at nodes share.
pub(crate) struct Context {
    /// What is reflected.
    pub(crate) cluster: Arc<Cluster>,
    /// What changes something.
    pub(crate) writer: Writer,
    /// What counts.
    pub(crate) metrics: Arc<Metrics>,
    /// How often one node is looked at.
    pub(crate) pace: Pace,
    /// When those are looked at again with which that failed.
    pub(crate) retries: Retries,
}

/// Looks at a node, and changes its labels where they are not as its exports are.
pub(crate) async fn reconcile(node: Arc<Node>, context: Arc<Context>) -> kube::Result<Action> {
    let name = node.name_any();
    if let Err(wait) = context.pace.take(&name, REST, Instant::now()) {
        return Ok(Action::requeue(wait));
    }
    let result = match difference(&share_labels(&node), &wanted(&context.cluster.exports_on(&name))) {
        None => Ok(()),
        Some(labels) => {
            // Only what differs, and only into this very node. Applied instead, a label that somebody else has set
            // would stay.
            let patch = json!({"metadata": {"uid": node.uid(), "labels": labels}});
            context.writer.merge::<Node>(&name, &patch).await.map(drop)
        }
    };
    let outcome = if result.is_ok() { "done" } else { "failed" };
    context.metrics.reconciles.with_label_values(&["Node", outcome]).inc();
    match result {
        Err(error) if is_gone(&error) => Ok(Action::await_change()),
        Err(error) => Err(error),
        Ok(()) => {
            context.retries.went_well(&name);
            Ok(Action::await_change())
        }
    }
}

/// What to do after a look that failed.
pub(crate) fn retry(node: Arc<Node>, error: &kube::Error, context: Arc<Context>) -> Action {
    let wait = context.retries.failed(&node.name_any(), Instant::now(), rand::random());
    tracing::warn!(node = %node.name_any(), %error, ?wait, "cannot be labelled; trying again");
    Action::requeue(wait)
}

/// The labels that a node should have. A share's name is at most 63 characters, which is what a label's may have.
fn wanted(exports: &[Arc<VirtiofsExport>]) -> BTreeMap<String, String> {
    let serving = |export: &&Arc<VirtiofsExport>| export.spec.mode == ExportMode::Serve && is_ready(export);
    let label = |export: &Arc<VirtiofsExport>| (format!("{LABEL_PREFIX}{}", export.spec.share_name), "true".to_owned());
    exports.iter().filter(serving).map(label).collect()
}

/// What has to be merged into the labels; nothing when they are right.
fn difference(current: &BTreeMap<String, String>, wanted: &BTreeMap<String, String>) -> Option<Value> {
    let set =
        wanted.iter().filter(|(key, value)| current.get(*key) != Some(*value)).map(|(key, value)| (key, json!(value)));
    let unset = current.keys().filter(|key| !wanted.contains_key(*key)).map(|key| (key, Value::Null));
    let labels: serde_json::Map<String, Value> = set.chain(unset).map(|(key, value)| (key.clone(), value)).collect();
    (!labels.is_empty()).then_some(Value::Object(labels))
}

#[cfg(test)]
mod tests {
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
            },
            "status": {"conditions": [{
                "type": READY, "status": ready, "reason": "Any", "message": "",
                "lastTransitionTime": "2026-01-01T00:00:00Z",
            }]},
        });
        Arc::new(serde_json::from_value(export).unwrap())
    }

    #[test]
    fn a_node_is_labelled_with_what_it_serves() {
        let exports = [export("a", "Serve", "True"), export("b", "Serve", "False"), export("c", "Drain", "True")];
        assert_eq!(wanted(&exports), [("share.virtiofs.dev/a".to_owned(), "true".to_owned())].into());
    }

    #[test]
    fn only_what_differs_is_written() {
        let labels = |names: &[&str]| names.iter().map(|it| ((*it).to_owned(), "true".to_owned())).collect();
        assert_eq!(difference(&labels(&["a", "b"]), &labels(&["a", "b"])), None);
        assert_eq!(difference(&labels(&["a", "b"]), &labels(&["b", "c"])), Some(json!({"a": null, "c": "true"})));
        let other = [("a".to_owned(), "yes".to_owned())].into();
        assert_eq!(difference(&other, &labels(&["a"])), Some(json!({"a": "true"})));
    }
}
