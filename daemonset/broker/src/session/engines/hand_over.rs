//! Giving the rings to the standby engine: at once if nobody has them, else by a hand-over.

use std::mem;
use std::time::{Duration, Instant};

use virtiofs_contract::control::ReplacementOutcome;

use super::active::{Active, Current, Next, REMOUNT_PAUSE, fits_mount};
use super::states::{LossCause, Serving, StopFailed, Stopped};
use super::{Common, DeviceState, Revision};
use crate::engine::attached::AttachError;
use crate::engine::finding;
use crate::session::policy::{self, Abort};

/// Time within which the rings must stop. An engine with longer requests keeps serving.
pub(super) const QUIESCE_DEADLINE: Duration = Duration::from_secs(2);

impl Active {
    /// Gives the rings, which nobody has, to the standby engine.
    pub(super) fn promote(&mut self, common: &mut Common, device: &mut DeviceState<'_>) {
        let standby = match mem::take(&mut self.next) {
            Next::Standby(standby) => standby,
            other => return self.next = other,
        };
        let lost = self.lost();
        match standby.take_rings(device) {
            Ok(serving) => self.serve(serving, lost, common),
            Err((engine, error)) => self.kill(Serving::new(engine), lost, LossCause::Error(error), common, device),
        }
    }

    fn serve(&mut self, serving: Serving, lost: Option<Instant>, common: &mut Common) {
        let engine = &serving.engine.engine;
        if let Some(lost) = lost {
            let pause = lost.elapsed();
            common.statistics.replacements.recoveries.record(pause.as_nanos() as u64);
            common.statistics.replaced(ReplacementOutcome::Recovered, pause, None);
            tracing::info!(session = common.session, engine_pid = engine.process.pid(), ?pause, "session recovered");
        }
        let generation = engine.generation;
        common.revisions.active = Some(Revision { config: engine.config.clone(), generation });
        common.statistics.served += 1;
        if generation == common.revisions.desired.generation {
            common.finding = None;
        }
        self.current = Current::Serving(serving);
    }

    /// Hands the rings over from the serving engine to the standby, between two requests.
    pub(super) fn hand_over(&mut self, common: &mut Common, device: &mut DeviceState<'_>) {
        let (old, standby) = match (self.take_current(), mem::take(&mut self.next)) {
            (Current::Serving(old), Next::Standby(standby)) => (old, standby),
            (current, next) => return (self.current, self.next) = (current, next),
        };
        let begin = Instant::now();
        let stopped = match old.stop_rings(QUIESCE_DEADLINE, device.journal) {
            Ok(stopped) => stopped,
            Err(StopFailed::NotQuiesced(stopped, error)) => {
                self.next = Next::Standby(standby);
                return self.abort(stopped, Abort::NotQuiesced, &error, begin, common, device);
            }
            Err(StopFailed::Lost(old, error)) => {
                self.next = Next::Standby(standby);
                return self.kill(old, None, LossCause::Error(error), common, device);
            }
        };
        // Check again now that the guest cannot mount any more.
        if !fits_mount(&standby, common) {
            self.retry_at = Some(begin + REMOUNT_PAUSE);
            self.next = Next::Standby(standby);
            return self.resume(stopped, common, device);
        }
        match standby.take_rings(device) {
            Ok(serving) => {
                let (pause, engine_pid) = (begin.elapsed(), serving.engine.engine.process.pid());
                common.statistics.replacements.hand_overs.record(pause.as_nanos() as u64);
                common.statistics.replaced(ReplacementOutcome::HandedOver, pause, None);
                tracing::info!(session = common.session, engine_pid, ?pause, "handed over");
                self.serve(serving, None, common);
            }
            Err((engine, error)) if !engine.serves() => {
                drop(engine);
                self.abort(stopped, Abort::NewEngineFailed, &error, begin, common, device);
            }
            // The new engine may have served requests already, so the state of the old one is outdated.
            Err((engine, error)) => {
                drop(stopped);
                self.kill(Serving::new(engine), None, LossCause::Error(error), common, device);
            }
        }
    }

    /// Aborts a hand-over: the old engine continues to serve.
    fn abort(
        &mut self,
        old: Stopped,
        abort: Abort,
        error: &AttachError,
        begin: Instant,
        common: &mut Common,
        device: &mut DeviceState<'_>,
    ) {
        let (reason, pause) = policy::after_abort(abort);
        let finding = finding(
            reason,
            format!("engine (process {}) was not replaced: {error}", old.pid()),
            "check that the file system of the source responds, and the engines' log lines; it is tried again",
        );
        tracing::warn!(session = common.session, %finding, ?pause, "hand-over aborted");
        common.statistics.replacements.aborted += 1;
        self.retry_at = Some(Instant::now() + pause);
        self.resume(old, common, device);
        common.statistics.replaced(ReplacementOutcome::Aborted, begin.elapsed(), Some(finding.clone()));
        if self.serving().is_some() {
            common.finding = Some(finding);
        }
    }

    /// Lets a stopped engine serve again.
    pub(super) fn resume(&mut self, stopped: Stopped, common: &mut Common, device: &mut DeviceState<'_>) {
        match stopped.resume(device) {
            Ok(serving) => self.current = Current::Serving(serving),
            Err((serving, error)) => self.kill(serving, None, LossCause::Error(error), common, device),
        }
    }
}
