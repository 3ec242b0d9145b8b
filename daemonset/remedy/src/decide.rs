//! The decision.

use std::collections::BTreeMap;
use std::time::Duration;

use crate::history::{History, Outcome, Past, Stage, Trial};
use crate::ladder::{CURABLE, Obstacle, ladder};
use crate::policy::BUDGET_SPAN;
use crate::track::needed;
use crate::{Cause, Failure, Mode, Moment, Observation, Policy, Root, Rung, Session, advice};
use virtiofs_contract::staleness::CAUSES;

/// How long a remedy may take to come into force, if the window is not longer.
const IN_FORCE_WITHIN: Duration = Duration::from_secs(60);

/// What is to be done.
#[derive(Clone, Debug, PartialEq)]
pub struct Decision {
    /// The history from now on. To be kept before anything is done, so that nothing is done twice.
    pub history: History,
    /// What is to be done once. (What engines are to run with is [`History::amended`], what is to be tried is
    /// [`History::question`].)
    pub act: Option<Act>,
    /// What has changed, each worth a line in a log.
    pub changes: Vec<Change>,
    /// Causes that are to be spoken of.
    pub standings: Vec<Standing>,
}

/// Something to be done once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Act {
    /// Give every session another engine.
    HandOver,
}

/// Something that has changed.
#[derive(Clone, Debug, PartialEq)]
pub enum Change {
    /// There are too many events of a cause.
    Ill {
        /// The cause.
        cause: Cause,
        /// Events within the window.
        events: u64,
    },
    /// That is over.
    Well {
        /// The cause.
        cause: Cause,
    },
    /// A remedy was begun; it is asked first whether it is possible.
    Begun {
        /// What it is for.
        cause: Cause,
        /// The remedy.
        rung: Rung,
    },
    /// A remedy is to come into force.
    Ordered {
        /// What it is for.
        cause: Cause,
        /// The remedy.
        rung: Rung,
    },
    /// It has.
    InForce {
        /// What it is for.
        cause: Cause,
        /// The remedy.
        rung: Rung,
        /// How long that took since it was begun.
        took: Duration,
    },
    /// A remedy has ended.
    Ended {
        /// What it was for.
        cause: Cause,
        /// The remedy.
        rung: Rung,
        /// How.
        outcome: Outcome,
    },
    /// A change of the configuration is taken back.
    Undone {
        /// What it was for.
        cause: Cause,
        /// The remedy.
        rung: Rung,
    },
    /// No remedy is left.
    Failed {
        /// For what.
        cause: Cause,
        /// What to do.
        failure: Failure,
    },
}

/// How things stand with a cause that is to be spoken of.
#[derive(Clone, Debug, PartialEq)]
pub struct Standing {
    /// The cause.
    pub cause: Cause,
    /// Since when.
    pub since: Moment,
    /// Events within the window.
    pub events: u64,
    /// What is done about it.
    pub course: Course,
}

/// What is done about a cause.
#[derive(Clone, Debug, PartialEq)]
pub enum Course {
    /// Nothing: the share says to report only.
    Reported,
    /// Nothing: there is no remedy of ours.
    OutOfReach,
    /// There is nothing yet at the source's path that engines could serve instead.
    AwaitsSource,
    /// A remedy is on trial.
    OnTrial {
        /// The remedy.
        rung: Rung,
        /// Is it in force?
        in_force: bool,
    },
    /// No remedy is left.
    Failed(Failure),
    /// It was cured, or is passing; or another cause comes first.
    Passing,
}

/// Decides what to do about a share.
pub fn decide(policy: &Policy, history: &History, seen: &Observation<'_>, now: Moment) -> Decision {
    let now = history.observed.map_or(now, |(before, _)| now.max(before));
    let mut turn = Turn { policy, seen, now, next: history.clone(), act: None, changes: Vec::new() };
    turn.count();
    turn.keep_in_step();
    turn.follow();
    turn.judge();
    turn.begin();
    let standings = turn.standings();
    Decision { history: turn.next, act: turn.act, changes: turn.changes, standings }
}

struct Turn<'a> {
    policy: &'a Policy,
    seen: &'a Observation<'a>,
    now: Moment,
    next: History,
    act: Option<Act>,
    changes: Vec<Change>,
}

