//! The engines of a session while the source is in use: the one that has the rings, and the one that is to have them
//! next.

use std::mem;
use std::os::fd::BorrowedFd;
use std::time::{Duration, Instant};

use super::states::{self, LossCause, Serving, Standby, Starting, Terminating, watched};
use super::{Common, DeviceState, EngineEvent, Role};
use crate::engine::attached::Attached;
use crate::engine::start::hung;
use crate::session::policy::{self, Absence, Action, Age, EngineState, Fit, Next as NextSituation, Situation, decide};

/// Interval at which a terminating engine is checked.
const TERMINATION_POLL: Duration = Duration::from_millis(100);

/// Pause if the guest mounted while an engine was prepared: a guest that mounts in a loop must not start engines in a
/// loop.
pub(super) const REMOUNT_PAUSE: Duration = Duration::from_millis(100);

/// Delay between the start of an engine and that of its standby, so that a booting VM does not compete with it.
const STANDBY_DELAY: Duration = Duration::from_millis(200);

/// Time for which a VMM's messages wait in its socket while an engine is replaced. Then they are answered from the
/// record.
const RECOVERY_PATIENCE: Duration = Duration::from_secs(3);

/// Who has the rings.
#[derive(Debug)]
pub(super) enum Current {
    /// Nobody. `lost`: when the last engine was lost, if one was.
    Vacant { lost: Option<Instant> },
    /// An engine.
    Serving(Serving),
    /// A killed engine that is stuck in a system call.
    Terminating { engine: Terminating, lost: Instant },
}

/// Who is to have the rings next.
#[derive(Debug, Default)]
pub(super) enum Next {
    #[default]
    None,
    Starting(Starting),
    Standby(Standby),
}

/// The engines of a session while the source is in use.
#[derive(Debug)]
pub(super) struct Active {
    pub(super) current: Current,
    pub(super) next: Next,
    /// No engine is started, promoted or handed over to before this.
    pub(super) retry_at: Option<Instant>,
}

impl Default for Active {
    fn default() -> Self {
        Active { current: Current::Vacant { lost: None }, next: Next::None, retry_at: None }
    }
}

impl Active {
    pub(super) fn serving(&self) -> Option<&Attached> {
        match &self.current {
            Current::Serving(serving) => Some(&serving.engine),
            _ => None,
        }
    }

    pub(super) fn serving_mut(&mut self) -> Option<&mut Attached> {
        match &mut self.current {
            Current::Serving(serving) => Some(&mut serving.engine),
            _ => None,
        }
    }

    /// When the last engine was lost, until another one serves.
    pub(super) fn lost(&self) -> Option<Instant> {
        match &self.current {
            Current::Vacant { lost } => *lost,
            Current::Terminating { lost, .. } => Some(*lost),
            Current::Serving(_) => None,
        }
    }

    pub(super) fn is_recovering(&self) -> bool {
        self.lost().is_some_and(|lost| lost.elapsed() < RECOVERY_PATIENCE)
    }

    pub(super) fn is_terminating(&self) -> bool {
        matches!(self.current, Current::Terminating { .. })
    }

    /// Whether an engine is being started, and whether it is overdue.
    pub(super) fn starting(&self) -> Option<bool> {
        match &self.next {
            Next::Starting(starting) => Some(starting.overdue),
            _ => None,
        }
    }

    pub(super) fn state(&self, common: &Common) -> EngineState {
        match self.serving() {
            Some(engine) if engine.serves() => EngineState::Serving,
            Some(_) => EngineState::Attached,
            None => policy::absence_state(&Absence {
                lost: self.lost().is_some(),
                hindered: self.is_terminating() || self.starting() == Some(true),
                failures: common.history.failures,
                deaths: common.history.deaths,
                finding: common.finding.is_some(),
            }),
        }
    }

    pub(super) fn watched(&self) -> Vec<(EngineEvent, BorrowedFd<'_>)> {
        let serving = self.serving().map(|engine| watched(Role::Serving, engine));
        let standby = match &self.next {
            Next::Standby(standby) => Some(watched(Role::Standby, &standby.engine)),
            _ => None,
        };
        serving.into_iter().flatten().chain(standby.into_iter().flatten()).collect()
    }

