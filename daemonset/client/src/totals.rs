//! Counts that never go backwards when a broker restarts and its counters reset to zero, or when a share is removed and
//! declared again. They reset only if agent and broker end at the same time.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use virtiofs_contract::control::{EndpointStatus, Status};
use virtiofs_contract::counters::Totals;

use crate::endpoint::{is_own, share_of};

/// Counts of one share, summed over brokers.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct ShareTotals {
    /// Requests, errors, bytes.
    pub totals: Totals,
    /// Sessions that began.
    pub sessions: u64,
    /// Engines that were started.
    pub engines: u64,
    /// Sessions that were lost with a broker.
    #[serde(default)]
    pub sessions_lost: u64,
    /// Connections that did not become a session.
    pub rejected_connections: u64,
    /// Those of them that an exclusive share refused.
    #[serde(default)]
    pub rejected_exclusive: u64,
    /// Sessions that ended because engines could not share their guests' memory.
    #[serde(default)]
    pub rejected_memory: u64,
}

impl ShareTotals {
    fn add(&mut self, other: &ShareTotals) {
        self.totals.add(&other.totals);
        self.sessions += other.sessions;
        self.engines += other.engines;
        self.sessions_lost += other.sessions_lost;
        self.rejected_connections += other.rejected_connections;
        self.rejected_exclusive += other.rejected_exclusive;
        self.rejected_memory += other.rejected_memory;
    }
}

/// Counts of all shares.
#[derive(Debug, Default)]
pub struct RunningTotals {
    /// By endpoint.
    shares: BTreeMap<String, Share>,
    /// True once the counts that an earlier agent stored have been read.
    loaded: bool,
}

#[derive(Debug, Default)]
struct Share {
    /// Where the last counts came from.
    origin: Origin,
    /// Sum over all before that.
    before: ShareTotals,
    /// The last counts.
    last: ShareTotals,
    /// The broker that stores `before`.
    stored_by: Option<u64>,
}

/// Identity of counts. If it differs, they began at zero.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Origin {
    /// [`Status::instance`].
    broker: u64,
    /// [`EndpointStatus::serial`].
    #[serde(default)]
    serial: u64,
}

/// The part that the broker stores, for the next agent.
#[derive(Serialize, Deserialize)]
struct Stored {
    #[serde(flatten)]
    origin: Origin,
    before: ShareTotals,
}

impl RunningTotals {
    /// Adds the counts of a broker's status.
    pub fn observe(&mut self, status: &Status) {
        for endpoint in &status.endpoints {
            let origin = Origin { broker: status.instance, serial: endpoint.serial };
            self.shares.entry(endpoint.endpoint.name.clone()).or_default().observe(origin, counted(endpoint));
        }
        self.fold(status);
    }

    /// Moves the counts of removed sockets and volumes to their share: their number is not bounded over time.
    fn fold(&mut self, status: &Status) {
        let known = |name: &str| status.endpoints.iter().any(|it| it.endpoint.name == name);
        let gone = self.shares.keys().filter(|name| !is_own(name) && !known(name));
        for name in gone.cloned().collect::<Vec<_>>() {
            if let Some(counted) = self.shares.remove(&name) {
                let share = self.shares.entry(share_of(&name).to_owned()).or_default();
                share.before.add(&counted.sum());
                share.stored_by = None;
            }
        }
    }

    /// True once the counts that an earlier agent stored have been read.
    pub fn is_loaded(&self) -> bool {
        self.loaded
    }

    /// Takes over the counts that an earlier agent stored, by share. Counts that this one has already are newer.
    pub fn load(&mut self, stored: Vec<(String, String)>) {
        self.loaded = true;
        for (share, text) in stored {
            if let Ok(Stored { origin, before }) = serde_json::from_str(&text) {
                self.shares.entry(share).or_insert(Share { origin, before, ..Share::default() });
            }
        }
    }

