//! How a change is rolled out.

use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// How a change is rolled out to the nodes. Without Kubernetes this is ignored.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Rollout {
    /// Number of nodes that may change at a time: a number, or a percentage of all nodes such as `25%`, rounded up.
    #[serde(default = "default_max_unavailable")]
    #[schemars(extend("minimum" = 1, "pattern" = "^([1-9][0-9]?|100)%$"))]
    pub max_unavailable: IntOrString,
    /// Number of engines that may be recovered on a node within ten minutes. Beyond it the roll-out halts.
    #[serde(default = "default_max_recoveries")]
    #[schemars(range(min = 0, max = 1_000_000))]
    pub max_recoveries: u32,
}

fn default_max_unavailable() -> IntOrString {
    IntOrString::String("25%".to_owned())
}

fn default_max_recoveries() -> u32 {
    5
}

impl Default for Rollout {
    fn default() -> Self {
        Rollout { max_unavailable: default_max_unavailable(), max_recoveries: default_max_recoveries() }
    }
}
