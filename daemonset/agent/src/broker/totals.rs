//! Counts that never go backwards while the agent lives, although a broker may die and start from nought.

use std::collections::BTreeMap;

use virtiofs_contract::control::{EndpointStatus, Status};
use virtiofs_contract::counters::Totals;

/// Counts of one share over every broker that this agent has seen.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct ShareTotals {
    /// Requests, errors, bytes.
    pub(crate) totals: Totals,
    /// Sessions that began.
    pub(crate) sessions: u64,
    /// Engines that were started.
    pub(crate) engines: u64,
    /// Connections that became no session.
    pub(crate) refused_connections: u64,
}

/// Counts of all shares.
#[derive(Debug, Default)]
pub(crate) struct RunningTotals {
    shares: BTreeMap<String, Share>,
}

#[derive(Debug, Default)]
struct Share {
    /// Which broker the last counts came from.
    broker: u32,
    /// Sum of what brokers before that one had counted.
    before: ShareTotals,
    /// What that one has counted.
    last: ShareTotals,
}

impl RunningTotals {
    /// Takes in what a broker says.
    pub(crate) fn observe(&mut self, status: &Status) {
        for endpoint in &status.endpoints {
            self.shares.entry(endpoint.endpoint.name.clone()).or_default().observe(status.pid, counted(endpoint));
        }
    }

    /// The counts so far, by share.
    pub(crate) fn all(&self) -> BTreeMap<String, ShareTotals> {
        self.shares.iter().map(|(name, share)| (name.clone(), share.sum())).collect()
    }
}

impl Share {
    fn observe(&mut self, broker: u32, counted: ShareTotals) {
        // A share that was withdrawn and declared again starts from nought in the same broker.
        if broker != self.broker || less(&counted, &self.last) {
            self.before = self.sum();
        }
        self.broker = broker;
        self.last = counted;
    }

    fn sum(&self) -> ShareTotals {
        let mut sum = self.before.clone();
        sum.totals.add(&self.last.totals);
        sum.sessions += self.last.sessions;
        sum.engines += self.last.engines;
        sum.refused_connections += self.last.refused_connections;
        sum
    }
}

fn counted(endpoint: &EndpointStatus) -> ShareTotals {
    ShareTotals {
        totals: endpoint.totals.clone(),
        sessions: endpoint.sessions_started,
        engines: endpoint.engines_started,
        refused_connections: endpoint.refused_connections,
    }
}

/// Has any count gone down?
fn less(new: &ShareTotals, old: &ShareTotals) -> bool {
    let requests = |totals: &Totals, opcode| {
        totals.operations.iter().find(|it| it.opcode == opcode).map_or(0, |operation| operation.requests)
    };
    new.sessions < old.sessions
        || new.engines < old.engines
        || new.refused_connections < old.refused_connections
        || new.totals.bytes_read < old.totals.bytes_read
        || new.totals.bytes_written < old.totals.bytes_written
        || new.totals.malformed < old.totals.malformed
        || old.totals.stale.iter().any(|it| new.totals.stale(it.cause) < it.events)
        || exchanges(&new.totals).iter().zip(exchanges(&old.totals)).any(|(new, old)| *new < old)
        || old.totals.operations.iter().any(|it| requests(&new.totals, it.opcode) < it.requests)
}

fn exchanges(totals: &Totals) -> [u64; 4] {
    let it = &totals.exchanges;
    [it.hand_overs.count, it.put_off, it.recoveries.count, it.given_up]
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
    fn engines_exchanged_go_on_as_well() {
        let mut share = Share::default();
        let mut counts = ShareTotals::default();
        counts.totals.exchanges.recoveries.note(1);
        share.observe(1, counts.clone());
        share.observe(1, ShareTotals::default());
        counts.totals.exchanges.given_up = 2;
        share.observe(1, counts);
        assert_eq!(exchanges(&share.sum().totals), [0, 0, 2, 2]);
    }
}
