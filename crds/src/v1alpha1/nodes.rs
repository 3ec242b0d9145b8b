//! Which nodes serve the share.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::LabelSelector;

/// Which nodes serve the share. Without Kubernetes this is ignored.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Nodes {
    /// Labels that a node must have. By default every node serves the share.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub selector: Option<LabelSelector>,
}
