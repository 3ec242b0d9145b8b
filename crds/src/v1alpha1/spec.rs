//! The share itself.

use kube::{CustomResource, KubeSchema};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use virtiofs_contract::config::Access;

use super::{Consumers, EngineOverrides, Nodes, Rollout, Socket, Source, Staleness, VirtiofsShareStatus};

/// A directory of the host, offered to VMs over virtiofs.
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
    doc = "A directory of the host, offered to VMs over virtiofs."
)]
#[serde(rename_all = "camelCase")]
pub struct VirtiofsShareSpec {
    /// Where the data comes from. It cannot be changed: make another share.
    pub source: Source,
    /// May guests change the data?
    #[serde(default = "read_only")]
    pub access: Access,
    /// What is true of the data. Caching follows from it, so a wrong answer shows guests old data.
    #[serde(default)]
    pub content: Content,
    /// Which nodes serve the share.
    #[serde(default)]
    pub nodes: Nodes,
    /// Who may use the share: nobody unless named.
    #[serde(default)]
    pub consumers: Consumers,
    /// The socket that VMs connect to.
    #[serde(default)]
    pub socket: Socket,
    /// Overrides of what follows from `content`.
    #[serde(default)]
    pub engine: EngineOverrides,
    /// What is done when guests see stale names or handles.
    #[serde(default)]
    pub staleness: Staleness,
    /// How a change reaches the nodes.
    #[serde(default)]
    pub rollout: Rollout,
}

/// What is true of the data while guests use it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
pub enum Content {
    /// Nobody changes it.
    Immutable,
    /// Nobody but one guest changes it; a second VM on the node is refused.
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

/// The safe answer where none is given.
fn read_only() -> Access {
    Access::ReadOnly
}
