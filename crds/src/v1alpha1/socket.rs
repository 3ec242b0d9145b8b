//! The socket that VMs connect to.

use kube::KubeSchema;
use serde::{Deserialize, Serialize};

use super::rule::rule;

/// The socket that VMs connect to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
pub struct Socket {
    /// User id that owns the socket, such as 107 for QEMU under KubeVirt. By default that of the broker.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(max = 4_294_967_294_u32))]
    pub owner: Option<u32>,
    /// Group id of the socket. By default that of the broker.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(max = 4_294_967_294_u32))]
    pub group: Option<u32>,
    /// Permission bits in octal, in quotes. The owner must have read and write permission.
    #[serde(default = "default_mode")]
    #[schemars(length(max = 8))]
    #[x_kube(validation = rule(
        "self.matches('^0?[67][0-7][0-7]$')",
        "self + ' is not an octal mode that lets the owner read and write; write one such as 0660, in quotes'",
    ))]
    pub mode: String,
}

fn default_mode() -> String {
    "0660".to_owned()
}

impl Default for Socket {
    fn default() -> Self {
        Socket { owner: None, group: None, mode: default_mode() }
    }
}
