//! Counts that never go backwards, although a broker may die and start from nought, or a share be declared anew, as
//! long as agent and broker do not die together.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use virtiofs_contract::control::{EndpointStatus, Status};
use virtiofs_contract::counters::Totals;

use crate::offer::{share_name, share_of};

/// Counts of one share over every broker that this agent has seen.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct ShareTotals {
    /// Requests, errors, bytes.
    pub(crate) totals: Totals,
    /// Sessions that began.
    pub(crate) sessions: u64,
    /// Engines that were started.
    pub(crate) engines: u64,
    /// Connections that became no session.
    pub(crate) rejected_connections: u64,
    /// Those of them that an exclusive share refused.
    #[serde(default)]
    pub(crate) rejected_exclusive: u64,
}

impl ShareTotals {
    fn add(&mut self, other: &ShareTotals) {
        self.totals.add(&other.totals);
        self.sessions += other.sessions;
        self.engines += other.engines;
        self.rejected_connections += other.rejected_connections;
        self.rejected_exclusive += other.rejected_exclusive;
    }
}

/// Counts of all shares.
#[derive(Debug, Default)]
pub(crate) struct RunningTotals {
    /// By endpoint.
    shares: BTreeMap<String, Share>,
    /// Has it been asked what an earlier agent knew?
    recalled: bool,
}

#[derive(Debug, Default)]
struct Share {
    /// Which broker the last counts came from.
    broker: u32,
    /// Sum of what brokers before that one had counted.
    before: ShareTotals,
    /// What that one has counted.
    last: ShareTotals,
    /// The broker that keeps this sum.
    kept_by: Option<u32>,
}

/// What outlives the agent.
#[derive(Serialize, Deserialize)]
struct Kept {
    broker: u32,
    before: ShareTotals,
}

impl RunningTotals {
    /// Takes in what a broker says.
    pub(crate) fn observe(&mut self, status: &Status) {
        for endpoint in &status.endpoints {
            self.shares.entry(endpoint.endpoint.name.clone()).or_default().observe(status.pid, counted(endpoint));
        }
        self.fold(status);
    }

    /// What an endpoint beside a share's own has counted stays with the share when it goes: VMs, and names, come and
    /// go without end.
    fn fold(&mut self, status: &Status) {
        let known = |name: &str| status.endpoints.iter().any(|it| it.endpoint.name == name);
        let gone = self.shares.keys().filter(|name| share_of(name).is_some() && !known(name));
        for name in gone.cloned().collect::<Vec<_>>() {
            if let Some(counted) = self.shares.remove(&name) {
                let share = self.shares.entry(share_name(&name).to_owned()).or_default();
                share.before.add(&counted.sum());
                share.kept_by = None;
            }
        }
    }

    /// Has it been asked what an earlier agent knew?
    pub(crate) fn is_recalled(&self) -> bool {
        self.recalled
    }

    /// Takes in what an earlier agent knew, by share; what this one knows already is newer.
    pub(crate) fn recall(&mut self, kept: Vec<(String, String)>) {
        self.recalled = true;
        for (share, text) in kept {
            if let Ok(Kept { broker, before }) = serde_json::from_str(&text) {
                self.shares.entry(share).or_insert(Share { broker, before, ..Share::default() });
            }
        }
    }

    /// What this broker does not keep yet, by share: only what those before it have counted, which seldom changes.
    pub(crate) fn to_keep(&self, broker: u32) -> Vec<(String, String)> {
        let unkept = self.shares.iter().filter(|(_, share)| share.kept_by != Some(broker));
        let worth_it = unkept.filter(|(_, share)| share.before != ShareTotals::default());
        let text =
            |share: &Share| serde_json::to_string(&Kept { broker: share.broker, before: share.before.clone() }).ok();
        worth_it.filter_map(|(name, share)| Some((name.clone(), text(share)?))).collect()
    }

    /// This broker keeps what there was to keep of this endpoint.
    pub(crate) fn is_kept(&mut self, endpoint: &str, broker: u32) {
        if let Some(share) = self.shares.get_mut(endpoint) {
            share.kept_by = Some(broker);
        }
    }

    /// The counts so far, by share.
    pub(crate) fn all(&self) -> BTreeMap<String, ShareTotals> {
        let mut all: BTreeMap<String, ShareTotals> = BTreeMap::new();
        for (name, share) in &self.shares {
            all.entry(share_name(name).to_owned()).or_default().add(&share.sum());
        }
        all
    }
}

impl Share {
    fn observe(&mut self, broker: u32, counted: ShareTotals) {
        // A share that was withdrawn and declared again starts from nought in the same broker.
        if broker != self.broker || less(&counted, &self.last) {
            self.before = self.sum();
            self.kept_by = None;
        }
        self.broker = broker;
        self.last = counted;
    }

