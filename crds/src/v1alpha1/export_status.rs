//! What a node's agent reports about one share.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use kube::KubeSchema;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use virtiofs_contract::config::{InodeFileHandles, Sandbox};

/// How many users of an export are named.
pub const USERS_MAX: usize = 32;
/// How many findings of a preflight are repeated.
pub const FINDINGS_MAX: usize = 16;
/// Longest message in a status, in characters.
pub const MESSAGE_MAX: usize = 1024;

/// What a node's agent reports about one share.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
pub struct VirtiofsExportStatus {
    /// Generation of the export that this status speaks of.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub observed_generation: Option<i64>,
    /// Revision that the node has taken up. Sessions that can take it over only at their next mount do not count
    /// against it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 63))]
    pub observed_revision: Option<String>,
    /// Sessions: VMs that are connected.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0, max = 1_000_000_000))]
    pub sessions: Option<i64>,
    /// Who they are, the first of them: what the node knows of the process that connected.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = USERS_MAX), inner(length(max = 253)))]
    pub users: Vec<String>,
    /// What was found when the share was tried.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub preflight: Option<ExportPreflight>,
    /// Stale names and handles that guests have met, all causes together.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0))]
    pub stale: Option<i64>,
    /// The same by cause; causes that never occurred are left out.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 16))]
    #[x_kube(merge_strategy = ListMerge::Map(vec!["cause".into()]))]
    pub staleness: Vec<StaleCount>,
    /// Engines that were recovered.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub recoveries: Option<RecoveryCounts>,
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

/// What was found when a share was tried.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ExportPreflight {
    /// The sandbox that was built.
    pub sandbox: Sandbox,
    /// How inodes are referred to, after trying.
    pub inode_file_handles: InodeFileHandles,
    /// Limit of open files in force for each engine.
    #[schemars(range(max = 1_073_741_816_u64))]
    pub open_files: u64,
    /// What is not as it should be, but does not keep the share from being served.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = FINDINGS_MAX))]
    pub findings: Vec<ExportFinding>,
}

/// One thing that is not as it should be.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ExportFinding {
    /// Which kind of trouble.
    #[schemars(length(max = 63))]
    pub reason: String,
    /// What was found.
    #[schemars(length(max = MESSAGE_MAX))]
    pub message: String,
    /// What would make it right.
    #[schemars(length(max = MESSAGE_MAX))]
    pub remedy: String,
}

/// Stale names and handles of one cause.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct StaleCount {
    /// The cause.
    #[schemars(length(max = 63))]
    pub cause: String,
    /// How many.
    #[schemars(range(min = 0))]
    pub count: i64,
}

/// Engines that were recovered.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct RecoveryCounts {
    /// Since the agent first saw the share.
    #[schemars(range(min = 0))]
    pub total: i64,
    /// Within the last ten minutes.
    #[schemars(range(min = 0, max = 1_000_000_000))]
    pub recent: i64,
}

/// A remedy against staleness.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct LastRemedy {
    /// When it was begun.
    pub at: Time,
    /// Against which cause.
    #[schemars(length(max = 63))]
    pub cause: String,
    /// What was done: `FileHandles`, `OpenFiles`, `LongerCaching` or `HandOver`.
    #[schemars(length(max = 63))]
    pub action: String,
    /// What came of it: `OnTrial` while that is being seen; `Verified`, `NotHelped`, `Refused` (not possible here),
    /// `NotInForce` (in time) or `Abandoned` (its reason was gone).
    #[schemars(length(max = 63))]
    pub outcome: String,
}
