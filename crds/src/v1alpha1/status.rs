//! What is reported about a share.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;
use kube::KubeSchema;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{EngineOptions, StaleCount};

/// What is reported about a share, over all its nodes.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
pub struct VirtiofsShareStatus {
    /// Generation of the share that this status speaks of.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub observed_generation: Option<i64>,
    /// Revision that nodes are to serve: the name of the values that follow from the spec.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 63))]
    pub revision: Option<String>,
    /// The values in force: what follows from `content`, and overrides.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub engine: Option<EngineOptions>,
    /// Nodes that serve the share.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub nodes: Option<NodeCounts>,
    /// Sessions on all nodes: VMs that are connected.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sessions: Option<i64>,
    /// Stale names and handles that guests have met on all nodes, by cause.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 16))]
    #[x_kube(merge_strategy = ListMerge::Map(vec!["cause".into()]))]
    pub staleness: Vec<StaleCount>,
    /// Conditions, by type.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 16))]
    #[x_kube(merge_strategy = ListMerge::Map(vec!["type".into()]))]
    pub conditions: Vec<Condition>,
}

/// Nodes that serve the share.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct NodeCounts {
    /// Chosen by `nodes.selector`.
    pub selected: i64,
    /// Serving it as the spec now says.
    pub updated: i64,
    /// Serving it.
    pub ready: i64,
    /// Of those selected, nodes that are down or whose agent is: a change waits for them to come back.
    #[serde(default)]
    pub unreachable: i64,
}