    fn sum(&self) -> ShareTotals {
        let mut sum = self.before.clone();
        sum.add(&self.last);
        sum
    }
}

fn counted(endpoint: &EndpointStatus) -> ShareTotals {
    ShareTotals {
        totals: endpoint.totals.clone(),
        sessions: endpoint.sessions_started,
        engines: endpoint.engines_started,
        rejected_connections: endpoint.rejected_connections,
        rejected_exclusive: endpoint.rejected_exclusive,
    }
}

/// Has any count gone down?
fn less(new: &ShareTotals, old: &ShareTotals) -> bool {
    let requests = |totals: &Totals, opcode| {
        totals.operations.iter().find(|it| it.opcode == opcode).map_or(0, |operation| operation.requests)
    };
    new.sessions < old.sessions
        || new.engines < old.engines
        || new.rejected_connections < old.rejected_connections
        || new.rejected_exclusive < old.rejected_exclusive
        || new.totals.bytes_read < old.totals.bytes_read
        || new.totals.bytes_written < old.totals.bytes_written
        || new.totals.malformed < old.totals.malformed
        || old.totals.stale.iter().any(|it| new.totals.stale(it.cause) < it.events)
        || replacements(&new.totals).iter().zip(replacements(&old.totals)).any(|(new, old)| *new < old)
        || old.totals.operations.iter().any(|it| requests(&new.totals, it.opcode) < it.requests)
}

fn replacements(totals: &Totals) -> [u64; 4] {
    let it = &totals.replacements;
    [it.hand_overs.count, it.aborted, it.recoveries.count, it.abandoned]
}

#[cfg(test)]
mod tests {
    use virtiofs_contract::counters::OperationTotals;

    use super::*;

    fn counts(requests: u64) -> ShareTotals {
        let lookup = OperationTotals { opcode: 1, requests, errors: 0, nanoseconds: 0, latency: vec![requests] };
        ShareTotals { totals: Totals { operations: vec![lookup], ..Totals::default() }, ..ShareTotals::default() }
    }

    #[test]
    fn counts_go_on_over_brokers_and_over_a_share_that_comes_back() {
        let mut share = Share::default();
        for (broker, requests, sum) in [(1, 3, 3), (1, 5, 5), (2, 0, 5), (2, 4, 9), (2, 1, 10), (2, 2, 11)] {
            share.observe(broker, counts(requests));
            assert_eq!(share.sum().totals.requests(), sum, "broker {broker} at {requests}");
        }
    }

    #[test]
    fn what_brokers_before_have_counted_outlives_the_agent() {
        let with = |broker: u32, requests| {
            let mut running = RunningTotals::default();
            running.recall(Vec::new());
            running.shares.entry("a".into()).or_default().observe(broker, counts(requests));
            running
        };
        let mut first = with(1, 3);
        assert_eq!(first.to_keep(1), [], "the broker itself knows");
        first.shares.get_mut("a").unwrap().observe(2, counts(4));
        let kept = first.to_keep(2);
        assert_eq!(kept.len(), 1);
        first.is_kept("a", 2);
        assert_eq!(first.to_keep(2), []);
        assert_eq!(first.to_keep(3).len(), 1, "another broker keeps nothing yet");

        let mut second = RunningTotals::default();
        assert!(!second.is_recalled());
        second.recall(kept);
        second.shares.get_mut("a").unwrap().observe(2, counts(5));
        assert_eq!(second.all()["a"].totals.requests(), 8);
    }

    #[test]
    fn what_another_socket_of_a_share_has_counted_stays_with_the_share() {
        use crate::plan::tests::{counting, status};
        let mut running = RunningTotals::default();
        let mut sum = |endpoints: &[(&str, u64)]| {
            let endpoints = endpoints.iter().map(|(name, requests)| counting(name, counts(*requests).totals)).collect();
            running.observe(&status(1, endpoints));
            let all = running.all();
            assert_eq!(all.keys().collect::<Vec<_>>(), ["a"]);
            all["a"].totals.requests()
        };
        assert_eq!(sum(&[("a", 5), ("a.vm-1", 3)]), 8);
        assert_eq!(sum(&[("a", 6)]), 9, "the socket is gone");
        assert_eq!(sum(&[("a", 6), ("a.vm-1", 1)]), 10, "another of that name");
    }

    #[test]
    fn engines_exchanged_go_on_as_well() {
        let mut share = Share::default();
        let mut counts = ShareTotals::default();
        counts.totals.replacements.recoveries.record(1);
        share.observe(1, counts.clone());
        share.observe(1, ShareTotals::default());
        counts.totals.replacements.abandoned = 2;
        share.observe(1, counts);
        assert_eq!(replacements(&share.sum().totals), [0, 0, 2, 2]);
    }
}
