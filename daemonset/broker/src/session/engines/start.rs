//! Starting an engine, which becomes the standby.

use std::mem;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

use virtiofs_contract::control::ReplacementOutcome;
use virtiofs_contract::preflight::{Finding, Reason};

use super::active::{Active, Next};
use super::states::{Mounts, Standby, Starting};
use super::{Common, Deferral, DeviceState, Revision};
use crate::engine::attached::Attached;
use crate::engine::finding;
use crate::engine::start::{Engine, Job};
use crate::session::Command;
use crate::session::policy::{self, StartFailure};

impl Active {
    /// Has an engine started, by a thread of its own because the source may hang. The result comes as a command.
    pub(super) fn start(&mut self, common: &mut Common) {
        let Revision { config, generation } = common.revisions.target().clone();
        let job = Job {
            session: common.session.clone(),
            endpoint: common.service.endpoint.clone(),
            location: common.service.location.clone(),
            config,
            generation,
            predecessor: policy::predecessor_of_next(self.serving().is_some(), common.history.predecessor),
            hold: common.service.hold.clone(),
            unknown: common.service.unknown.clone(),
        };
        let mounts = common.persistent.mounts();
        let starter = common.service.starter.clone();
        let (persistent, commands) = (common.persistent.clone(), common.commands.clone());
        let start = move || {
            let result = starter.start(&job, &persistent);
            commands.send(Command::EngineStarted(Box::new(result)));
        };
        let begun = Arc::default();
        let (payer, urgent) = (&common.service.payer, self.lost().is_some());
        common.service.starter.queue.add(payer, urgent, common.persistent.clone(), Arc::clone(&begun), start);
        self.next = Next::Starting(Starting { begun, overdue: false, mounts, discard: false });
    }

    pub(super) fn engine_started(
        &mut self,
        result: Result<Engine, Finding>,
        common: &mut Common,
        device: &mut DeviceState<'_>,
    ) {
        let starting = match mem::take(&mut self.next) {
            Next::Starting(starting) => starting,
            // Nothing waits for it: it was requested before a release.
            other => return self.next = other,
        };
        if starting.discard {
            return;
        }
        match result.and_then(|engine| prepare(engine, common, device)) {
            Ok(engine) => {
                common.history.failures = 0;
                self.next = Next::Standby(Standby { engine, mounts: starting.mounts });
                if self.serving().is_some() && common.revisions.deferral.is_none() {
                    common.finding = None;
                }
            }
            Err(finding) => self.start_failed(finding, starting.mounts, common),
        }
    }

    pub(super) fn start_failed(&mut self, finding: Finding, mounts: Mounts, common: &mut Common) {
        common.history.failures += 1;
        let after = policy::after_start_failure(&StartFailure {
            reason: finding.reason,
            failures: common.history.failures,
            serving: self.serving().is_some(),
            converged: common.revisions.converged(),
            deferred: common.revisions.deferral.is_some(),
        });
        let (pause, fall_back) = (after.pause, after.fall_back);
        if !common.service.quiet.load(Relaxed) {
            tracing::warn!(session = common.session, %finding, ?pause, fall_back, "engine not started");
        }
        if after.aborted {
            common.statistics.replaced(ReplacementOutcome::Aborted, Duration::ZERO, Some(finding.clone()));
        }
        let until = Instant::now() + pause;
        if fall_back {
            common.revisions.deferral = Some(Deferral { until, unmounts: after.await_unmount.then_some(mounts.1) });
        } else {
            self.retry_at = Some(until);
        }
        common.finding = Some(finding);
    }
}

/// Sends a new engine what it can have before it gets the rings.
fn prepare(engine: Engine, common: &mut Common, device: &mut DeviceState<'_>) -> Result<Box<Attached>, Finding> {
    common.statistics.started += 1;
    if !common.service.quiet.load(Relaxed) {
        tracing::info!(session = common.session, engine_pid = engine.process.pid(), "engine ready");
    }
    let mut engine = Box::new(Attached::new(engine));
    if let Err(error) = engine.prepare(device.record, device.journal) {
        return Err(finding(
            Reason::EngineFailed,
            format!("engine (process {}) failed before it served: {error}", engine.engine.process.pid()),
            "see the engine's log lines; it is tried again",
        ));
    }
    engine.engine.process.watch_threads();
    Ok(engine)
}
