//! Which directory is shared.

use kube::KubeSchema;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Where the data comes from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Source {
    /// A directory of the node.
    pub host_path: HostPath,
}

/// A directory of the node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
pub struct HostPath {
    /// Absolute path of the directory, without `.`, `..`, `//` or a slash at the end.
    #[schemars(length(min = 1, max = 4000))]
    pub path: String,
    /// What must be found at the path.
    #[serde(default, rename = "type")]
    pub kind: HostPathType,
}

/// What must be found at a path of the node.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum HostPathType {
    /// A directory that exists.
    #[default]
    Directory,
}
