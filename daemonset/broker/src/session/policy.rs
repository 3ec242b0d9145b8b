//! Decisions about the engines of a session. Pure: no clock, no I/O.

use std::time::Duration;

use virtiofs_contract::control::SessionState;
use virtiofs_contract::engine::Predecessor;
use virtiofs_contract::preflight::Reason;

/// First and longest pause after an engine could not be started. A source that is missing for a minute must not cost a
/// fork each second, and one that is back must not wait for minutes.
const FIRST_START_PAUSE: Duration = Duration::from_secs(1);
const LONGEST_START_PAUSE: Duration = Duration::from_secs(30);

/// Deaths in a row, without a finished request in between, after which the next engine waits. The second engine that
/// finds a request that kills engines in the ledger answers it with `EIO`, so this many are not about one request.
const DEATHS_WITHOUT_PAUSE: u32 = 5;

/// First and longest pause after that.
const FIRST_DEATH_PAUSE: Duration = Duration::from_millis(100);
const LONGEST_DEATH_PAUSE: Duration = Duration::from_secs(10);

/// Pause before the next attempt if an engine did not quiesce, or if the guest must remount.
pub(crate) const STUCK_PAUSE: Duration = Duration::from_secs(30);

/// Generation of the serving engine, compared with the one that new engines get.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Age {
    Current,
    Outdated,
}

/// Generation of the standby engine, compared with the serving one and with the one that new engines get.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fit {
    /// Newer than the serving engine and not newer than desired. It takes over even if it is not the newest: changes
    /// that follow each other faster than engines start must not keep a session on an old engine for ever.
    Newer,
    /// The same as new engines get, and not newer than the serving one: a replacement if that dies.
    Same,
    /// Neither.
    Outdated,
}

impl Fit {
    /// Compares generations.
    pub(crate) fn of(standby: u64, serving: Option<u64>, target: u64) -> Self {
        match serving {
            Some(serving) if standby > serving && standby <= target => Fit::Newer,
            _ if standby == target => Fit::Same,
            _ => Fit::Outdated,
        }
    }
}

/// The engine that is to serve next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Next {
    None,
    Starting,
    Standby(Fit),
}

/// The engines of a session at one moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Situation {
    pub(crate) serving: Option<Age>,
    pub(crate) next: Next,
    /// True while the next attempt must wait.
    pub(crate) pausing: bool,
    /// True if the serving engine should have a standby: it serves a guest and is not just booting it.
    pub(crate) standby_due: bool,
}

/// The next action.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Action {
    /// Wait for an event.
    Wait,
    /// Start an engine.
    Start,
    /// Let the standby engine serve; there is no other one.
    Promote,
    /// Hand over from the serving engine to the standby.
    HandOver,
    /// Discard the standby, which is outdated.
    DiscardStandby,
}

/// Decides the next action.
pub(crate) fn decide(now: &Situation) -> Action {
    let needs_next = match now.serving {
        None | Some(Age::Outdated) => true,
        Some(Age::Current) => now.standby_due,
    };
    match (now.serving, now.next) {
        (Some(_), Next::Standby(Fit::Outdated)) => Action::DiscardStandby,
        _ if now.pausing => Action::Wait,
        (None, Next::Standby(_)) => Action::Promote,
        (Some(Age::Outdated), Next::Standby(Fit::Newer)) => Action::HandOver,
        (_, Next::None) if needs_next => Action::Start,
        _ => Action::Wait,
    }
}

/// What is known when an engine could not be started.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct StartFailure {
    pub(crate) reason: Reason,
    /// Failures in a row, this one included.
    pub(crate) failures: u32,
    pub(crate) serving: bool,
    /// True if the active configuration is the desired one, or none was ever active.
    pub(crate) converged: bool,
    /// True if the desired configuration is deferred already.
    pub(crate) deferred: bool,
}

/// What to do after an engine could not be started.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct AfterStartFailure {
    pub(crate) pause: Duration,
    /// Defer the desired configuration and use the active one meanwhile, also for a recovery. Only the desired
    /// configuration failed then. Otherwise no engine starts during the pause.
    pub(crate) fall_back: bool,
    /// End the deferral early if the guest unmounts.
    pub(crate) await_unmount: bool,
    /// Record an aborted hand-over.
    pub(crate) aborted: bool,
}

/// Decides what to do after an engine could not be started.
pub(crate) fn after_start_failure(failure: &StartFailure) -> AfterStartFailure {
    let remount = failure.reason == Reason::RemountRequired;
    let fall_back = !failure.converged && !failure.deferred;
    AfterStartFailure {
        pause: if remount { STUCK_PAUSE } else { pause_after_failure(failure.failures) },
        fall_back,
        await_unmount: fall_back && remount,
        aborted: failure.serving && !failure.converged,
    }
}

/// Why a hand-over was aborted before the new engine served.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Abort {
    /// The old engine did not quiesce.
    NotQuiesced,
    /// The new engine failed.
    NewEngineFailed,
}

