//! Releasing a source: all sessions of an endpoint release it, or none does.

use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use virtiofs_contract::control::Released as ReleasedStatus;
use virtiofs_contract::preflight::Finding;

use super::Endpoint;
use crate::engine::process::{ProcessTable, Purpose};
use crate::engine::start::START_DEADLINE;
use crate::session::Command;
use crate::session::engines::release::{ReleaseRequest, stuck};

/// Time within which sessions must release: one may wait for an engine that is being started, and then for its own to
/// quiesce.
const RELEASE_DEADLINE: Duration = Duration::from_secs(START_DEADLINE.as_secs() + 10);

/// Time within which ended engines must be reaped: the teardown of large guest memory takes a while.
const GONE_DEADLINE: Duration = Duration::from_secs(10);

/// A release of an endpoint.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Released {
    pub(super) until: Instant,
    pub(super) unix: u64,
}

impl Released {
    fn lasting(longest: Duration) -> Self {
        let end = SystemTime::now() + longest;
        let unix = end.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
        Released { until: Instant::now() + longest, unix }
    }

    /// That of an earlier broker, which ends at this time; none: it has ended.
    pub(super) fn until(unix: u64) -> Option<Self> {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).ok()?;
        let left = Duration::from_secs(unix).checked_sub(now)?;
        Some(Released { until: Instant::now() + left, unix })
    }

    pub(super) fn status(&self) -> ReleasedStatus {
        ReleasedStatus { until: self.unix }
    }
}

impl Endpoint {
    /// Releases the source in every session. Sessions that begin meanwhile do not use it. Returns the sessions that wait,
    /// and the time at which they resume (seconds since the Unix epoch).
    ///
    /// # Errors
    /// The source was not released, and every session continues as before.
    pub(crate) fn release(
        &self,
        longest: Duration,
        force: bool,
        engines: &ProcessTable,
    ) -> Result<(Vec<String>, u64), Finding> {
        let _one_at_a_time = self.releasing.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let released = Released::lasting(longest);
        self.host.starter.bar_preflights(&self.location(), released.until);
        let waiting = self.request_release(released, force);
        let result = self.await_release(waiting, released.until, engines);
        match &result {
            Ok(sessions) => {
                self.inner().save();
                tracing::info!(endpoint = self.spec().name, sessions = sessions.len(), "released");
            }
            Err(_) => self.resume(),
        }
        result.map(|sessions| (sessions, released.unix))
    }

    fn request_release(&self, released: Released, force: bool) -> Vec<(String, Reply)> {
        let mut inner = self.inner();
        inner.released = Some(released);
        let request = |(id, live): (&String, &super::LiveSession)| {
            let (reply, result) = mpsc::channel();
            let request = ReleaseRequest { until: released.until, force, reply };
            live.sender.send(Command::Release(request));
            (id.clone(), result)
        };
        inner.sessions.iter().map(request).collect()
    }

    fn await_release(
        &self,
        waiting: Vec<(String, Reply)>,
        until: Instant,
        engines: &ProcessTable,
    ) -> Result<Vec<String>, Finding> {
        let end = Instant::now() + RELEASE_DEADLINE;
        let mut sessions = Vec::new();
        for (id, reply) in waiting {
            match reply.recv_timeout(end.saturating_duration_since(Instant::now())) {
                Ok(Ok(())) => sessions.push(id),
                Ok(Err(finding)) => return Err(finding),
                Err(RecvTimeoutError::Timeout) => return Err(stuck(&format!("session {id} does not respond"))),
                // The session has ended; its engine is awaited below.
                Err(RecvTimeoutError::Disconnected) => {}
            }
        }
        let (name, location) = (self.spec().name, self.location());
        // After the release time, sessions start engines again.
        let longest = || GONE_DEADLINE.min(until.saturating_duration_since(Instant::now()));
        if !self.host.starter.wait_for_preflight(&location, longest()) {
            return Err(stuck("a preflight of it is still running"));
        }
        match engines.wait_until_gone(&[Purpose::Endpoint(name), Purpose::Preflight(location.path())], longest()) {
            0 => Ok(sessions),
            left => Err(stuck(&format!("{left} engines are still ending"))),
        }
    }

    /// Resumes the source in every session.
    pub(crate) fn resume(&self) {
        let mut inner = self.inner();
        inner.released = None;
        inner.save();
        self.host.starter.unbar_preflights(&inner.location());
        for live in inner.sessions.values() {
            live.sender.send(Command::Resume);
        }
    }
}

type Reply = mpsc::Receiver<Result<(), Finding>>;
