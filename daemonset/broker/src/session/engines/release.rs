//! Releasing the source, so that the host can unmount it. The guest waits meanwhile.
//!
//! Nothing of the source stays open: a start that is in progress is awaited and its engine ended; the serving engine
//! quiesces and ends, and so does the standby. The ledger holds what the next engine needs.

use std::mem;
use std::sync::mpsc;
use std::time::Instant;

use virtiofs_contract::engine::Predecessor;
use virtiofs_contract::preflight::{Finding, Reason};

use super::active::{Active, Current, Next};
use super::hand_over::QUIESCE_DEADLINE;
use super::states::{LossCause, StopFailed};
use super::{Common, DeviceState, Engines, Phase};
use crate::engine::finding;
use crate::session::policy::{ReleaseStep, release_step};

/// A request to release the source.
#[derive(Debug)]
pub(crate) struct ReleaseRequest {
    /// When the session resumes by itself.
    pub(crate) until: Instant,
    /// Release even if the guest loses open files.
    pub(crate) force: bool,
    /// Receives the result. On an error the session serves as before.
    pub(crate) reply: mpsc::Sender<Result<(), Finding>>,
}

/// A release that is in progress.
pub(super) type PendingRelease = ReleaseRequest;

impl Engines {
    /// Releases the source, or sets a new deadline if it is released.
    pub(crate) fn release(&mut self, request: ReleaseRequest) {
        let unused = |active: &Active| {
            matches!((&active.current, &active.next), (Current::Vacant { .. }, Next::None))
                && self.common.persistent.stash.count() == 0
        };
        match mem::replace(&mut self.phase, Phase::Released { until: request.until }) {
            Phase::Active(active) if !unused(&active) => self.phase = Phase::Releasing(active, request),
            Phase::Releasing(active, _) => self.phase = Phase::Releasing(active, request),
            Phase::Active(_) | Phase::Released { .. } => reply(&request.reply, Ok(())),
        }
    }

    /// Uses the source again.
    pub(crate) fn resume(&mut self) {
        match mem::replace(&mut self.phase, Phase::Active(Active::default())) {
            Phase::Active(active) => return self.phase = Phase::Active(active),
            Phase::Releasing(mut active, _) => {
                active.retry_now();
                self.phase = Phase::Active(active);
            }
            Phase::Released { .. } => {}
        }
        tracing::info!(session = self.common.session, "source resumed");
        self.common.history.failures = 0;
    }

    pub(super) fn check_release_deadline(&mut self) {
        let now = Instant::now();
        match &self.phase {
            Phase::Releasing(_, pending) if pending.until <= now => {
                self.refuse_release(stuck("its time ended before the source was released"));
            }
            Phase::Released { until } if *until <= now => {
                tracing::warn!(session = self.common.session, "release time has ended");
                self.resume();
            }
            _ => {}
        }
    }

    /// Continues a release as far as possible now. The start of an engine arrives as a command.
    pub(super) fn continue_release(&mut self, device: &mut DeviceState<'_>) {
        let Phase::Releasing(active, pending) = &mut self.phase else { return };
        let result = match release_step(active.starting(), active.is_terminating()) {
            ReleaseStep::Wait => return,
            ReleaseStep::Refuse => Err(stuck("an engine is stuck in the source")),
            ReleaseStep::EndEngines => end_engines(active, pending.force, &mut self.common, device),
        };
        match result {
            Ok(()) => self.released(),
            Err(finding) => self.refuse_release(finding),
        }
    }

    /// Dropping the active engines closes what they have open.
    fn released(&mut self) {
        let Phase::Releasing(_, pending) = &self.phase else { return };
        let (until, sender) = (pending.until, pending.reply.clone());
        self.phase = Phase::Released { until };
        self.common.persistent.stash.clear();
        self.common.finding = None;
        tracing::info!(session = self.common.session, "source released");
        reply(&sender, Ok(()));
    }

    fn refuse_release(&mut self, why: Finding) {
        tracing::warn!(session = self.common.session, finding = %why, "source not released");
        match mem::replace(&mut self.phase, Phase::Active(Active::default())) {
            Phase::Releasing(active, pending) => {
                self.phase = Phase::Active(active);
                reply(&pending.reply, Err(why));
            }
            other => self.phase = other,
        }
    }
}

/// Ends the serving engine between two requests.
///
/// # Errors
/// The engine serves as before, or was lost.
fn end_engines(
    active: &mut Active,
    force: bool,
    common: &mut Common,
    device: &mut DeviceState<'_>,
) -> Result<(), Finding> {
    let serving = match active.take_current() {
        Current::Serving(serving) => serving,
        other => {
            active.current = other;
            return check_orphaned(common, force);
        }
    };
    match serving.stop_rings(QUIESCE_DEADLINE, device.journal) {
        Ok(stopped) => {
            stopped.drain_stash();
            if let Err(orphaned) = check_orphaned(common, force) {
                active.resume(stopped, common, device);
                return Err(orphaned);
            }
            common.history.predecessor = Predecessor::Quiesced;
            Ok(())
        }
        Err(StopFailed::NotQuiesced(stopped, error)) => {
            active.resume(stopped, common, device);
            Err(stuck(&error.to_string()))
        }
        Err(StopFailed::Lost(serving, error)) => {
            active.kill(serving, None, LossCause::Error(error), common, device);
            if active.is_terminating() {
                return Err(stuck("its engine is still running after SIGKILL"));
            }
            check_orphaned(common, force)
        }
    }
}

fn check_orphaned(common: &Common, force: bool) -> Result<(), Finding> {
    if force {
        return Ok(());
    }
    match common.persistent.stash.count_orphaned() {
        None => Err(stuck("the file system of its open files does not answer")),
        Some(files) if files > 0 => Err(finding(
            Reason::OrphanedFilesOpen,
            format!("session {}: {files} open files have no name and would be lost", common.session),
            "close them in the guest (or end the programs that use them), or release with force",
        )),
        _ => Ok(()),
    }
}

fn reply(sender: &mpsc::Sender<Result<(), Finding>>, result: Result<(), Finding>) {
    // The receiver is gone if the broker has given this session up as stuck.
    let _ = sender.send(result);
}

/// The finding for a source that is not released.
pub(crate) fn stuck(why: &str) -> Finding {
    finding(
        Reason::EngineStuck,
        format!("the source was not released: {why}"),
        "check that the file system of the source responds, then release it again; sessions continue as before",
    )
}
