//! Counts of sessions that have ended.

use super::state::Counts;
use super::{Endpoint, Inner};
use crate::holder::Hold;
use crate::session::ended::EndedSession;

impl Endpoint {
    /// Counts a session of an earlier broker that is not continued, and releases what is held of it.
    pub(crate) fn add_ended(&self, session: &EndedSession, hold: &Hold) {
        self.inner().add_ended(session, hold);
    }
}

impl Inner {
    /// Counts a session that has ended, and releases what is held of it. Only then its serial number is forgotten: a broker
    /// that finds it held knows whether it is counted.
    pub(super) fn add_ended(&mut self, session: &EndedSession, hold: &Hold) {
        if self.counts.add(hold.serial(), session) {
            self.save();
        }
        hold.end();
        hold.account().end();
        self.counts.accounted.remove(&hold.serial());
    }
}

impl Counts {
    /// Adds a session, unless it is counted. Returns true if it was not.
    fn add(&mut self, serial: u64, session: &EndedSession) -> bool {
        if !self.accounted.insert(serial) {
            return false;
        }
        self.ended.add(&session.totals);
        self.engines_ended += session.engines_started;
        if session.begun {
            self.sessions_ended += 1;
        } else {
            self.rejected_connections += 1;
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use virtiofs_contract::counters::Totals;

    use super::*;

    #[test]
    fn session_is_counted_once() {
        let totals = Totals { bytes_read: 10, ..Totals::default() };
        let session = EndedSession { begun: true, engines_started: 2, totals };
        let mut counts = Counts::default();
        assert!(counts.add(7, &session));
        // As the next broker reads them.
        let text = serde_json::to_string(&counts).unwrap();
        let mut counts: Counts = serde_json::from_str(&text).unwrap();
        assert!(!counts.add(7, &session));
        assert!(counts.add(8, &EndedSession { begun: false, ..session }));
        assert_eq!((counts.sessions_ended, counts.rejected_connections, counts.engines_ended), (1, 1, 4));
        assert_eq!(counts.ended.bytes_read, 20);
    }
}
