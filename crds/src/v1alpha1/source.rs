//! Which directory is shared.

use kube::KubeSchema;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::rule::rule;

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
    #[x_kube(validation = rule(
        r"self.matches('^[^\x00-\x1f\x7f]*$')",
        "'holds a control character, such as a line break; rename the directory'",
    ))]
    #[x_kube(validation = rule(
        "self.startsWith('/')",
        "self + ' is not absolute; begin it with /'",
    ))]
    #[x_kube(validation = rule(
        "self != '/'",
        "self + ' would share the whole host; name a directory in it'",
    ))]
    #[x_kube(validation = rule(
        "!self.matches('/[.][.](/|$)')",
        "self + ' holds ..; write the path without it'",
    ))]
    #[x_kube(validation = rule(
        "self == '/' || !self.matches('//|/[.](/|$)|/$')",
        "self + ' is not normalised; write it without //, /./ and a / at the end'",
    ))]
    #[x_kube(validation = rule(
        "!self.matches('^/(proc|sys|dev)(/|$)')",
        "self + ' belongs to the kernel; name a directory outside /proc, /sys and /dev'",
    ))]
    #[x_kube(validation = rule(
        "!self.matches('^/var/lib/kubelet(/|$)')",
        "self + ' belongs to the kubelet, secrets of all pods included; name a directory outside /var/lib/kubelet'",
    ))]
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
