//! Sessions that were lost with a broker. Their VMs hang until somebody restarts them.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use virtiofs_contract::control::{EndpointStatus, LostSession, Status};

/// Time for which a lost session is reported of its share.
pub(crate) const LOSS_REPORTED: Duration = Duration::from_secs(60 * 60);

/// The lost sessions that the broker lists, and earlier ones that are still reported.
///
/// A session is identified by its name and the time of its loss, not by a count: a broker that lost its own state counts from
/// zero, and an agent that has just started knows no earlier count.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Losses {
    by_endpoint: BTreeMap<String, BTreeMap<LostSession, Loss>>,
}

/// What is known about a lost session.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Loss {
    /// When it was lost.
    at: Instant,
    /// True if the broker lists it.
    listed: bool,
    /// True if a VM has connected to the endpoint since.
    superseded: bool,
}

impl Losses {
    /// Takes in the broker's status of `now`, which is `unix` seconds after the Unix epoch.
    pub(crate) fn update(&mut self, now: Instant, unix: u64, status: &Status) {
        self.by_endpoint.values_mut().flat_map(BTreeMap::values_mut).for_each(|loss| loss.listed = false);
        for endpoint in &status.endpoints {
            self.update_endpoint(now, unix, endpoint);
        }
        self.by_endpoint.retain(|_, losses| {
            losses.retain(|_, loss| loss.listed || loss.is_recent(now));
            !losses.is_empty()
        });
    }

    fn update_endpoint(&mut self, now: Instant, unix: u64, status: &EndpointStatus) {
        let name = &status.endpoint.name;
        for session in &status.lost {
            // A clock that was set back does not hide a loss.
            let age = Duration::from_secs(unix.saturating_sub(session.at));
            let at = now.checked_sub(age).unwrap_or(now);
            let losses = self.by_endpoint.entry(name.clone()).or_default();
            losses.entry(session.clone()).or_insert(Loss { at, listed: true, superseded: false }).listed = true;
        }
        let Some(losses) = self.by_endpoint.get_mut(name) else { return };
        let latest = status.sessions.iter().map(|it| it.connected_at).max();
        for (session, loss) in losses {
            loss.superseded |= latest.is_some_and(|connected| connected >= session.at);
        }
    }

    /// Recently lost sessions of these endpoints, oldest first.
    pub(crate) fn recent(&self, now: Instant, is_of: impl Fn(&str) -> bool) -> Vec<&LostSession> {
        let endpoints = self.by_endpoint.iter().filter(|(name, _)| is_of(name));
        let losses = endpoints.flat_map(|(_, losses)| losses).filter(|(_, loss)| loss.is_recent(now));
        let mut sessions: Vec<_> = losses.map(|(session, _)| session).collect();
        sessions.sort();
        sessions
    }

    /// The last session that an endpoint lost and that no later VM has replaced: a guest hangs.
    pub(crate) fn unresolved(&self, endpoint: &str) -> Option<&LostSession> {
        let losses = self.by_endpoint.get(endpoint)?;
        losses.iter().filter(|(_, loss)| !loss.superseded).map(|(session, _)| session).next_back()
    }
}

impl Loss {
    fn is_recent(&self, now: Instant) -> bool {
        now.saturating_duration_since(self.at) < LOSS_REPORTED
    }
}

#[cfg(test)]
mod tests {
    use virtiofs_client::fixtures::{endpoint, listening, session, status};
    use virtiofs_contract::control::SessionStatus;

    use super::*;

    fn lost(at: u64, session: &str) -> LostSession {
        LostSession { at, session: session.into() }
    }

    fn of_broker(instance: u32, lost: Vec<LostSession>) -> Status {
        status(instance, vec![EndpointStatus { lost, ..listening(endpoint("a")) }])
    }

    #[test]
    fn a_loss_is_known_by_its_identity() {
        let (now, first, second) = (Instant::now(), lost(1000, "a-1"), lost(1100, "a-2"));
        let later = |seconds| now + Duration::from_secs(seconds);
        let mut losses = Losses::default();
        let recent = |losses: &Losses, at: Instant| -> Vec<String> {
            let recent = losses.recent(at, |name| name == "a").into_iter();
            recent.map(|it| it.session.clone()).collect()
        };
        // An agent that starts after the loss.
        losses.update(later(10), 1010, &of_broker(1, vec![first]));
        assert_eq!(recent(&losses, later(10)), ["a-1"]);
        // The next broker counts one lost session too.
        losses.update(later(110), 1110, &of_broker(2, vec![second.clone()]));
        assert_eq!(recent(&losses, later(110)), ["a-1", "a-2"]);
        losses.update(later(3610), 4610, &of_broker(2, vec![second.clone()]));
        assert_eq!(recent(&losses, later(3610)), ["a-2"], "an hour later");
        losses.update(later(3800), 4800, &of_broker(2, vec![second]));
        assert_eq!(recent(&losses, later(3800)), [""; 0]);
    }

    #[test]
    fn a_loss_before_the_agent_counts_from_its_own_time() {
        let (now, mut losses) = (Instant::now(), Losses::default());
        losses.update(now, 10_000, &of_broker(1, vec![lost(6401, "a-1"), lost(6400, "a-0"), lost(20_000, "a-2")]));
        let recent: Vec<_> = losses.recent(now, |_| true).into_iter().map(|it| it.session.as_str()).collect();
        assert_eq!(recent, ["a-1", "a-2"], "a-0 was lost an hour ago; the clock was set back after a-2");
        assert_eq!(losses.recent(now, |name| name == "b"), Vec::<&LostSession>::new());
    }

    #[test]
    fn a_loss_is_unresolved_until_a_vm_connects() {
        let (now, mut losses) = (Instant::now(), Losses::default());
        let mut unresolved = |sessions, lost| {
            let endpoint = EndpointStatus { sessions, lost, ..listening(endpoint("a")) };
            losses.update(now, 100, &status(1, vec![endpoint]));
            losses.unresolved("a").map(|it| it.session.clone())
        };
        let connected = |at| vec![SessionStatus { connected_at: at, ..session("a-9") }];
        let first = vec![lost(100, "a-1")];
        assert_eq!(unresolved(vec![], vec![]), None);
        assert_eq!(unresolved(vec![], first.clone()).as_deref(), Some("a-1"));
        assert_eq!(unresolved(connected(99), first.clone()).as_deref(), Some("a-1"), "another VM, which was restored");
        assert_eq!(unresolved(connected(100), first.clone()), None);
        assert_eq!(unresolved(vec![], first), None, "its VM has ended");
        let second = vec![lost(100, "a-1"), lost(200, "a-9")];
        assert_eq!(unresolved(vec![], second).as_deref(), Some("a-9"));
    }
}
