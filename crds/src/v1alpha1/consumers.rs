//! Who may use the share.

use kube::KubeSchema;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::LabelSelector;
use super::rule::{rule, rule_on};

/// Who may use the share. By default nobody. Without Kubernetes this is ignored, and the owner and mode of the socket
/// decide who can connect.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Consumers {
    /// Namespaces whose pods may use the share.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub namespaces: Option<NamespaceConsumers>,
}

/// Namespaces whose pods may use the share: those that are named, and those that the selector matches.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = rule(
    "(has(self.matchNames) && self.matchNames.size() > 0) || has(self.selector)",
    "'admits nobody; add matchNames or a selector, or remove namespaces'",
))]
// To Kubernetes an empty selector matches everything. An omission must not admit everybody.
#[x_kube(validation = rule_on(
    ".selector",
    "!has(self.selector) || (has(self.selector.matchLabels) && self.selector.matchLabels.size() > 0) || (has(self.selector.matchExpressions) && self.selector.matchExpressions.size() > 0)",
    "'is empty and would admit every namespace; to mean that, select by key kubernetes.io/metadata.name with operator Exists'",
))]
pub struct NamespaceConsumers {
    /// Names of namespaces.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 256), inner(length(min = 1, max = 63)))]
    #[x_kube(merge_strategy = ListMerge::Set)]
    #[x_kube(validation = rule(
        "self.all(name, name.matches('^[a-z0-9]([-a-z0-9]*[a-z0-9])?$'))",
        "self.filter(name, !name.matches('^[a-z0-9]([-a-z0-9]*[a-z0-9])?$'))[0] + ' is not the name of a namespace; write a-z, 0-9 and -, without patterns'",
    ))]
    pub match_names: Vec<String>,
    /// Labels of namespaces. Anyone who may label a namespace can then admit it; prefer `matchNames`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub selector: Option<LabelSelector>,
}
