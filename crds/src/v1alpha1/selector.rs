//! A label selector with bounds, which that of Kubernetes lacks and CEL rules need.

use std::collections::BTreeMap;

use k8s_openapi::apimachinery::pkg::apis::meta::v1 as meta;
use kube::KubeSchema;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::rule::{rule, rule_on};

/// Selects objects by their labels. All requirements must be met.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
// Owned as a whole: two writers that each add a requirement would select what neither of them means.
#[schemars(extend("x-kubernetes-map-type" = "atomic"))]
pub struct LabelSelector {
    /// Labels and the value that each must have.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    #[schemars(extend(
        "maxProperties" = 32,
        "additionalProperties" = {"type": "string", "maxLength": 63},
    ))]
    pub match_labels: BTreeMap<String, String>,
    /// Requirements on labels.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 32))]
    #[x_kube(merge_strategy = ListMerge::Atomic)]
    pub match_expressions: Vec<Requirement>,
}

/// One requirement on a label.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = rule_on(
    ".values",
    "!(self.operator in ['In', 'NotIn']) || (has(self.values) && self.values.size() > 0)",
    "'is empty, but operator ' + self.operator + ' compares with values; add at least one'",
))]
#[x_kube(validation = rule_on(
    ".values",
    "self.operator in ['In', 'NotIn'] || !has(self.values) || self.values.size() == 0",
    "'contradicts operator ' + self.operator + ', which compares with nothing; remove it, or write In or NotIn'",
))]
pub struct Requirement {
    /// The label's key.
    #[schemars(length(min = 1, max = 317))]
    #[x_kube(validation = rule(
        "self.matches('^([a-z0-9]([-a-z0-9.]*[a-z0-9])?/)?[A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?$')",
        "self + ' is not a label key; write one such as example.com/name'",
    ))]
    pub key: String,
    /// How the label relates to `values`: `In`, `NotIn`, `Exists` or `DoesNotExist`.
    pub operator: Operator,
    /// Values for `In` and `NotIn`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 64), inner(length(max = 63)))]
    #[x_kube(merge_strategy = ListMerge::Atomic)]
    pub values: Vec<String>,
}

/// How a label relates to values.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum Operator {
    /// The label has one of the values.
    In,
    /// The label is missing or has none of the values.
    NotIn,
    /// The label is present.
    Exists,
    /// The label is missing.
    DoesNotExist,
}

impl Operator {
    /// The word on the wire.
    pub fn as_str(self) -> &'static str {
        match self {
            Operator::In => "In",
            Operator::NotIn => "NotIn",
            Operator::Exists => "Exists",
            Operator::DoesNotExist => "DoesNotExist",
        }
    }
}

impl From<&LabelSelector> for meta::LabelSelector {
    fn from(selector: &LabelSelector) -> Self {
        let expressions = selector.match_expressions.iter().map(meta::LabelSelectorRequirement::from).collect();
        meta::LabelSelector { match_labels: Some(selector.match_labels.clone()), match_expressions: Some(expressions) }
    }
}

impl From<&Requirement> for meta::LabelSelectorRequirement {
    fn from(requirement: &Requirement) -> Self {
        meta::LabelSelectorRequirement {
            key: requirement.key.clone(),
            operator: requirement.operator.as_str().to_owned(),
            values: Some(requirement.values.clone()),
        }
    }
}
