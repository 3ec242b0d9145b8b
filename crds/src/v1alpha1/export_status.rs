//! Status of a share on one node, written by the node's agent.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use kube::KubeSchema;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Largest number of users in a status.
pub const USERS_MAX: usize = 32;
/// Largest number of preflight findings in a status.
pub const FINDINGS_MAX: usize = 16;
/// Longest message in a status, in characters.
pub const MESSAGE_MAX: usize = 1024;

/// Status of a share on one node.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
pub struct VirtiofsExportStatus {
    /// Generation of the export that this status describes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub observed_generation: Option<i64>,
    /// Revision that is active on the node. Sessions that can change only at their next mount do not delay it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 63))]
    pub observed_revision: Option<String>,
    /// Number of sessions, that is of connected VMs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0, max = 1_000_000_000))]
    pub sessions: Option<i64>,
    /// The first of the connected VMs: the pod, or what the node knows of the process.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = USERS_MAX), inner(length(max = 253)))]
    #[x_kube(merge_strategy = ListMerge::Atomic)]
    pub users: Vec<String>,
    /// Result of the preflight of the share.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub preflight: Option<ExportPreflight>,
    /// Number of engines that were recovered within the last ten minutes. A roll-out compares it with its baseline.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0, max = 1_000_000_000))]
    pub recent_recoveries: Option<i64>,
    /// The last remedy against staleness.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_remedy: Option<LastRemedy>,
    /// Version of the agent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 63))]
    pub agent_version: Option<String>,
    /// Conditions, by type.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 16))]
    #[x_kube(merge_strategy = ListMerge::Map(vec!["type".into()]))]
    pub conditions: Vec<Condition>,
}

/// Result of the preflight of a share.
// Words and not enumerations: an agent that knows more of them than this definition must not fail to write.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
pub struct ExportPreflight {
    /// The sandbox that engines run in: a value of `spec.engine.sandbox`.
    #[schemars(length(max = 63))]
    pub sandbox: String,
    /// How engines refer to inodes: a value of `spec.engine.inodeFileHandles`.
    #[schemars(length(max = 63))]
    pub inode_file_handles: String,
    /// Limit of open files of each engine.
    #[schemars(range(max = 1_073_741_816_u64))]
    pub open_files: u64,
    /// Findings that do not prevent the share from being served.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = FINDINGS_MAX))]
    #[x_kube(merge_strategy = ListMerge::Atomic)]
    pub findings: Vec<ExportFinding>,
}

/// One finding of a preflight.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ExportFinding {
    /// Reason, in one CamelCase word.
    #[schemars(length(max = 63))]
    pub reason: String,
    /// What was found.
    #[schemars(length(max = MESSAGE_MAX))]
    pub message: String,
    /// What corrects it.
    #[schemars(length(max = MESSAGE_MAX))]
    pub remedy: String,
}

/// A remedy against staleness.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct LastRemedy {
    /// When the remedy was started.
    pub start_time: Time,
    /// Cause of the staleness.
    #[schemars(length(max = 63))]
    pub cause: String,
    /// The remedy: `FileHandles`, `OpenFiles`, `LongerCaching` or `HandOver`.
    #[schemars(length(max = 63))]
    pub action: String,
    /// `Verifying` until the outcome is known, then `Verified`, `Ineffective`, `Rejected` (impossible on this node),
    /// `NotApplied` (not active in time) or `Abandoned` (no longer needed).
    #[schemars(length(max = 63))]
    pub outcome: String,
}
