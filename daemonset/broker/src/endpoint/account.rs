//! Counts of sessions that have ended.

use virtiofs_contract::control::LostSession;

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

/// Most lost sessions that an endpoint remembers: all that one loss can have.
const MOST_LOST: usize = 1024;

impl Counts {
    /// Adds lost sessions, unless they are counted: a broker may end after it has counted them and before it has removed them
    /// from its list of sessions.
    pub(super) fn add_lost(&mut self, sessions: Vec<LostSession>) {
        for session in sessions {
            if self.lost.iter().all(|it| it.session != session.session) {
                self.sessions_lost += 1;
                self.lost.push(session);
            }
        }
        self.lost.drain(..self.lost.len().saturating_sub(MOST_LOST));
    }

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
    fn lost_session_is_counted_once() {
        let lost = |serials: std::ops::Range<usize>, at| -> Vec<_> {
            serials.map(|serial| LostSession { at, session: format!("a-{serial}") }).collect()
        };
        let mut counts = Counts::default();
        counts.add_lost(lost(0..2, 10));
        counts.add_lost(lost(1..3, 20));
        assert_eq!((counts.sessions_lost, &counts.lost[..]), (3, &[lost(0..2, 10), lost(2..3, 20)].concat()[..]));
        counts.add_lost(lost(3..3 + MOST_LOST, 30));
        assert_eq!((counts.sessions_lost, counts.lost.len()), (3 + MOST_LOST as u64, MOST_LOST));
        assert_eq!(counts.lost[0].session, "a-3", "the oldest are dropped");
    }

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
