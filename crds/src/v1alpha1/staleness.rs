//! What is done about stale names and handles.

use kube::KubeSchema;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::rule::rule;
use crate::Interval;

/// What is done when guests see stale names or handles.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
pub struct Staleness {
    /// `Heal`: reconfigure or exchange the engine under the running VM. `Report`: count and report, change
    /// nothing.
    #[serde(default)]
    pub policy: Remedy,
    /// Stale events within `window` from which on something is done.
    #[serde(default = "default_threshold")]
    #[schemars(range(min = 1, max = 1_000_000))]
    pub threshold: u32,
    /// Over what time events are counted, and within which a remedy must have helped: a duration such as `1m`,
    /// from `10s` to `1h`.
    #[serde(default = "default_window")]
    #[x_kube(validation = rule(
        "duration(self) >= duration('10s') && duration(self) <= duration('1h')",
        "self + ' is out of range; write 10s to 1h'",
    ))]
    pub window: Interval,
    /// How many remedies may be tried within an hour; beyond it the share is `RemedyFailed`.
    #[serde(default = "default_budget")]
    #[schemars(range(min = 1, max = 60))]
    pub budget: u32,
}

/// Cure staleness, or only say so?
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
pub enum Remedy {
    /// Reconfigure or exchange the engine under the running VM.
    #[default]
    Heal,
    /// Count and report, change nothing.
    Report,
}

fn default_threshold() -> u32 {
    10
}

fn default_window() -> Interval {
    Interval::from_millis(60_000)
}

fn default_budget() -> u32 {
    4
}

impl Default for Staleness {
    fn default() -> Self {
        Staleness {
            policy: Remedy::default(),
            threshold: default_threshold(),
            window: default_window(),
            budget: default_budget(),
        }
    }
}