    /// Times at which timers must be checked, past ones included.
    pub(super) fn deadlines(&self, now: Instant) -> Vec<Instant> {
        let next = match &self.next {
            Next::Starting(starting) => Some(starting.deadline(now)).filter(|_| !starting.overdue),
            Next::None => self.standby_due_at(),
            Next::Standby(_) => None,
        };
        let termination = self.is_terminating().then(|| now + TERMINATION_POLL);
        let patience = self.lost().map(|lost| lost + RECOVERY_PATIENCE);
        [next, self.retry_at, termination, patience].into_iter().flatten().collect()
    }

    /// When the serving engine should get a standby: once it serves a guest.
    fn standby_due_at(&self) -> Option<Instant> {
        match &self.current {
            Current::Serving(serving) if serving.engine.serves() => Some(serving.since + STANDBY_DELAY),
            _ => None,
        }
    }

    /// Ends the pause before the next attempt.
    pub(super) fn retry_now(&mut self) {
        self.retry_at = None;
    }

    /// Forgets the engine that is being started; it ends when it is dropped.
    pub(super) fn discard_start(&mut self) {
        if matches!(self.next, Next::Starting(_)) {
            self.next = Next::None;
        }
    }

    // Events.

    pub(super) fn handle(&mut self, events: &[EngineEvent], common: &mut Common, device: &mut DeviceState<'_>) {
        let session = common.session.clone();
        if self.serving_mut().is_some_and(|engine| states::handle(engine, Role::Serving, events, &session)) {
            self.lose(LossCause::Exited, common, device);
        }
        if let Next::Standby(standby) = &mut self.next
            && states::handle(&mut standby.engine, Role::Standby, events, &session)
        {
            let (finding, mounts) = (standby.engine.engine.exit_finding(&session), standby.mounts);
            self.next = Next::None;
            self.start_failed(finding, mounts, common);
        }
    }

    pub(super) fn sync(&mut self, common: &mut Common, device: &mut DeviceState<'_>) {
        if let Some(serving) = self.serving_mut()
            && let Err(error) = serving.sync(device.record, device.journal)
        {
            self.lose(LossCause::Error(error), common, device);
        }
        if let Next::Standby(standby) = &mut self.next
            && let Err(error) = standby.engine.prepare(device.record, device.journal)
        {
            tracing::warn!(session = common.session, %error, "standby engine discarded");
            self.next = Next::None;
        }
    }

    pub(super) fn check_timers(&mut self, common: &mut Common) {
        let now = Instant::now();
        self.retry_at = self.retry_at.filter(|at| *at > now);
        self.check_termination(common);
        if let Next::Starting(starting) = &mut self.next
            && !starting.overdue
            && starting.deadline(now) <= now
        {
            starting.overdue = true;
            let finding = hung(&common.service.location.path());
            tracing::warn!(session = common.session, %finding, "engine start overdue");
            common.finding = Some(finding);
        }
    }

    // Transitions.

    pub(super) fn advance(&mut self, common: &mut Common, device: &mut DeviceState<'_>) {
        loop {
            if matches!(&self.next, Next::Standby(standby) if !fits_mount(standby, common)) {
                self.next = Next::None;
                self.retry_at = Some(Instant::now() + REMOUNT_PAUSE);
            }
            match decide(&self.situation(common)) {
                Action::Wait => return,
                Action::Start => return self.start(common),
                Action::DiscardStandby => self.next = Next::None,
                Action::Promote => self.promote(common, device),
                Action::HandOver => self.hand_over(common, device),
            }
        }
    }

    fn situation(&self, common: &Common) -> Situation {
        let target = common.revisions.target().generation;
        let serving = self.serving().map(|engine| engine.engine.generation);
        let next = match &self.next {
            Next::None => NextSituation::None,
            Next::Starting(_) => NextSituation::Starting,
            Next::Standby(it) => NextSituation::Standby(Fit::of(it.engine.engine.generation, serving, target)),
        };
        Situation {
            serving: serving.map(|it| if it == target { Age::Current } else { Age::Outdated }),
            next,
            pausing: self.retry_at.is_some() || self.is_terminating(),
            standby_due: self.standby_due_at().is_some_and(|due| due <= Instant::now()),
        }
    }

    /// Takes the current engine. The caller must set the new state.
    pub(super) fn take_current(&mut self) -> Current {
        mem::replace(&mut self.current, Current::Vacant { lost: None })
    }
}

/// True if the standby engine can serve the mount that the guest has now.
pub(super) fn fits_mount(standby: &Standby, common: &Common) -> bool {
    let config = &standby.engine.engine.config;
    let differs = common.revisions.active.as_ref().is_some_and(|active| active.config != *config);
    policy::standby_fits_mount(differs, standby.mounts != common.persistent.mounts())
}
