//! A source let go of by all sessions of an endpoint, or by none.

use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use virtiofs_contract::control::Released as ReleasedStatus;
use virtiofs_contract::preflight::Finding;

use super::Endpoint;
use crate::engine::process::{Population, Purpose};
use crate::engine::start::START_DEADLINE;
use crate::session::Command;
use crate::session::engines::release::{ReleaseOrder, stuck};

/// How long sessions may take: one may have to wait for an engine that is being started, and then for its own to
/// come to rest.
const RELEASE_DEADLINE: Duration = Duration::from_secs(START_DEADLINE.as_secs() + 10);

/// How long ended engines may take until nothing of them is left: the teardown of large guests takes a while.
const GONE_DEADLINE: Duration = Duration::from_secs(10);

/// A release as its endpoint knows it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Released {
    pub(super) until: Instant,
    unix: u64,
}

impl Released {
    fn lasting(longest: Duration) -> Self {
        let end = SystemTime::now() + longest;
        let unix = end.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
        Released { until: Instant::now() + longest, unix }
    }

    pub(super) fn status(&self) -> ReleasedStatus {
        ReleasedStatus { until: self.unix }
    }
}

impl Endpoint {
    /// Has every session let go of the source. Sessions that begin meanwhile do not take it up. Returns the
    /// sessions that wait, and until when (seconds since the Unix epoch).
    ///
    /// # Errors
    /// Why not; every session goes on as before.
    pub(crate) fn release(
        &self,
        longest: Duration,
        force: bool,
        engines: &Population,
    ) -> Result<(Vec<String>, u64), Finding> {
        let _one_at_a_time = self.releasing.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let released = Released::lasting(longest);
        self.starter.bar_trials(&self.place(), released.until);
        let waiting = self.order_release(released, force);
        let result = self.await_release(waiting, released.until, engines);
        match &result {
            Ok(sessions) => tracing::info!(endpoint = self.spec().name, sessions = sessions.len(), "released"),
            Err(_) => self.resume(),
        }
        result.map(|sessions| (sessions, released.unix))
    }

    fn order_release(&self, released: Released, force: bool) -> Vec<(String, Answer)> {
        let mut inner = self.inner();
        inner.released = Some(released);
        let order = |(id, live): (&String, &super::Live)| {
            let (answer, answered) = mpsc::channel();
            let order = ReleaseOrder { until: released.until, force, answer };
            live.post.send(Command::Release(order));
            (id.clone(), answered)
        };
        inner.sessions.iter().map(order).collect()
    }

    fn await_release(
        &self,
        waiting: Vec<(String, Answer)>,
        until: Instant,
        engines: &Population,
    ) -> Result<Vec<String>, Finding> {
        let end = Instant::now() + RELEASE_DEADLINE;
        let mut sessions = Vec::new();
        for (id, answered) in waiting {
            match answered.recv_timeout(end.saturating_duration_since(Instant::now())) {
                Ok(Ok(())) => sessions.push(id),
                Ok(Err(finding)) => return Err(finding),
                Err(RecvTimeoutError::Timeout) => return Err(stuck(&format!("session {id} does not answer"))),
                // It has ended; its engine is waited for below.
                Err(RecvTimeoutError::Disconnected) => {}
            }
        }
        let (name, place) = (self.spec().name, self.place());
        // Once the time is over, sessions start engines anew.
        let longest = || GONE_DEADLINE.min(until.saturating_duration_since(Instant::now()));
        if !self.starter.wait_for_trial(&place, longest()) {
            return Err(stuck("a trial of it is still under way"));
        }
        match engines.wait_until_gone(&[Purpose::Endpoint(name), Purpose::Trial(place.path())], longest()) {
            0 => Ok(sessions),
            left => Err(stuck(&format!("{left} engines are still ending"))),
        }
    }

    /// Has every session take the source up again.
    pub(crate) fn resume(&self) {
        let mut inner = self.inner();
        inner.released = None;
        self.starter.unbar_trials(&inner.place());
        for live in inner.sessions.values() {
            live.post.send(Command::Resume);
        }
    }
}

type Answer = mpsc::Receiver<Result<(), Finding>>;
