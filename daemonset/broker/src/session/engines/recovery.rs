//! Losing an engine: it is killed and reaped before another one gets the rings.

use std::time::Instant;

use virtiofs_contract::preflight::Reason;

use super::active::{Active, Current, Next};
use super::states::{Dead, Killed, LossCause, Serving};
use super::{Common, DeviceState};
use crate::descriptor::Descriptor;
use crate::engine::finding;
use crate::engine::start::Leftover;
use crate::guest_memory::{has_requests, used_index};
use crate::record::SessionRecord;
use crate::session::policy;

impl Active {
    /// Kills the serving engine, if there is one.
    pub(super) fn lose(&mut self, cause: LossCause, common: &mut Common, device: &mut DeviceState<'_>) {
        match self.take_current() {
            Current::Serving(serving) => self.kill(serving, None, cause, common, device),
            other => self.current = other,
        }
    }

    /// Kills an engine that had the rings. No other engine gets them before no thread of it can touch them. `lost`: when
    /// the recovery began in which it failed, if it never served.
    pub(super) fn kill(
        &mut self,
        serving: Serving,
        lost: Option<Instant>,
        cause: LossCause,
        common: &mut Common,
        device: &mut DeviceState<'_>,
    ) {
        let lost = lost.unwrap_or_else(Instant::now);
        if let Err(error) = device.journal.begin_change() {
            tracing::error!(session = common.session, %error, "death of an engine not recorded");
        }
        let pid = serving.engine.engine.process.pid();
        let mut killed = serving.kill();
        count_death(common, device.record);
        let last_line = killed.last_line(&common.session);
        match killed {
            Killed::Dead(dead) => {
                self.current = Current::Vacant { lost: Some(lost) };
                self.reap(dead, format!("engine (process {pid}) lost: {cause}{last_line}"), common);
            }
            Killed::Terminating(engine) => {
                self.current = Current::Terminating { engine, lost };
                let stuck = finding(
                    Reason::EngineStuck,
                    format!("engine (process {pid}) lost: {cause}{last_line}; killed, but stuck in a system call"),
                    "check the file system of the source; the guest continues once it responds or the process ends",
                );
                tracing::error!(session = common.session, finding = %stuck, "engine still running after SIGKILL");
                common.finding = Some(stuck);
            }
        }
    }

    /// Engines of an earlier broker may still have the rings: they are killed, and no other engine gets the rings before.
    pub(super) fn end_leftovers(&mut self, engines: Vec<Leftover>, common: &mut Common) {
        let lost = Instant::now();
        if engines.is_empty() {
            return self.current = Current::Vacant { lost: Some(lost) };
        }
        match Killed::leftovers(engines) {
            Killed::Dead(dead) => {
                self.current = Current::Vacant { lost: Some(lost) };
                self.reap(dead, "the engine did not outlive the broker".into(), common);
            }
            Killed::Terminating(engine) => {
                let stuck = finding(
                    Reason::EngineStuck,
                    format!("engine (process {}) of an earlier broker still runs after SIGKILL", engine.pid()),
                    "check the file system of the source; the guest continues once it responds or the process ends",
                );
                tracing::error!(session = common.session, finding = %stuck, "engine still running after SIGKILL");
                common.finding = Some(stuck);
                self.current = Current::Terminating { engine, lost };
            }
        }
    }

    pub(super) fn check_termination(&mut self, common: &mut Common) {
        let (engine, lost) = match self.take_current() {
            Current::Terminating { engine, lost } => (engine, lost),
            other => return self.current = other,
        };
        let pid = engine.pid();
        match engine.check() {
            Killed::Dead(dead) => {
                self.current = Current::Vacant { lost: Some(lost) };
                self.reap(dead, format!("engine (process {pid}) ended after SIGKILL"), common);
            }
            Killed::Terminating(engine) => self.current = Current::Terminating { engine, lost },
        }
    }

    fn reap(&mut self, dead: Dead, message: String, common: &mut Common) {
        let fate = dead.reap();
        let deaths = common.history.deaths;
        common.history.predecessor = fate;
        let after = policy::after_death(fate, deaths);
        self.retry_at = after.pause.map(|pause| Instant::now() + pause);
        tracing::warn!(session = common.session, ?fate, deaths, pause = ?after.pause, "{message}");
        let remedy = "another engine takes over; see the log lines of the lost one";
        common.finding = Some(finding(Reason::EngineFailed, message, remedy));
        if after.discard_next {
            match &mut self.next {
                Next::Starting(starting) => starting.discard = true,
                next => *next = Next::None,
            }
        }
    }
}

fn count_death(common: &mut Common, record: &SessionRecord<Descriptor>) {
    let rings = 0..record.rings.len();
    let positions: Vec<_> = rings.clone().map(|ring| used_index(record, ring).ok()).collect();
    let pending = rings.into_iter().any(|ring| record.servable(ring) && has_requests(record, ring));
    let history = &mut common.history;
    history.deaths = policy::deaths_in_a_row(history.deaths, pending, positions != history.positions);
    history.positions = positions;
}
