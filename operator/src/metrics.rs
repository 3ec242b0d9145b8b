//! The metrics of the operator. Labels are bounded: kinds, verbs, outcomes, conditions and names of shares.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};

use prometheus::{Encoder, IntCounterVec, IntGauge, IntGaugeVec, Opts, Registry, TextEncoder};
use virtiofs_crds::v1alpha1::VirtiofsShareStatus;
use virtiofs_crds::v1alpha1::conditions::{DEGRADED, READY, RECONCILING, STALLED};

/// All metrics of this process.
pub(crate) struct Metrics {
    registry: Registry,
    /// Reconciles that were not throttled, by kind and outcome.
    pub(crate) reconciles: IntCounterVec,
    /// Requests that change an object, by kind and verb.
    pub(crate) writes: IntCounterVec,
    /// Objects that cannot be decoded, by kind.
    pub(crate) undecodable: IntGaugeVec,
    leader: IntGauge,
    nodes: IntGaugeVec,
    sessions: IntGaugeVec,
    conditions: IntGaugeVec,
    known: Mutex<BTreeSet<String>>,
    reached: AtomicBool,
}

/// States of a share's nodes, as a label.
const NODE_STATES: [&str; 4] = ["selected", "updated", "ready", "unreachable"];
/// Conditions of a share, as a label.
const CONDITIONS: [&str; 4] = [READY, RECONCILING, STALLED, DEGRADED];

impl Metrics {
    /// Metrics that are all zero.
    ///
    /// # Errors
    /// Two metrics have the same name, which every test would show.
    pub(crate) fn new() -> prometheus::Result<Self> {
        let registry = Registry::new();
        let gauge = |name: &str, help: &str, labels: &[&str]| -> prometheus::Result<IntGaugeVec> {
            let gauge = IntGaugeVec::new(Opts::new(name, help), labels)?;
            registry.register(Box::new(gauge.clone()))?;
            Ok(gauge)
        };
        let counter = |name: &str, help: &str, labels: &[&str]| -> prometheus::Result<IntCounterVec> {
            let counter = IntCounterVec::new(Opts::new(name, help), labels)?;
            registry.register(Box::new(counter.clone()))?;
            Ok(counter)
        };
        let leader = IntGauge::new("virtiofs_operator_leader", "1: this operator holds the lease; 0: it stands by.")?;
        registry.register(Box::new(leader.clone()))?;
        Ok(Metrics {
            reconciles: counter(
                "virtiofs_operator_reconciles_total",
                "Reconciles of an object, by kind and outcome.",
                &["kind", "outcome"],
            )?,
            writes: counter(
                "virtiofs_operator_writes_total",
                "Requests to the API server that change an object, by kind and verb.",
                &["kind", "verb"],
            )?,
            undecodable: gauge(
                "virtiofs_operator_undecodable_objects",
                "Objects that this operator cannot decode, by kind.",
                &["kind"],
            )?,
            nodes: gauge("virtiofs_operator_share_nodes", "Nodes of a share, by state.", &["share", "state"])?,
            sessions: gauge("virtiofs_operator_share_sessions", "VMs that are connected to a share.", &["share"])?,
            conditions: gauge(
                "virtiofs_operator_share_condition",
                "Conditions of a share, by type. 1: the condition is True.",
                &["share", "condition"],
            )?,
            registry,
            leader,
            known: Mutex::default(),
            reached: AtomicBool::new(false),
        })
    }

    /// The page for Prometheus.
    pub(crate) fn text(&self) -> prometheus::Result<String> {
        let mut page = Vec::new();
        TextEncoder::new().encode(&self.registry.gather(), &mut page)?;
        Ok(String::from_utf8_lossy(&page).into_owned())
    }

    /// Records that the API server has answered.
    pub(crate) fn reached(&self) {
        self.reached.store(true, Ordering::Relaxed);
    }

    /// True if the API server has answered.
    pub(crate) fn is_ready(&self) -> bool {
        self.reached.load(Ordering::Relaxed)
    }

    /// Records that this operator holds the lease.
    pub(crate) fn leads(&self) {
        self.leader.set(1);
    }

    /// Records the status of a share.
    pub(crate) fn share(&self, name: &str, status: &VirtiofsShareStatus) {
        let nodes = status.nodes.unwrap_or_default();
        for (state, count) in NODE_STATES.iter().zip([nodes.selected, nodes.updated, nodes.ready, nodes.unreachable]) {
            self.nodes.with_label_values(&[name, state]).set(count);
        }
        self.sessions.with_label_values(&[name]).set(status.sessions.unwrap_or(0));
        for condition in CONDITIONS {
            let is_true = status.conditions.iter().any(|it| it.type_ == condition && it.status == "True");
            self.conditions.with_label_values(&[name, condition]).set(is_true.into());
        }
        self.known.lock().unwrap_or_else(PoisonError::into_inner).insert(name.to_owned());
    }

    /// Removes shares that do not exist any more.
    pub(crate) fn retain_shares(&self, exists: impl Fn(&str) -> bool) {
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        let gone: Vec<String> = known.iter().filter(|name| !exists(name)).cloned().collect();
        for name in gone {
            // Removing a label set that does not exist has no effect.
            for state in NODE_STATES {
                let _ = self.nodes.remove_label_values(&[&name, state]);
            }
            for condition in CONDITIONS {
                let _ = self.conditions.remove_label_values(&[&name, condition]);
            }
            let _ = self.sessions.remove_label_values(&[&name]);
            known.remove(&name);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_deleted_share_leaves_no_metrics() {
        let metrics = Metrics::new().unwrap();
        metrics.share("images", &VirtiofsShareStatus { sessions: Some(3), ..VirtiofsShareStatus::default() });
        assert!(metrics.text().unwrap().contains("virtiofs_operator_share_sessions{share=\"images\"} 3"));
        metrics.retain_shares(|name| name == "images");
        assert!(metrics.text().unwrap().contains("images"));
        metrics.retain_shares(|_| false);
        assert!(!metrics.text().unwrap().contains("images"));
    }
}
