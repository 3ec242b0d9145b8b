//! Staleness of a share and its remedies, as the agent reports them.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use virtiofs_contract::staleness::{Cause, StaleEvent};

/// Staleness of a share. Times are milliseconds since the Unix epoch.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ShareStaleness {
    /// The declared `spec.content`.
    pub content: String,
    /// The declared `spec.access`.
    pub access: String,
    /// The declared `spec.staleness.policy`.
    pub policy: String,
    /// The conditions `Stale` and `RemedyFailed`.
    pub conditions: Vec<Condition>,
    /// The last stale event of its sessions.
    pub last_stale: Option<StaleEvent>,
    /// Changes of the configuration by remedies.
    pub active_remedies: Vec<ActiveRemedy>,
    /// The last remedy that was started.
    pub last_remedy: Option<LastRemedy>,
    /// How often remedies ended, by cause and outcome.
    pub outcomes: Vec<OutcomeCount>,
}

/// One condition.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Condition {
    /// `Stale` or `RemedyFailed`.
    #[serde(rename = "type")]
    pub kind: String,
    /// True while it holds.
    pub status: bool,
    /// The cause; `None` where it does not hold.
    pub reason: String,
    /// Since when it has held.
    pub since: Option<u64>,
    /// What was found, and what is done about it.
    pub message: String,
}

/// A change of the configuration by a remedy.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ActiveRemedy {
    /// The cause of staleness it is for.
    pub cause: Cause,
    /// The remedy.
    pub remedy: String,
    /// Since when.
    pub since: u64,
}

/// A remedy.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct LastRemedy {
    /// The cause of staleness it is for.
    pub cause: Cause,
    /// The remedy.
    pub remedy: String,
    /// When it was started.
    pub started: u64,
    /// When it was applied to every session.
    pub applied: Option<u64>,
    /// When it ended.
    pub ended: Option<u64>,
    /// How it ended; null while it is being tried.
    pub outcome: Option<String>,
}

/// How often remedies for a cause ended with one outcome.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct OutcomeCount {
    /// The cause of staleness.
    pub cause: Cause,
    /// How they ended.
    pub outcome: String,
    /// How many.
    pub count: u64,
}
