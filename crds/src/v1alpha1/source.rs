//! Where the data of a share comes from.

use kube::KubeSchema;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::rule::{rule, rule_on};

/// Where the data comes from: a union, of which exactly the member that `type` names is set.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = rule_on(
    ".hostPath",
    "self.type != 'HostPath' || has(self.hostPath)",
    "'is missing; type HostPath needs the directory, such as hostPath: {path: /srv/data}'",
))]
pub struct Source {
    /// The kind of source. `HostPath`: a directory of the node.
    #[serde(default, rename = "type")]
    pub kind: SourceType,
    /// The directory of the node, for type `HostPath`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub host_path: Option<HostPath>,
}

impl Source {
    /// A directory of the node.
    pub fn directory(path: impl Into<String>) -> Self {
        let host_path = HostPath { path: path.into(), kind: HostPathType::Directory };
        Source { kind: SourceType::HostPath, host_path: Some(host_path) }
    }

    /// The path of the directory; empty where the member is missing, which the schema rejects.
    pub fn path(&self) -> &str {
        self.host_path.as_ref().map_or("", |host_path| &host_path.path)
    }
}

/// The kinds of sources.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum SourceType {
    /// A directory of the node.
    #[default]
    HostPath,
}

/// A directory of the node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
pub struct HostPath {
    /// Absolute path of the directory, without `.`, `..`, `//` or a slash at the end.
    #[schemars(length(min = 1, max = 4000))]
    #[x_kube(validation = rule(
        r"self.matches('^[^\x00-\x1f\x7f]*$')",
        "'contains a control character, such as a line break; rename the directory'",
    ))]
    #[x_kube(validation = rule(
        "self.startsWith('/')",
        "self + ' is not absolute; start it with /'",
    ))]
    #[x_kube(validation = rule(
        "self != '/'",
        "self + ' would share the whole host; name a directory below it'",
    ))]
    #[x_kube(validation = rule(
        "!self.matches('/[.][.](/|$)')",
        "self + ' contains ..; write the path without it'",
    ))]
    #[x_kube(validation = rule(
        "self == '/' || !self.matches('//|/[.](/|$)|/$')",
        "self + ' is not normalized; write it without //, /./ and a / at the end'",
    ))]
    #[x_kube(validation = rule(
        "!self.matches('^/(proc|sys|dev)(/|$)')",
        "self + ' belongs to the kernel; name a directory outside of /proc, /sys and /dev'",
    ))]
    #[x_kube(validation = rule(
        "!self.matches('^/var/lib/kubelet(/|$)')",
        "self + ' belongs to the kubelet and contains secrets of pods; name a directory outside of /var/lib/kubelet'",
    ))]
    pub path: String,
    /// What the path must lead to. `Directory`: a directory that exists.
    #[serde(default, rename = "type")]
    pub kind: HostPathType,
}

/// What a path of the node must lead to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum HostPathType {
    /// A directory that exists.
    #[default]
    Directory,
}
