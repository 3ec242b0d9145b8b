//! The fields of nodes and pods that the operator uses.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::{Node, NodeStatus, Pod, PodSpec, PodStatus};
use kube::ResourceExt;
use kube::api::ObjectMeta;

/// Prefix of the labels of nodes that serve a share; the name of the share follows.
pub(crate) const LABEL_PREFIX: &str = "share.virtiofs.dev/";

/// The facts about a node that shares depend on.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct NodeFacts {
    /// Its name.
    pub(crate) name: String,
    /// Its labels.
    pub(crate) labels: BTreeMap<String, String>,
    /// True if the node and its agent are up. Others neither apply changes nor report.
    pub(crate) reachable: bool,
}

impl NodeFacts {
    /// The facts about this node; `agent` is true if its agent is ready, and none if that is unknown.
    pub(crate) fn of(node: &Node, agent: Option<bool>) -> Self {
        NodeFacts {
            name: node.name_any(),
            labels: node.labels().clone(),
            reachable: is_ready(node) && agent.unwrap_or(true),
        }
    }
}

/// The labels of a node that name the shares it serves.
pub(crate) fn share_labels(node: &Node) -> BTreeMap<String, String> {
    let ours = node.labels().iter().filter(|(key, _)| key.starts_with(LABEL_PREFIX));
    ours.map(|(key, value)| (key.clone(), value.clone())).collect()
}

/// Drops the fields of a node that are not used: images and managed fields are most of it.
pub(crate) fn trim_node(node: &mut Node) {
    trim_metadata(&mut node.metadata);
    node.spec = None;
    let ready = node.status.take().and_then(|status| status.conditions).unwrap_or_default();
    let ready = ready.into_iter().filter(|condition| condition.type_ == "Ready").map(|mut condition| {
        // Heartbeats change these without changing the status.
        condition.last_heartbeat_time = None;
        condition.message = None;
        condition
    });
    node.status = Some(NodeStatus { conditions: Some(ready.collect()), ..NodeStatus::default() });
}

/// Drops the fields of a pod but its node and its readiness.
pub(crate) fn trim_pod(pod: &mut Pod) {
    trim_metadata(&mut pod.metadata);
    let node_name = pod.spec.take().and_then(|spec| spec.node_name);
    pod.spec = Some(PodSpec { node_name, ..PodSpec::default() });
    let conditions = pod.status.take().and_then(|status| status.conditions).unwrap_or_default();
    let conditions = conditions.into_iter().filter(|condition| condition.type_ == "Ready").collect();
    pod.status = Some(PodStatus { conditions: Some(conditions), ..PodStatus::default() });
}

/// Drops metadata that is not used.
pub(crate) fn trim_metadata(metadata: &mut ObjectMeta) {
    metadata.managed_fields = None;
    if let Some(annotations) = &mut metadata.annotations {
        annotations.retain(|key, _| key.starts_with("virtiofs.dev/"));
    }
}

fn is_ready(node: &Node) -> bool {
    let conditions = node.status.as_ref().and_then(|status| status.conditions.as_deref()).unwrap_or_default();
    conditions.iter().any(|condition| condition.type_ == "Ready" && condition.status == "True")
}

/// The node of an agent's pod, and true if the pod is ready.
pub(crate) fn agent_of(pod: &Pod) -> Option<(&str, bool)> {
    let node = pod.spec.as_ref()?.node_name.as_deref()?;
    let conditions = pod.status.as_ref().and_then(|status| status.conditions.as_deref()).unwrap_or_default();
    let ready = conditions.iter().any(|condition| condition.type_ == "Ready" && condition.status == "True");
    Some((node, ready && pod.metadata.deletion_timestamp.is_none()))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn node(ready: &str) -> Node {
        serde_json::from_value(json!({
            "metadata": {
                "name": "n1",
                "labels": {"kvm": "true", "share.virtiofs.dev/images": "true"},
                "annotations": {"other/one": "x"},
                "managedFields": [{"manager": "kubelet"}],
            },
            "spec": {"podCIDR": "10.0.0.0/24"},
            "status": {
                "images": [{"names": ["a"]}],
                "conditions": [
                    {"type": "Ready", "status": ready, "lastHeartbeatTime": "2026-01-01T00:00:00Z"},
                    {"type": "DiskPressure", "status": "False"},
                ],
            },
        }))
        .unwrap()
    }

    #[test]
    fn a_node_is_reachable_if_it_and_its_agent_are_up() {
        for (ready, agent, reachable) in [
            ("True", None, true),
            ("True", Some(true), true),
            ("True", Some(false), false),
            ("False", None, false),
            ("Unknown", Some(true), false),
        ] {
            assert_eq!(NodeFacts::of(&node(ready), agent).reachable, reachable, "{ready} {agent:?}");
        }
    }

    #[test]
    fn heartbeats_do_not_change_a_trimmed_node() {
        let (mut trimmed, mut later) = (node("True"), node("True"));
        let conditions = later.status.as_mut().unwrap().conditions.as_mut().unwrap();
        conditions[0].last_heartbeat_time = None;
        trim_node(&mut trimmed);
        trim_node(&mut later);
        assert_eq!(trimmed, later);
        assert_eq!(NodeFacts::of(&trimmed, None), NodeFacts::of(&node("True"), None));
        assert_eq!(share_labels(&trimmed).len(), 1);
        assert!(trimmed.metadata.managed_fields.is_none() && trimmed.annotations().is_empty());
    }
}