/// The reason to report for an aborted hand-over, and the pause before the next attempt.
pub(crate) fn after_abort(abort: Abort) -> (Reason, Duration) {
    match abort {
        Abort::NotQuiesced => (Reason::EngineStuck, STUCK_PAUSE),
        Abort::NewEngineFailed => (Reason::EngineFailed, pause_after_failure(1)),
    }
}

/// Deaths in a row, this one included. A death begins a new row unless requests were pending and none has finished
/// since the death before.
pub(crate) fn deaths_in_a_row(before: u32, pending: bool, progress: bool) -> u32 {
    if pending && !progress { before + 1 } else { 1 }
}

/// What to do once a dead engine cannot touch a ring any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct AfterDeath {
    pub(crate) pause: Option<Duration>,
    /// Discard the standby engine and the one that is being started. They were started for a killed or quiesced
    /// predecessor, but it died by a fault: the next engine must know that the pending request may kill it.
    pub(crate) discard_next: bool,
}

/// Decides what to do after a death.
pub(crate) fn after_death(fate: Predecessor, deaths: u32) -> AfterDeath {
    AfterDeath { pause: pause_after_death(deaths), discard_next: fate == Predecessor::Faulted }
}

/// The predecessor to report to a new engine. A standby engine takes over from an engine that is quiesced or killed. It
/// receives `Killed` for both: if the predecessor is quiesced, no request is pending and the value has no effect.
pub(crate) fn predecessor_of_next(serving: bool, last: Predecessor) -> Predecessor {
    if serving { Predecessor::Killed } else { last }
}

/// True if the standby engine can serve the guest. One with another configuration was tested against the mount that
/// the guest had when the engine was started, so it fits that mount only.
pub(crate) fn standby_fits_mount(config_differs: bool, mount_changed: bool) -> bool {
    !(config_differs && mount_changed)
}

/// The next step of a requested release.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ReleaseStep {
    /// An engine is being started; wait for it, then end it.
    Wait,
    /// An engine is stuck in the source.
    Refuse,
    /// Quiesce and end the engines.
    EndEngines,
}

/// Decides the next step of a release. `starting`: an engine is being started, and whether it is overdue.
pub(crate) fn release_step(starting: Option<bool>, terminating: bool) -> ReleaseStep {
    match starting {
        Some(false) => ReleaseStep::Wait,
        Some(true) => ReleaseStep::Refuse,
        None if terminating => ReleaseStep::Refuse,
        None => ReleaseStep::EndEngines,
    }
}

/// The engines of a session as far as its state depends on them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum EngineState {
    /// The source is released.
    Released,
    /// No engine yet, and no error.
    Starting,
    /// The engine was lost; another one is about to take over.
    Recovering,
    /// No engine, because of an error.
    Failed,
    /// An engine is attached, but no ring is started.
    Attached,
    /// An engine serves rings.
    Serving,
}

/// What is known about a session without a serving engine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Absence {
    /// True if an engine was lost.
    pub(crate) lost: bool,
    /// True if the lost engine is still terminating, or the next one is overdue.
    pub(crate) hindered: bool,
    pub(crate) failures: u32,
    pub(crate) deaths: u32,
    /// True if there is a finding.
    pub(crate) finding: bool,
}

/// Classifies a session without a serving engine.
pub(crate) fn absence_state(absence: &Absence) -> EngineState {
    let at_once = !absence.hindered && absence.failures == 0 && pause_after_death(absence.deaths).is_none();
    match absence {
        Absence { lost: true, .. } if at_once => EngineState::Recovering,
        Absence { finding: true, .. } => EngineState::Failed,
        _ => EngineState::Starting,
    }
}

/// The state of a session. `rings_started`: the VMM has started rings; `has_served`: an engine served it before.
pub(crate) fn session_state(engines: EngineState, has_served: bool, rings_started: bool) -> SessionState {
    match engines {
        EngineState::Released => SessionState::Released,
        EngineState::Recovering => SessionState::Recovering,
        EngineState::Failed => SessionState::Failed,
        EngineState::Serving => SessionState::Serving,
        EngineState::Starting | EngineState::Attached if has_served && !rings_started => SessionState::Stopped,
        EngineState::Starting | EngineState::Attached => SessionState::Connecting,
    }
}

/// Pause after an engine could not be started for the `failures`th time in a row.
pub(crate) fn pause_after_failure(failures: u32) -> Duration {
    doubled(FIRST_START_PAUSE, failures.saturating_sub(1)).min(LONGEST_START_PAUSE)
}

/// Pause after the `deaths`th death in a row.
pub(crate) fn pause_after_death(deaths: u32) -> Option<Duration> {
    let beyond = deaths.checked_sub(DEATHS_WITHOUT_PAUSE + 1)?;
    Some(doubled(FIRST_DEATH_PAUSE, beyond).min(LONGEST_DEATH_PAUSE))
}

fn doubled(pause: Duration, times: u32) -> Duration {
    pause.saturating_mul(1 << times.min(16))
}

#[cfg(test)]
mod tests;
