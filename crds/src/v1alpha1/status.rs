//! Status of a share.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;
use kube::KubeSchema;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::engine_status::{self, EngineStatus};

/// Status of a share over all its nodes.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
pub struct VirtiofsShareStatus {
    /// Generation of the share that this status describes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub observed_generation: Option<i64>,
    /// Revision that nodes are to serve. It identifies the values that follow from the spec.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 63))]
    pub revision: Option<String>,
    /// The configuration that engines of this revision run with.
    #[serde(default, deserialize_with = "engine_status::lenient", skip_serializing_if = "Option::is_none")]
    pub engine: Option<EngineStatus>,
    /// Numbers of nodes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub nodes: Option<NodeCounts>,
    /// Number of sessions on all nodes, that is of connected VMs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sessions: Option<i64>,
    /// Conditions, by type.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 16))]
    #[x_kube(merge_strategy = ListMerge::Map(vec!["type".into()]))]
    pub conditions: Vec<Condition>,
}

/// Numbers of nodes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct NodeCounts {
    /// Nodes that `spec.nodes.selector` matches.
    pub selected: i64,
    /// Nodes on which the current revision is active.
    pub updated: i64,
    /// Reachable nodes that serve the share.
    pub ready: i64,
    /// Selected nodes that are down, or whose agent is. A change reaches them when they are back.
    #[serde(default)]
    pub unreachable: i64,
}
