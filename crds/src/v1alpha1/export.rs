//! One share on one node: what the operator asks of the node's agent.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use kube::{CustomResource, KubeSchema};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use virtiofs_contract::config::Access;

use super::rule::{rule, rule_on};
use super::{Consumers, Content, EngineOptions, Socket, Source, Staleness, VirtiofsExportStatus};

/// One share on one node. Written by the operator (spec) and by the node's agent (status); nobody else needs to.
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
    doc = "One share on one node. Written by the operator (spec) and by the node's agent (status); nobody else needs to.",
    selectable = ".spec.nodeName",
    selectable = ".spec.share",
    printcolumn(name = "Share", type_ = "string", json_path = ".spec.share"),
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
    printcolumn(name = "Sessions", type_ = "integer", json_path = ".status.sessions"),
    printcolumn(name = "Stale", type_ = "integer", json_path = ".status.stale"),
    printcolumn(name = "Remedy", type_ = "string", json_path = ".status.lastRemedy.outcome"),
    printcolumn(name = "Action", type_ = "string", json_path = ".status.lastRemedy.action", priority = 1),
    printcolumn(name = "Revision", type_ = "string", json_path = ".spec.revision", priority = 1),
    printcolumn(name = "Observed", type_ = "string", json_path = ".status.observedRevision", priority = 1),
    printcolumn(
        name = "Message",
        type_ = "string",
        json_path = ".status.conditions[?(@.type=='Ready')].message",
        priority = 1
    ),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp"),
    validation = rule(
        "self.metadata.name.size() <= 63",
        "'metadata.name ' + self.metadata.name + ' is longer than 63; exports are named by the operator'",
    )
)]
#[serde(rename_all = "camelCase")]
// What an export is about never changes: an export of another share, node or directory is another export.
#[x_kube(validation = rule_on(
    ".share",
    "self.share == oldSelf.share",
    "'an export stays one of share ' + oldSelf.share + '; make another'",
))]
#[x_kube(validation = rule_on(
    ".nodeName",
    "self.nodeName == oldSelf.nodeName",
    "'an export stays on node ' + oldSelf.nodeName + '; make another'",
))]
#[x_kube(validation = rule_on(
    ".source",
    "self.source == oldSelf.source",
    "oldSelf.source.hostPath.path + ' cannot be changed; make another export for ' + self.source.hostPath.path",
))]
pub struct VirtiofsExportSpec {
    /// Name of the share.
    #[schemars(length(min = 1, max = 63))]
    pub share: String,
    /// Name of the node. Selectable: `kubectl get vfe --field-selector spec.nodeName=NAME`.
    #[schemars(length(min = 1, max = 253))]
    pub node_name: String,
    /// Whose VMs may use it, as the share says. No part of the revision: it holds at once, whatever a roll-out does.
    #[serde(default)]
    pub consumers: Consumers,
    /// Names the values below: equal revisions, equal values. The agent repeats it in its status once they are in
    /// force.
    #[schemars(length(min = 1, max = 63))]
    pub revision: String,
    /// What is to be done. `Serve`: VMs may connect. `Drain`: no more VMs may, and those that are connected are
    /// served until they leave.
    #[serde(default)]
    pub mode: ExportMode,
    /// The directory to serve.
    pub source: Source,
    /// May guests change the data?
    pub access: Access,
    /// What is true of the data.
    pub content: Content,
    /// The socket that VMs connect to.
    #[serde(default)]
    pub socket: Socket,
    /// The values that engines run with: what follows from `content`, and overrides.
    #[serde(default)]
    pub engine: EngineOptions,
    /// What is done when guests see stale names or handles.
    #[serde(default)]
    pub staleness: Staleness,
    /// How the node was doing when this revision came to it. None: it was its first.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub baseline: Option<Baseline>,
}

/// What is to be done with an export.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
pub enum ExportMode {
    /// VMs may connect.
    #[default]
    Serve,
    /// No more VMs may connect; those that are connected are served until they leave.
    Drain,
}

/// How a node was doing before a revision came to it. A roll-out stops at the first node that does worse.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
pub struct Baseline {
    /// When the revision came to the node.
    pub since: Time,
    /// Was the share served there?
    pub ready: bool,
    /// Had a remedy against staleness failed there?
    #[serde(default)]
    pub remedy_failed: bool,
    /// How often engines had been recovered there within ten minutes.
    #[serde(default)]
    #[schemars(range(min = 0, max = 1_000_000_000))]
    pub recent_recoveries: i64,
}
