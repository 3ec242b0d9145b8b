//! The share itself.

use kube::core::Rule;
use kube::{CustomResource, KubeSchema};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use virtiofs_config::Access;

use super::rule::{rule, rule_on};
use super::{Consumers, EngineOptions, Nodes, Rollout, Socket, Source, Staleness, VirtiofsShareStatus};

/// A directory of the nodes that VMs mount over virtiofs.
#[derive(CustomResource, Clone, Debug, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[kube(
    group = "virtiofs.dev",
    version = "v1alpha1",
    kind = "VirtiofsShare",
    plural = "virtiofsshares",
    shortname = "vfs",
    category = "virtiofs",
    status = "VirtiofsShareStatus",
    derive = "PartialEq",
    doc = "A directory of the nodes that VMs mount over virtiofs.",
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
    printcolumn(name = "Serving", type_ = "integer", json_path = ".status.nodes.ready"),
    printcolumn(name = "Sessions", type_ = "integer", json_path = ".status.sessions"),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp"),
    printcolumn(name = "Access", type_ = "string", json_path = ".spec.access", priority = 1),
    printcolumn(name = "Content", type_ = "string", json_path = ".spec.content", priority = 1),
    printcolumn(name = "Selected", type_ = "integer", json_path = ".status.nodes.selected", priority = 1),
    printcolumn(name = "Updated", type_ = "integer", json_path = ".status.nodes.updated", priority = 1),
    printcolumn(name = "Unreachable", type_ = "integer", json_path = ".status.nodes.unreachable", priority = 1),
    printcolumn(
        name = "Rollout",
        type_ = "string",
        json_path = ".status.conditions[?(@.type=='Reconciling')].reason",
        priority = 1
    ),
    printcolumn(
        name = "Degraded",
        type_ = "string",
        json_path = ".status.conditions[?(@.type=='Degraded')].reason",
        priority = 1
    ),
    printcolumn(name = "Path", type_ = "string", json_path = ".spec.source.hostPath.path", priority = 1),
    // The name becomes the value of labels, and part of names and socket paths.
    validation = rule(
        "self.metadata.name.size() <= 63 && !self.metadata.name.contains('.')",
        "'metadata.name ' + self.metadata.name + ' is not a name of 1 to 63 of a-z, 0-9 and -; shorten it and write it without dots'",
    )
)]
#[serde(rename_all = "camelCase")]
// Here and not on `source`: a rule there would be passed by removing the field, here it is required.
#[x_kube(validation = rule_on(
    ".source",
    "self.source == oldSelf.source",
    "(has(oldSelf.source.hostPath) ? oldSelf.source.hostPath.path : oldSelf.source.type) + ' cannot be changed; declare another share'",
))]
#[x_kube(validation = immutable_is_read_only())]
#[x_kube(validation = writeback_is_exclusive())]
#[x_kube(validation = shared_is_not_cached())]
#[x_kube(validation = shared_has_no_negative_entries())]
#[x_kube(validation = shared_expires("entryTimeout"))]
#[x_kube(validation = shared_expires("attrTimeout"))]
#[x_kube(validation = needs_read_write("deviceNodes"))]
#[x_kube(validation = needs_read_write("fileCapabilities"))]
pub struct VirtiofsShareSpec {
    /// Where the data comes from. It cannot be changed.
    pub source: Source,
    /// Whether guests may change the data. `ReadOnly`: every change is refused with `EROFS`. `ReadWrite`: guests may
    /// change it.
    #[serde(default = "read_only")]
    pub access: Access,
    /// What is true of the data while guests use it. `Immutable`: nobody changes it. `Exclusive`: only one guest changes
    /// it, and a second VM on the node is refused. `Shared`: anyone may change it; file locks are kept inside each guest, so
    /// they do not coordinate guests with each other or with the host. Caching follows from this field, so
    /// with a wrong value guests see old data.
    #[serde(default)]
    pub content: Content,
    /// Which nodes serve the share.
    #[serde(default)]
    pub nodes: Nodes,
    /// Who may use the share. By default nobody.
    #[serde(default)]
    pub consumers: Consumers,
    /// The socket that VMs connect to.
    #[serde(default)]
    pub socket: Socket,
    /// Overrides of the engine configuration that follows from `content`. `status.engine` shows the result.
    #[serde(default)]
    pub engine: EngineOptions,
    /// What the agent does when guests see stale names or handles.
    #[serde(default)]
    pub staleness: Staleness,
    /// How a change is rolled out to the nodes.
    #[serde(default)]
    pub rollout: Rollout,
}

/// What is true of the data while guests use it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
pub enum Content {
    /// Nobody changes it.
    Immutable,
    /// Only one guest changes it; a second VM on the node is refused.
    Exclusive,
    /// Anyone may change it at any time.
    #[default]
    Shared,
}

impl Content {
    /// The word on the wire.
    pub fn as_str(self) -> &'static str {
        match self {
            Content::Immutable => "Immutable",
            Content::Exclusive => "Exclusive",
            Content::Shared => "Shared",
        }
    }
}

pub(super) fn immutable_is_read_only() -> Rule {
    rule_on(
        ".access",
        "self.content != 'Immutable' || self.access == 'ReadOnly'",
        "self.access + ' contradicts content Immutable; write ReadOnly, or content Exclusive or Shared'",
    )
}

pub(super) fn writeback_is_exclusive() -> Rule {
    rule_on(
        ".engine.writeback",
        "!has(self.engine.writeback) || self.engine.writeback != 'Enabled' || (self.content == 'Exclusive' && self.access == 'ReadWrite')",
        "'Enabled needs content Exclusive and access ReadWrite, not ' + self.content + ' and ' + self.access + '; change them or remove it'",
    )
}

pub(super) fn shared_is_not_cached() -> Rule {
    rule_on(
        ".engine.cache",
        "!has(self.engine.cache) || self.engine.cache != 'Always' || self.content != 'Shared'",
        "'Always hides what others write to content Shared; write Auto, or content Exclusive or Immutable if that is true'",
    )
}

pub(super) fn shared_has_no_negative_entries() -> Rule {
    rule_on(
        ".engine.negativeTimeout",
        "!has(self.engine.negativeTimeout) || self.content != 'Shared' || duration(self.engine.negativeTimeout) == duration('0s')",
        "self.engine.negativeTimeout + ' hides what others create in content Shared; write 0s, or content Exclusive or Immutable if that is true'",
    )
}

pub(super) fn shared_expires(timeout: &str) -> Rule {
    rule_on(
        &format!(".engine.{timeout}"),
        format!(
            "!has(self.engine.{timeout}) || self.content != 'Shared' || duration(self.engine.{timeout}) <= duration('1m')"
        ),
        format!(
            "self.engine.{timeout} + ' hides for too long what others change in content Shared; write 1m or less, or content Exclusive or Immutable if that is true'"
        ),
    )
}

pub(super) fn needs_read_write(switch: &str) -> Rule {
    rule_on(
        &format!(".engine.{switch}"),
        format!("!has(self.engine.{switch}) || self.engine.{switch} != 'Enabled' || self.access == 'ReadWrite'"),
        "'Enabled lets the guest write, but access is ' + self.access + '; write ReadWrite, or remove it'",
    )
}

/// The safe default.
fn read_only() -> Access {
    Access::ReadOnly
}
