use super::*;

const IDLE: Situation = Situation { serving: None, next: Next::None, pausing: false, standby_due: false };
const CURRENT: Situation = Situation { serving: Some(Age::Current), ..IDLE };
const OUTDATED: Situation = Situation { serving: Some(Age::Outdated), ..IDLE };
const NEWER: Next = Next::Standby(Fit::Newer);
const SAME: Next = Next::Standby(Fit::Same);
const OLD: Next = Next::Standby(Fit::Outdated);

#[test]
fn every_situation_has_one_action() {
    let table = [
        (IDLE, Action::Start),
        (Situation { next: Next::Starting, ..IDLE }, Action::Wait),
        (Situation { pausing: true, ..IDLE }, Action::Wait),
        (Situation { next: SAME, ..IDLE }, Action::Promote),
        (Situation { next: OLD, ..IDLE }, Action::Promote),
        (Situation { next: NEWER, ..IDLE }, Action::Promote),
        (Situation { next: SAME, pausing: true, ..IDLE }, Action::Wait),
        (CURRENT, Action::Wait),
        (Situation { standby_due: true, ..CURRENT }, Action::Start),
        (Situation { standby_due: true, pausing: true, ..CURRENT }, Action::Wait),
        (Situation { standby_due: true, next: Next::Starting, ..CURRENT }, Action::Wait),
        (Situation { standby_due: true, next: SAME, ..CURRENT }, Action::Wait),
        (Situation { next: OLD, ..CURRENT }, Action::DiscardStandby),
        (Situation { next: OLD, pausing: true, ..CURRENT }, Action::DiscardStandby),
        (OUTDATED, Action::Start),
        (Situation { next: Next::Starting, ..OUTDATED }, Action::Wait),
        (Situation { next: OLD, ..OUTDATED }, Action::DiscardStandby),
        (Situation { next: NEWER, ..OUTDATED }, Action::HandOver),
        (Situation { next: NEWER, pausing: true, ..OUTDATED }, Action::Wait),
    ];
    for (situation, action) in table {
        assert_eq!(decide(&situation), action, "{situation:?}");
    }
}

#[test]
fn standby_fits_by_generation() {
    let table = [
        (2, Some(1), 2, Fit::Newer),
        (2, Some(1), 3, Fit::Newer),
        (2, Some(2), 2, Fit::Same),
        (2, None, 2, Fit::Same),
        (1, Some(1), 2, Fit::Outdated),
        (1, Some(2), 3, Fit::Outdated),
        (3, Some(1), 2, Fit::Outdated),
        (1, None, 2, Fit::Outdated),
    ];
    for (standby, serving, target, fit) in table {
        assert_eq!(Fit::of(standby, serving, target), fit, "{standby} {serving:?} {target}");
    }
}

#[test]
fn failed_start_falls_back_only_to_another_active_config() {
    let first =
        StartFailure { reason: Reason::SourceMissing, failures: 1, serving: false, converged: true, deferred: false };
    let plain =
        AfterStartFailure { pause: Duration::from_secs(1), fall_back: false, await_unmount: false, aborted: false };
    let remount = StartFailure { reason: Reason::RemountRequired, serving: true, converged: false, ..first };
    let table = [
        (first, plain),
        (StartFailure { serving: true, ..first }, plain),
        (StartFailure { failures: 3, ..first }, AfterStartFailure { pause: Duration::from_secs(4), ..plain }),
        (StartFailure { converged: false, ..first }, AfterStartFailure { fall_back: true, ..plain }),
        (StartFailure { converged: false, deferred: true, ..first }, plain),
        (
            StartFailure { converged: false, serving: true, ..first },
            AfterStartFailure { fall_back: true, aborted: true, ..plain },
        ),
        (remount, AfterStartFailure { pause: STUCK_PAUSE, fall_back: true, await_unmount: true, aborted: true }),
        (StartFailure { converged: true, ..remount }, AfterStartFailure { pause: STUCK_PAUSE, ..plain }),
    ];
    for (failure, after) in table {
        assert_eq!(after_start_failure(&failure), after, "{failure:?}");
    }
}

#[test]
fn start_failures_back_off() {
    let pauses: Vec<u64> = (1..8).map(|failures| pause_after_failure(failures).as_secs()).collect();
    assert_eq!(pauses, [1, 2, 4, 8, 16, 30, 30]);
    assert_eq!(pause_after_failure(u32::MAX), LONGEST_START_PAUSE);
}

