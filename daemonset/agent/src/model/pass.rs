//! The result of one reconcile pass. Every sink reads it, and everything in it comes from one observation of the broker.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use virtiofs_client::report::Report;
use virtiofs_client::totals::ShareTotals;
use virtiofs_config::EngineConfig;
use virtiofs_contract::control::EndpointStatus;

use super::losses::Losses;
use super::source::Space;
use super::volume::VolumeState;

/// The result of one reconcile pass.
#[derive(Clone, Debug, Default)]
pub(crate) struct Pass {
    /// When it began; `None` before the first pass.
    pub(crate) at: Option<Instant>,
    /// State of the shares.
    pub(crate) report: Report,
    /// The broker's endpoints that the report was made from; `None` if no broker answered.
    pub(crate) endpoints: Option<Arc<[EndpointStatus]>>,
    /// Counts by share at the same moment, summed over brokers.
    pub(crate) totals: Arc<BTreeMap<String, ShareTotals>>,
    /// Shares whose engine configuration remedies have amended, by name.
    pub(crate) amended: BTreeMap<String, Amended>,
    /// State of volumes' endpoints, by name.
    pub(crate) volumes: BTreeMap<String, VolumeState>,
    /// Lost sessions.
    pub(crate) losses: Losses,
    /// Space of the file systems of shares, as far as known.
    pub(crate) spaces: BTreeMap<String, Space>,
}

/// An engine configuration that remedies have amended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Amended {
    /// As declared.
    pub(crate) declared: EngineConfig,
    /// With the remedies.
    pub(crate) engine: EngineConfig,
}

/// A reconcile loop without a pass for this long hangs.
pub(crate) const PASS_WITHIN: Duration = Duration::from_secs(60);

impl Pass {
    /// True if the loop is alive: this pass is recent, or none has begun.
    pub(crate) fn is_fresh(&self, now: Instant) -> bool {
        self.at.is_none_or(|at| now.saturating_duration_since(at) <= PASS_WITHIN)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_loop_without_passes_is_not_alive() {
        let now = Instant::now();
        let pass = Pass { at: Some(now), ..Pass::default() };
        assert!(Pass::default().is_fresh(now) && pass.is_fresh(now) && pass.is_fresh(now + PASS_WITHIN));
        assert!(!pass.is_fresh(now + PASS_WITHIN + Duration::from_secs(1)));
    }
}