impl Turn<'_> {
    /// Takes in what was counted since.
    fn count(&mut self) {
        let (now, seen, window) = (self.now, self.seen, self.policy.window);
        let (elapsed, anew) = match self.next.observed {
            Some((before, broker)) => (now.since(before), broker != seen.broker),
            None => (Duration::ZERO, true),
        };
        for cause in CAUSES.into_iter().filter(|cause| *cause != Cause::SourceHung) {
            let total = seen.counts.get(&cause).copied().unwrap_or(0);
            self.next.track(cause).count(total, anew, now, elapsed, window);
        }
        let hung = u64::from(seen.sessions.iter().any(|session| session.hung));
        self.next.track(Cause::SourceHung).happened(hung, now, Duration::ZERO, window);
        self.next.observed = Some((now, seen.broker));
        self.next.begun.retain(|begun| now.since(*begun) < BUDGET_SPAN);
    }

    /// Takes back what the share does not want any more.
    fn keep_in_step(&mut self) {
        let (heals, seen) = (self.policy.mode == Mode::Heal, self.seen);
        let stands = |amendment: &crate::history::Amendment| {
            heals
                && amendment.instead_of == amendment.rung.instead_of(seen.declared)
                && (amendment.rung != Rung::LongerCaching || seen.content == crate::Content::Immutable)
        };
        let (kept, undone): (Vec<_>, Vec<_>) = self.next.amendments.drain(..).partition(stands);
        self.next.amendments = kept;
        let on_trial = self.next.trial.as_ref().map(|trial| trial.rung);
        for amendment in &undone {
            self.changes.push(Change::Undone { cause: amendment.cause, rung: amendment.rung });
        }
        if !heals || undone.iter().any(|amendment| Some(amendment.rung) == on_trial) {
            self.end(Outcome::Abandoned);
        }
        if !heals {
            self.next.tracks.values_mut().for_each(crate::track::Track::forget_attempts);
        }
    }

    /// Looks after the remedy that is on trial.
    fn follow(&mut self) {
        let Some(trial) = self.next.trial.clone() else { return };
        if let Stage::InForce { since } = trial.stage {
            return self.verify(&trial, since);
        }
        if self.seen.sessions.is_empty() {
            return self.end(Outcome::Abandoned);
        }
        if self.is_in_force(&trial) {
            let took = self.now.since(trial.begun);
            self.changes.push(Change::InForce { cause: trial.cause, rung: trial.rung, took });
            if let Some(last) = &mut self.next.last {
                last.in_force = Some(self.now);
            }
            // What the engines before it met says nothing about it.
            CURABLE.iter().for_each(|cause| self.next.track(*cause).answered());
            self.next.trial = Some(Trial { stage: Stage::InForce { since: self.now }, ..trial });
        } else if self.now.since(trial.begun) >= self.policy.window.length().max(IN_FORCE_WITHIN) {
            self.next.amendments.retain(|amendment| amendment.rung != trial.rung);
            self.end(Outcome::NotApplied);
        }
    }

    fn is_in_force(&self, trial: &Trial) -> bool {
        match &trial.stage {
            Stage::Asked => false,
            Stage::Ordered { .. } if trial.rung.amends() => {
                let wanted = self.next.amended(self.seen.declared);
                self.seen.sessions.iter().all(|session| *session.engine == wanted)
            }
            Stage::Ordered { before } => self.seen.sessions.iter().all(|session| {
                // One that was not there yet has been served from what was there when it came.
                before.get(session.id).is_none_or(|generation| session.generation > *generation)
            }),
            Stage::InForce { .. } => true,
        }
    }

    /// Has a remedy helped that is in force?
    fn verify(&mut self, trial: &Trial, since: Moment) {
        if self.is_too_much(trial.cause) {
            self.next.track(trial.cause).spent.push((trial.rung, Obstacle::NotHelped));
            self.end(Outcome::Ineffective);
        } else if self.now.since(since) >= self.policy.window.length() {
            self.next.track(trial.cause).forget_attempts();
            self.end(Outcome::Verified);
        }
    }

    fn end(&mut self, outcome: Outcome) {
        self.changes.extend(self.next.end(outcome, self.now));
    }

    /// Are there too many events of a cause just now?
    fn is_too_much(&self, cause: Cause) -> bool {
        // What a guest was served from is gone, however long ago that happened.
        if cause == Cause::SourceGone {
            return self.seen.sessions.iter().any(|session| session.gone);
        }
        let needed = needed(cause, self.policy, self.seen.content);
        let events = self.next.tracks.get(&cause).map_or(0, crate::track::Track::events);
        needed.is_some_and(|needed| events >= needed)
    }

    /// Notes of which causes there is to be spoken.
    fn judge(&mut self) {
        for cause in CAUSES {
            let (too_much, now, policy, content) = (self.is_too_much(cause), self.now, self.policy, self.seen.content);
            let on_trial = self.next.trial.as_ref().is_some_and(|trial| trial.cause == cause);
            let track = self.next.track(cause);
            if too_much && track.ill_since.is_none() {
                track.ill_since = Some(now);
                let events = track.events();
                self.changes.push(Change::Ill { cause, events });
            } else if !too_much && !on_trial && track.is_calm(cause, policy, content, now) {
                let was_ill = track.ill_since.take().is_some();
                if track.is_over(policy, now) {
                    track.forget_attempts();
                }
                self.changes.extend(was_ill.then_some(Change::Well { cause }));
            }
        }
    }

    /// Begins a remedy where one is due.
    fn begin(&mut self) {
        if self.policy.mode == Mode::Report || self.next.trial.is_some() || self.seen.sessions.is_empty() {
            return;
        }
        for cause in CURABLE {
            if self.is_too_much(cause) && !self.awaits_source(cause) && self.try_next(cause) {
                return;
            }
        }
    }

    fn awaits_source(&self, cause: Cause) -> bool {
        cause == Cause::SourceGone && self.seen.root != Root::Present
    }

    /// Begins the next remedy for a cause, or says that there is none. Was one begun?
    fn try_next(&mut self, cause: Cause) -> bool {
        let (now, seen) = (self.now, self.seen);
        let rungs = ladder(cause, seen, &self.next.amendments);
        let spent = &self.next.track(cause).spent;
        let left = |rung: &Rung| rung.wears_off(cause) || spent.iter().all(|(before, _)| before != rung);
        let Some(rung) = rungs.into_iter().find(left) else {
            let spent = spent.clone();
            let failure = advice::ladder(cause, seen, &self.next.amendments, &spent, now);
            self.fail(cause, failure);
            return false;
        };
        if self.next.begun.len() >= self.policy.budget.get() as usize {
            self.fail(cause, advice::budget(cause, self.policy, now));
            return false;
        }
        self.next.begun.push_back(now);
        self.next.track(cause).failure = None;
        self.next.last = Some(Past { cause, rung, begun: now, in_force: None, ended: None });
        let stage = if rung.amends() {
            self.changes.push(Change::Begun { cause, rung });
            Stage::Asked
        } else {
            self.changes.push(Change::Ordered { cause, rung });
            self.act = Some(Act::HandOver);
            Stage::Ordered { before: generations(&seen.sessions) }
        };
        self.next.trial = Some(Trial { cause, rung, begun: now, stage });
        true
    }

    fn fail(&mut self, cause: Cause, failure: Failure) {
        let track = self.next.track(cause);
        if track.failure.as_ref().is_some_and(|it| it.end == failure.end && it.message == failure.message) {
            return;
        }
        track.failure = Some(failure.clone());
        self.changes.push(Change::Failed { cause, failure });
    }

    fn standings(&self) -> Vec<Standing> {
        let spoken_of = |cause: &Cause| {
            let track = self.next.tracks.get(cause)?;
            let since = track.ill_since.or(track.failure.as_ref().map(|failure| failure.since))?;
            Some(Standing { cause: *cause, since, events: track.events(), course: self.course(*cause) })
        };
        CAUSES.iter().filter_map(spoken_of).collect()
    }

    fn course(&self, cause: Cause) -> Course {
        if !CURABLE.contains(&cause) {
            return Course::OutOfReach;
        }
        if self.policy.mode == Mode::Report {
            return Course::Reported;
        }
        if let Some(trial) = self.next.trial.as_ref().filter(|trial| trial.cause == cause) {
            let in_force = matches!(trial.stage, Stage::InForce { .. });
            return Course::OnTrial { rung: trial.rung, in_force };
        }
        match self.next.tracks.get(&cause).and_then(|track| track.failure.clone()) {
            Some(failure) => Course::Failed(failure),
            None if self.is_too_much(cause) && self.awaits_source(cause) => Course::AwaitsSource,
            None => Course::Passing,
        }
    }
}

fn generations(sessions: &[Session<'_>]) -> BTreeMap<String, u64> {
    sessions.iter().map(|session| (session.id.to_owned(), session.generation)).collect()
}
