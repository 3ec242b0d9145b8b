//! Policy about stale names and handles.

use kube::KubeSchema;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::rule::rule;
use crate::Interval;

/// What the agent does when guests see stale names or handles.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
pub struct Staleness {
    /// `Heal`: reconfigure or replace the engine under the running VM. `Report`: count and report, and change nothing.
    #[serde(default)]
    pub policy: Remedy,
    /// Number of stale events within `window` that starts a remedy.
    #[serde(default = "default_threshold")]
    #[schemars(range(min = 1, max = 1_000_000))]
    pub threshold: u32,
    /// Time over which events are counted, and within which a remedy must show effect: a duration from `10s` to `1h`,
    /// such as `1m`.
    #[serde(default = "default_window")]
    #[x_kube(validation = rule(
        "duration(self) >= duration('10s') && duration(self) <= duration('1h')",
        "self + ' is out of range; write 10s to 1h'",
    ))]
    pub window: Interval,
    /// Largest number of remedies within an hour. Beyond it the share reports `RemedyFailed`.
    #[serde(default = "default_max_remedies")]
    #[schemars(range(min = 1, max = 60))]
    pub max_remedies_per_hour: u32,
}

/// Whether staleness is remedied or only reported.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
pub enum Remedy {
    /// Reconfigure or replace the engine under the running VM.
    #[default]
    Heal,
    /// Count and report, and change nothing.
    Report,
}

fn default_threshold() -> u32 {
    10
}

fn default_window() -> Interval {
    Interval::from_millis(60_000)
}

fn default_max_remedies() -> u32 {
    4
}

impl Default for Staleness {
    fn default() -> Self {
        Staleness {
            policy: Remedy::default(),
            threshold: default_threshold(),
            window: default_window(),
            max_remedies_per_hour: default_max_remedies(),
        }
    }
}
