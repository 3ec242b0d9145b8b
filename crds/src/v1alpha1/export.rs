//! One share on one node: the operator's request to the node's agent.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use kube::{CustomResource, KubeSchema};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use virtiofs_config::Access;

use super::rule::{rule, rule_on};
use super::spec::{
    immutable_is_read_only, needs_read_write, shared_expires, shared_has_no_negative_entries, shared_is_not_cached,
    writeback_is_exclusive,
};
use super::{Consumers, Content, ResolvedEngine, Socket, Source, Staleness, VirtiofsExportStatus};

/// One share on one node. The operator writes the spec and the node's agent writes the status; nobody else needs to.
#[derive(CustomResource, Clone, Debug, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[kube(
    group = "virtiofs.dev",
    version = "v1alpha1",
    kind = "VirtiofsExport",
    plural = "virtiofsexports",
    shortname = "vfe",
    category = "virtiofs",
    status = "VirtiofsExportStatus",
    derive = "PartialEq",
    doc = "One share on one node. The operator writes the spec and the node's agent writes the status; nobody else needs to.",
    selectable = ".spec.nodeName",
    selectable = ".spec.shareName",
    printcolumn(name = "Share", type_ = "string", json_path = ".spec.shareName"),
    printcolumn(name = "Node", type_ = "string", json_path = ".spec.nodeName"),
    printcolumn(
        name = "Ready",
        type_ = "string",
        json_path = ".status.conditions[?(@.type=='Ready')].status"
    ),
    printcolumn(
        name = "Reason",
        type_ = "string",
        json_path = ".status.conditions[?(@.type=='Ready')].reason"
    ),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp"),
    printcolumn(name = "Sessions", type_ = "integer", json_path = ".status.sessions", priority = 1),
    printcolumn(
        name = "Degraded",
        type_ = "string",
        json_path = ".status.conditions[?(@.type=='Degraded')].reason",
        priority = 1
    ),
    printcolumn(name = "Remedy", type_ = "string", json_path = ".status.lastRemedy.action", priority = 1),
    printcolumn(name = "Outcome", type_ = "string", json_path = ".status.lastRemedy.outcome", priority = 1),
    printcolumn(name = "Revision", type_ = "string", json_path = ".spec.revision", priority = 1),
    printcolumn(name = "Observed", type_ = "string", json_path = ".status.observedRevision", priority = 1),
    printcolumn(
        name = "Message",
        type_ = "string",
        json_path = ".status.conditions[?(@.type=='Ready')].message",
        priority = 1
    ),
    validation = rule(
        "self.metadata.name.size() <= 63",
        "'metadata.name ' + self.metadata.name + ' is longer than 63; the operator names exports'",
    )
)]
#[serde(rename_all = "camelCase")]
// An export of another share, node or directory is another export.
#[x_kube(validation = rule_on(
    ".shareName",
    "self.shareName == oldSelf.shareName",
    "'cannot change from ' + oldSelf.shareName + '; create another export'",
))]
#[x_kube(validation = rule_on(
    ".nodeName",
    "self.nodeName == oldSelf.nodeName",
    "'cannot change from ' + oldSelf.nodeName + '; create another export'",
))]
#[x_kube(validation = rule_on(
    ".source",
    "self.source == oldSelf.source",
    "(has(oldSelf.source.hostPath) ? oldSelf.source.hostPath.path : oldSelf.source.type) + ' cannot be changed; create another export'",
))]
#[x_kube(validation = immutable_is_read_only())]
#[x_kube(validation = writeback_is_exclusive())]
#[x_kube(validation = shared_is_not_cached())]
#[x_kube(validation = shared_has_no_negative_entries())]
#[x_kube(validation = shared_expires("entryTimeout"))]
#[x_kube(validation = shared_expires("attrTimeout"))]
#[x_kube(validation = needs_read_write("deviceNodes"))]
#[x_kube(validation = needs_read_write("fileCapabilities"))]
pub struct VirtiofsExportSpec {
    /// Name of the share. Selectable: `kubectl get vfe --field-selector spec.shareName=NAME`.
    #[schemars(length(min = 1, max = 63))]
    pub share_name: String,
    /// Name of the node. Selectable: `kubectl get vfe --field-selector spec.nodeName=NAME`.
    #[schemars(length(min = 1, max = 253))]
    pub node_name: String,
    /// Who may use the share, copied from it. It is not part of the revision: a change applies at once, whatever the
    /// state of a roll-out.
    #[serde(default)]
    pub consumers: Consumers,
    /// Identifies the values below: equal revisions have equal values. The agent repeats it in
    /// `status.observedRevision` once they are active.
    #[schemars(length(min = 1, max = 63))]
    pub revision: String,
    /// What the node does with the share. `Serve`: VMs can connect. `Drain`: no VM can connect any more, and connected
    /// VMs are served until they disconnect.
    #[serde(default)]
    pub mode: ExportMode,
    /// The directory to serve.
    pub source: Source,
    /// Whether guests may change the data.
    pub access: Access,
    /// What is true of the data while guests use it.
    pub content: Content,
    /// The socket that VMs connect to.
    #[serde(default)]
    pub socket: Socket,
    /// The configuration of the engines: what follows from `content`, and the overrides of the share.
    pub engine: ResolvedEngine,
    /// What the agent does when guests see stale names or handles.
    #[serde(default)]
    pub staleness: Staleness,
    /// State of the node when it received this revision. Absent for the first revision of a node.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub baseline: Option<Baseline>,
}

/// What a node does with an export.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
pub enum ExportMode {
    /// VMs can connect.
    #[default]
    Serve,
    /// No VM can connect any more; connected VMs are served until they disconnect.
    Drain,
}

/// State of a node when it received a revision. A roll-out stops at the first node that regresses from it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
pub struct Baseline {
    /// When the node received the revision.
    pub time: Time,
    /// Whether the node served the share.
    pub ready: bool,
    /// Whether a remedy against staleness had failed on the node.
    #[serde(default)]
    pub remedy_failed: bool,
    /// Number of engines that were recovered on the node within the ten minutes before.
    #[serde(default)]
    #[schemars(range(min = 0, max = 1_000_000_000))]
    pub recent_recoveries: i64,
}
