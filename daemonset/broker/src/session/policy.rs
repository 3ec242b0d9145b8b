//! What to do about a session's engines. Pure.

use std::time::Duration;

/// First pause before another try to start an engine that could not be started, and the longest: a source that
/// is missing for a minute must not cost a fork a second, nor must one that is back wait for minutes.
const FIRST_PAUSE: Duration = Duration::from_secs(1);
const LONGEST_PAUSE: Duration = Duration::from_secs(30);

/// Deaths in a row, without a request answered in between, after which the next engine waits. A request that
/// kills its engine is answered `EIO` by the second engine that finds it in the ledger, so this many are not
/// about one request.
const DEATHS_AT_ONCE: u32 = 5;

/// First pause after that, and the longest.
const FIRST_REST: Duration = Duration::from_millis(100);
const LONGEST_REST: Duration = Duration::from_secs(10);

/// How long to leave an engine alone that did not come to rest for its successor.
pub(crate) const STUCK_PAUSE: Duration = Duration::from_secs(30);

/// Is an engine what new ones would be?
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Age {
    Current,
    Outdated,
}

/// A spare beside the engine that serves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Spare {
    /// Nearer to what is wanted, or exactly that. Wishes that follow each other faster than engines start must
    /// not keep a session from ever being served anew.
    Ahead,
    /// The same.
    Alike,
    /// Neither.
    Behind,
}

/// A session's engines at one moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Situation {
    pub(crate) serving: Option<Age>,
    pub(crate) spare: Option<Spare>,
    /// Is one being started?
    pub(crate) ordered: bool,
    /// Is it too early for another try?
    pub(crate) pausing: bool,
    /// Is a spare worth its process? One that serves a guest has something to lose.
    pub(crate) worth_a_spare: bool,
}

/// What to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Act {
    /// Nothing, until something happens.
    Wait,
    /// Start an engine.
    Order,
    /// Let the spare serve: there is no other.
    Promote,
    /// Let the spare take over from the one that serves.
    HandOver,
    /// The spare is not what is wanted any more.
    DiscardSpare,
}

/// Decides the next act.
pub(crate) fn decide(now: &Situation) -> Act {
    let wanting = match now.serving {
        None | Some(Age::Outdated) => true,
        Some(Age::Current) => now.worth_a_spare,
    };
    match (now.serving, now.spare) {
        (Some(_), Some(Spare::Behind)) => Act::DiscardSpare,
        _ if now.pausing => Act::Wait,
        (None, Some(_)) => Act::Promote,
        (Some(Age::Outdated), Some(Spare::Ahead)) => Act::HandOver,
        (_, None) if wanting && !now.ordered => Act::Order,
        _ => Act::Wait,
    }
}

/// How long to wait after an engine could not be started for the `failures`th time in a row.
pub(crate) fn pause_after_failure(failures: u32) -> Duration {
    doubled(FIRST_PAUSE, failures.saturating_sub(1)).min(LONGEST_PAUSE)
}

/// How long to wait after an engine has died for the `deaths`th time without a request answered in between.
pub(crate) fn pause_after_death(deaths: u32) -> Option<Duration> {
    let beyond = deaths.checked_sub(DEATHS_AT_ONCE + 1)?;
    Some(doubled(FIRST_REST, beyond).min(LONGEST_REST))
}

fn doubled(pause: Duration, times: u32) -> Duration {
    pause.saturating_mul(1 << times.min(16))
}

#[cfg(test)]
mod tests {
    use super::*;

    const CALM: Situation =
        Situation { serving: None, spare: None, ordered: false, pausing: false, worth_a_spare: false };
    const CURRENT: Option<Age> = Some(Age::Current);
    const OUTDATED: Option<Age> = Some(Age::Outdated);
    const AHEAD: Option<Spare> = Some(Spare::Ahead);
    const ALIKE: Option<Spare> = Some(Spare::Alike);
    const BEHIND: Option<Spare> = Some(Spare::Behind);

    #[test]
    fn every_situation_has_its_act() {
        let table = [
            (CALM, Act::Order),
            (Situation { ordered: true, ..CALM }, Act::Wait),
            (Situation { pausing: true, ..CALM }, Act::Wait),
            (Situation { spare: ALIKE, ..CALM }, Act::Promote),
            (Situation { spare: BEHIND, ..CALM }, Act::Promote),
            (Situation { spare: AHEAD, ordered: true, ..CALM }, Act::Promote),
            (Situation { spare: ALIKE, pausing: true, ..CALM }, Act::Wait),
            (Situation { serving: CURRENT, ..CALM }, Act::Wait),
            (Situation { serving: CURRENT, worth_a_spare: true, ..CALM }, Act::Order),
            (Situation { serving: CURRENT, worth_a_spare: true, pausing: true, ..CALM }, Act::Wait),
            (Situation { serving: CURRENT, worth_a_spare: true, ordered: true, ..CALM }, Act::Wait),
            (Situation { serving: CURRENT, worth_a_spare: true, spare: ALIKE, ..CALM }, Act::Wait),
            (Situation { serving: CURRENT, spare: BEHIND, ..CALM }, Act::DiscardSpare),
            (Situation { serving: CURRENT, spare: BEHIND, pausing: true, ..CALM }, Act::DiscardSpare),
            (Situation { serving: OUTDATED, ..CALM }, Act::Order),
            (Situation { serving: OUTDATED, ordered: true, ..CALM }, Act::Wait),
            (Situation { serving: OUTDATED, spare: BEHIND, ..CALM }, Act::DiscardSpare),
            (Situation { serving: OUTDATED, spare: AHEAD, ..CALM }, Act::HandOver),
            (Situation { serving: OUTDATED, spare: AHEAD, ordered: true, ..CALM }, Act::HandOver),
            (Situation { serving: OUTDATED, spare: AHEAD, pausing: true, ..CALM }, Act::Wait),
        ];
        for (situation, act) in table {
            assert_eq!(decide(&situation), act, "{situation:?}");
        }
    }

    #[test]
    fn an_engine_that_cannot_start_is_tried_ever_more_slowly() {
        let pauses: Vec<u64> = (1..8).map(|failures| pause_after_failure(failures).as_secs()).collect();
        assert_eq!(pauses, [1, 2, 4, 8, 16, 30, 30]);
        assert_eq!(pause_after_failure(u32::MAX), LONGEST_PAUSE);
    }

    #[test]
    fn deaths_are_made_good_at_once_until_they_are_a_loop() {
        assert!((0..=DEATHS_AT_ONCE).all(|deaths| pause_after_death(deaths).is_none()));
        let pauses: Vec<_> = (6..14).filter_map(pause_after_death).map(|pause| pause.as_millis()).collect();
        assert_eq!(pauses, [100, 200, 400, 800, 1600, 3200, 6400, 10_000]);
        assert_eq!(pause_after_death(u32::MAX), Some(LONGEST_REST));
    }
}