    /// The values that this broker does not store yet, by share: the sums over earlier brokers, which rarely change.
    pub fn to_store(&self, broker: u64) -> Vec<(String, String)> {
        let missing = self.shares.iter().filter(|(_, share)| share.stored_by != Some(broker));
        let changed = missing.filter(|(_, share)| share.before != ShareTotals::default());
        let text =
            |share: &Share| serde_json::to_string(&Stored { origin: share.origin, before: share.before.clone() }).ok();
        changed.filter_map(|(name, share)| Some((name.clone(), text(share)?))).collect()
    }

    /// Notes that this broker stores the value of this endpoint.
    pub fn note_stored(&mut self, endpoint: &str, broker: u64) {
        if let Some(share) = self.shares.get_mut(endpoint) {
            share.stored_by = Some(broker);
        }
    }

    /// The counts so far, by share.
    pub fn all(&self) -> BTreeMap<String, ShareTotals> {
        let mut all: BTreeMap<String, ShareTotals> = BTreeMap::new();
        for (name, share) in &self.shares {
            all.entry(share_of(name).to_owned()).or_default().add(&share.sum());
        }
        all
    }
}

impl Share {
    fn observe(&mut self, origin: Origin, counted: ShareTotals) {
        if origin != self.origin {
            self.before = self.sum();
            self.stored_by = None;
        }
        self.origin = origin;
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
        sessions_lost: endpoint.sessions_lost,
        rejected_connections: endpoint.rejected_connections,
        rejected_exclusive: endpoint.rejected_exclusive,
        rejected_memory: endpoint.rejected_memory,
    }
}

#[cfg(test)]
mod tests {
    use virtiofs_contract::counters::OperationTotals;

    use super::*;

    fn counts(requests: u64) -> ShareTotals {
        let lookup = OperationTotals { opcode: 1, requests, errors: 0, nanoseconds: 0, latency: vec![requests] };
        ShareTotals { totals: Totals { operations: vec![lookup], ..Totals::default() }, ..ShareTotals::default() }
    }

    fn origin(broker: u64, serial: u64) -> Origin {
        Origin { broker, serial }
    }

    #[test]
    fn counts_continue_over_brokers_and_over_a_redeclared_share() {
        let mut share = Share::default();
        let table =
            [(1, 1, 3, 3), (1, 1, 5, 5), (2, 1, 0, 5), (2, 1, 4, 9), (2, 2, 1, 10), (2, 2, 2, 11), (2, 3, 7, 18)];
        for (broker, serial, requests, sum) in table {
            share.observe(origin(broker, serial), counts(requests));
            assert_eq!(share.sum().totals.requests(), sum, "broker {broker}, endpoint {serial} at {requests}");
        }
    }

    #[test]
    fn a_second_loss_of_the_same_size_is_counted() {
        let lost = |sessions_lost| ShareTotals { sessions_lost, ..ShareTotals::default() };
        let mut share = Share::default();
        for broker in 1..=3 {
            share.observe(origin(broker, 1), lost(1));
        }
        assert_eq!(share.sum().sessions_lost, 3);
    }

    #[test]
    fn counts_of_earlier_brokers_outlive_the_agent() {
        let with = |broker: u64, requests| {
            let mut running = RunningTotals::default();
            running.load(Vec::new());
            running.shares.entry("a".into()).or_default().observe(origin(broker, 1), counts(requests));
            running
        };
        let mut first = with(1, 3);
        assert_eq!(first.to_store(1), [], "the broker itself knows");
        first.shares.get_mut("a").unwrap().observe(origin(2, 1), counts(4));
        let stored = first.to_store(2);
        assert_eq!(stored.len(), 1);
        first.note_stored("a", 2);
        assert_eq!(first.to_store(2), []);
        assert_eq!(first.to_store(3).len(), 1, "another broker stores nothing yet");

        let mut second = RunningTotals::default();
        assert!(!second.is_loaded());
        second.load(stored);
        second.shares.get_mut("a").unwrap().observe(origin(2, 1), counts(5));
        assert_eq!(second.all()["a"].totals.requests(), 8);
    }

    #[test]
    fn counts_of_a_removed_socket_stay_with_the_share() {
        use crate::fixtures::{counting, status};
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
}