#[test]
fn deaths_back_off_after_five() {
    assert!((0..=DEATHS_WITHOUT_PAUSE).all(|deaths| pause_after_death(deaths).is_none()));
    let pauses: Vec<_> = (6..14).filter_map(pause_after_death).map(|pause| pause.as_millis()).collect();
    assert_eq!(pauses, [100, 200, 400, 800, 1600, 3200, 6400, 10_000]);
    assert_eq!(pause_after_death(u32::MAX), Some(LONGEST_DEATH_PAUSE));
}

#[test]
fn deaths_are_in_a_row_only_without_progress() {
    assert_eq!(deaths_in_a_row(3, true, false), 4);
    assert_eq!(deaths_in_a_row(3, true, true), 1);
    assert_eq!(deaths_in_a_row(3, false, false), 1);
    assert_eq!(deaths_in_a_row(0, true, false), 1);
}

#[test]
fn fault_discards_the_next_engine() {
    assert!(after_death(Predecessor::Faulted, 1).discard_next);
    assert!(!after_death(Predecessor::Killed, 1).discard_next);
    assert_eq!(after_death(Predecessor::Killed, 6).pause, Some(FIRST_DEATH_PAUSE));
}

#[test]
fn next_engine_learns_how_its_predecessor_ended() {
    assert_eq!(predecessor_of_next(true, Predecessor::Quiesced), Predecessor::Killed);
    for last in [Predecessor::Quiesced, Predecessor::Killed, Predecessor::Faulted] {
        assert_eq!(predecessor_of_next(false, last), last);
    }
}

#[test]
fn aborted_hand_over_waits_by_cause() {
    assert_eq!(after_abort(Abort::NotQuiesced), (Reason::EngineStuck, STUCK_PAUSE));
    assert_eq!(after_abort(Abort::NewEngineFailed), (Reason::EngineFailed, FIRST_START_PAUSE));
}

#[test]
fn standby_with_another_config_fits_one_mount() {
    assert!(standby_fits_mount(false, true) && standby_fits_mount(true, false) && standby_fits_mount(false, false));
    assert!(!standby_fits_mount(true, true));
}

#[test]
fn release_waits_for_a_start_and_refuses_a_stuck_engine() {
    assert_eq!(release_step(None, false), ReleaseStep::EndEngines);
    assert_eq!(release_step(Some(false), false), ReleaseStep::Wait);
    assert_eq!(release_step(Some(false), true), ReleaseStep::Wait);
    assert_eq!(release_step(Some(true), false), ReleaseStep::Refuse);
    assert_eq!(release_step(None, true), ReleaseStep::Refuse);
}

#[test]
fn absence_is_recovering_only_if_nothing_delays_the_next_engine() {
    let lost = Absence { lost: true, hindered: false, failures: 0, deaths: 1, finding: true };
    let table = [
        (lost, EngineState::Recovering),
        (Absence { hindered: true, ..lost }, EngineState::Failed),
        (Absence { failures: 1, ..lost }, EngineState::Failed),
        (Absence { deaths: 6, ..lost }, EngineState::Failed),
        (Absence { lost: false, ..lost }, EngineState::Failed),
        (Absence { lost: false, finding: false, ..lost }, EngineState::Starting),
    ];
    for (absence, state) in table {
        assert_eq!(absence_state(&absence), state, "{absence:?}");
    }
}

#[test]
fn session_state_follows_from_engines_and_rings() {
    use SessionState::{Connecting, Failed, Recovering, Released, Serving, Stopped};
    let table = [
        (EngineState::Released, true, true, Released),
        (EngineState::Recovering, true, true, Recovering),
        (EngineState::Failed, false, false, Failed),
        (EngineState::Serving, false, true, Serving),
        (EngineState::Attached, true, false, Stopped),
        (EngineState::Attached, true, true, Connecting),
        (EngineState::Attached, false, false, Connecting),
        (EngineState::Starting, true, false, Stopped),
        (EngineState::Starting, false, true, Connecting),
    ];
    for (engines, has_served, started, state) in table {
        assert_eq!(session_state(engines, has_served, started), state, "{engines:?} {has_served} {started}");
    }
}
