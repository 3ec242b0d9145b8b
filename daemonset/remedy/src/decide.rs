//! The decision.

use std::collections::BTreeMap;
use std::time::Duration;

use virtiofs_contract::staleness::CAUSES;

use crate::escalation::{Blocker, CURABLE, candidates};
use crate::history::{Attempt, History, RemedyRecord, Stage};
use crate::policy::BUDGET_SPAN;
use crate::track::event_limit;
use crate::transition::{Outcome, Transition};
use crate::{Cause, Failure, Mode, Moment, Observation, Policy, Remedy, Root, Session, advice};

/// Time within which a remedy must be applied to every session, unless the window is longer.
const APPLIED_WITHIN: Duration = Duration::from_secs(60);

/// What to do about a share.
#[derive(Clone, Debug, PartialEq)]
pub struct Decision {
    /// The history from now on. Store it before executing anything, so that nothing is done twice.
    pub history: History,
    /// What to do once. ([`History::amended`] is the configuration for engines, [`History::pending_check`] what a trial
    /// engine must check.)
    pub command: Option<Command>,
    /// Transitions, one log line each.
    pub transitions: Vec<Transition>,
    /// Causes to report.
    pub statuses: Vec<CauseStatus>,
}

/// Something to do once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Command {
    /// Replace the engine of every session.
    HandOver,
}

/// Status of a cause to report.
#[derive(Clone, Debug, PartialEq)]
pub struct CauseStatus {
    /// The cause.
    pub cause: Cause,
    /// Since when it is stale.
    pub since: Moment,
    /// Events within the window.
    pub events: u64,
    /// What is done about it.
    pub handling: Handling,
}

/// What is done about a cause.
#[derive(Clone, Debug, PartialEq)]
pub enum Handling {
    /// Nothing: the share's policy is to report.
    Reported,
    /// Nothing: the cause has no automatic remedy.
    NoRemedy,
    /// Nothing yet: what is at the source's path, given here, cannot be served instead.
    AwaitsSource(Root),
    /// A remedy is being tried.
    Trying {
        /// The remedy.
        remedy: Remedy,
        /// True once it is applied to every session.
        applied: bool,
    },
    /// No remedy is left.
    Failed(Failure),
    /// It was remedied, it is subsiding, or another cause comes first.
    Subsiding,
}

/// Decides what to do about a share.
pub fn decide(policy: &Policy, history: &History, observation: &Observation<'_>, now: Moment) -> Decision {
    let now = history.observed.map_or(now, |(before, _)| now.max(before));
    let mut pass = Pass { policy, observation, now, next: history.clone(), command: None, transitions: Vec::new() };
    pass.count_events();
    pass.revert_outdated();
    pass.advance();
    pass.update_stale();
    pass.start();
    let statuses = pass.statuses();
    Decision { history: pass.next, command: pass.command, transitions: pass.transitions, statuses }
}

struct Pass<'a> {
    policy: &'a Policy,
    observation: &'a Observation<'a>,
    now: Moment,
    next: History,
    command: Option<Command>,
    transitions: Vec<Transition>,
}

impl Pass<'_> {
    /// Adds the events counted since the last decision.
    fn count_events(&mut self) {
        let (now, observation, window) = (self.now, self.observation, self.policy.window);
        let (elapsed, restarted) = match self.next.observed {
            Some((before, broker)) => (now.since(before), broker != observation.broker),
            None => (Duration::ZERO, true),
        };
        for cause in CAUSES.into_iter().filter(|cause| *cause != Cause::SourceHung) {
            let total = observation.counts.get(&cause).copied().unwrap_or(0);
            self.next.track(cause).count(total, restarted, now, elapsed, window);
        }
        let hung = u64::from(observation.sessions.iter().any(|session| session.hung));
        self.next.track(Cause::SourceHung).happened(hung, now, Duration::ZERO, window);
        self.next.observed = Some((now, observation.broker));
        self.next.started.retain(|started| now.since(*started) < BUDGET_SPAN);
    }

    /// Reverts amendments that the declaration no longer allows.
    fn revert_outdated(&mut self) {
        let (heals, observation) = (self.policy.mode == Mode::Heal, self.observation);
        let stands = |amendment: &crate::Amendment| {
            heals
                && amendment.replaced == amendment.remedy.replaced(observation.declared)
                && (amendment.remedy != Remedy::LongerCaching || observation.content == crate::Content::Immutable)
        };
        let (kept, undone): (Vec<_>, Vec<_>) = self.next.amendments.drain(..).partition(stands);
        self.next.amendments = kept;
        let current = self.next.attempt.as_ref().map(|attempt| attempt.remedy);
        for amendment in &undone {
            self.transitions.push(Transition::Reverted { cause: amendment.cause, remedy: amendment.remedy });
        }
        if !heals || undone.iter().any(|amendment| Some(amendment.remedy) == current) {
            self.end(Outcome::Abandoned);
        }
        if !heals {
            self.next.tracks.values_mut().for_each(crate::track::Track::reset);
        }
    }

    /// Advances the remedy that is being tried.
    fn advance(&mut self) {
        let Some(attempt) = self.next.attempt.clone() else { return };
        if let Stage::Verifying { since } = attempt.stage {
            return self.verify(&attempt, since);
        }
        if self.observation.sessions.is_empty() {
            return self.end(Outcome::Abandoned);
        }
        if self.is_applied(&attempt) {
            let took = self.now.since(attempt.started);
            self.transitions.push(Transition::Applied { cause: attempt.cause, remedy: attempt.remedy, took });
            if let Some(last) = &mut self.next.last {
                last.applied = Some(self.now);
            }
            // Events under the engines before it say nothing about it.
            CURABLE.iter().for_each(|cause| self.next.track(*cause).clear_window());
            self.next.attempt = Some(Attempt { stage: Stage::Verifying { since: self.now }, ..attempt });
        } else if self.now.since(attempt.started) >= self.policy.window.length().max(APPLIED_WITHIN) {
            self.next.amendments.retain(|amendment| amendment.remedy != attempt.remedy);
            self.end(Outcome::NotApplied);
        }
    }

    fn is_applied(&self, attempt: &Attempt) -> bool {
        match &attempt.stage {
            Stage::Checking => false,
            Stage::Applying { .. } if attempt.remedy.amends() => {
                let wanted = self.next.amended(self.observation.declared);
                self.observation.sessions.iter().all(|session| *session.engine == wanted)
            }
            Stage::Applying { before } => self.observation.sessions.iter().all(|session| {
                // A session that is newer started with the present source.
                before.get(session.id).is_none_or(|generation| session.generation > *generation)
            }),
            Stage::Verifying { .. } => true,
        }
    }

    /// Ends an applied remedy once its effect is known.
    fn verify(&mut self, attempt: &Attempt, since: Moment) {
        if self.is_stale(attempt.cause) {
            self.next.track(attempt.cause).tried.push((attempt.remedy, Blocker::Ineffective));
            self.end(Outcome::Ineffective);
        } else if self.now.since(since) >= self.policy.window.length() {
            self.next.track(attempt.cause).reset();
            self.end(Outcome::Verified);
        }
    }

    fn end(&mut self, outcome: Outcome) {
        self.transitions.extend(self.next.end(outcome, self.now));
    }

    /// True if the events of a cause reach its limit now.
    fn is_stale(&self, cause: Cause) -> bool {
        // The served directory is gone, however long ago that happened.
        if cause == Cause::SourceGone {
            return self.observation.sessions.iter().any(|session| session.gone);
        }
        let event_limit = event_limit(cause, self.policy, self.observation.content);
        let events = self.next.tracks.get(&cause).map_or(0, crate::track::Track::events);
        event_limit.is_some_and(|event_limit| events >= event_limit)
    }

    /// Updates which causes are stale.
    fn update_stale(&mut self) {
        for cause in CAUSES {
            let (stale, now, policy, content) = (self.is_stale(cause), self.now, self.policy, self.observation.content);
            let current = self.next.attempt.as_ref().is_some_and(|attempt| attempt.cause == cause);
            let track = self.next.track(cause);
            if stale && track.stale_since.is_none() {
                track.stale_since = Some(now);
                let events = track.events();
                self.transitions.push(Transition::Stale { cause, events });
            } else if !stale && !current && track.is_quiet(cause, policy, content, now) {
                let was_stale = track.stale_since.take().is_some();
                if track.is_over(policy, now) {
                    track.reset();
                }
                self.transitions.extend(was_stale.then_some(Transition::Recovered { cause }));
            }
        }
    }

    /// Starts a remedy if one is due.
    fn start(&mut self) {
        if self.policy.mode == Mode::Report || self.next.attempt.is_some() || self.observation.sessions.is_empty() {
            return;
        }
        for cause in CURABLE {
            if self.is_stale(cause) && !self.awaits_source(cause) && self.start_next(cause) {
                return;
            }
        }
    }

    fn awaits_source(&self, cause: Cause) -> bool {
        cause == Cause::SourceGone && self.observation.root != Root::Present
    }

    /// Starts the next remedy for a cause, or notes that none is left. True if one was started.
    fn start_next(&mut self, cause: Cause) -> bool {
        let (now, observation) = (self.now, self.observation);
        let candidates = candidates(cause, observation, &self.next.amendments);
        let tried = &self.next.track(cause).tried;
        let left = |remedy: &Remedy| remedy.is_repeatable(cause) || tried.iter().all(|(before, _)| before != remedy);
        let Some(remedy) = candidates.into_iter().find(left) else {
            let tried = tried.clone();
            let failure = advice::exhausted(cause, observation, &self.next.amendments, &tried, now);
            self.fail(cause, failure);
            return false;
        };
        if self.next.started.len() >= self.policy.budget.get() as usize {
            self.fail(cause, advice::over_budget(cause, self.policy, now));
            return false;
        }
        self.next.started.push_back(now);
        self.next.track(cause).failure = None;
        self.next.last = Some(RemedyRecord { cause, remedy, started: now, applied: None, ended: None });
        let stage = if remedy.amends() {
            self.transitions.push(Transition::Started { cause, remedy });
            Stage::Checking
        } else {
            self.transitions.push(Transition::Applying { cause, remedy });
            self.command = Some(Command::HandOver);
            Stage::Applying { before: generations(&observation.sessions) }
        };
        self.next.attempt = Some(Attempt { cause, remedy, started: now, stage });
        true
    }

    fn fail(&mut self, cause: Cause, failure: Failure) {
        let track = self.next.track(cause);
        if track.failure.as_ref().is_some_and(|it| it.exhausted == failure.exhausted && it.message == failure.message) {
            return;
        }
        track.failure = Some(failure.clone());
        self.transitions.push(Transition::Failed { cause, failure });
    }

    fn statuses(&self) -> Vec<CauseStatus> {
        let reported = |cause: &Cause| {
            let track = self.next.tracks.get(cause)?;
            let since = track.stale_since.or(track.failure.as_ref().map(|failure| failure.since))?;
            Some(CauseStatus { cause: *cause, since, events: track.events(), handling: self.handling(*cause) })
        };
        CAUSES.iter().filter_map(reported).collect()
    }

    fn handling(&self, cause: Cause) -> Handling {
        if !CURABLE.contains(&cause) {
            return Handling::NoRemedy;
        }
        if self.policy.mode == Mode::Report {
            return Handling::Reported;
        }
        if let Some(attempt) = self.next.attempt.as_ref().filter(|attempt| attempt.cause == cause) {
            let applied = matches!(attempt.stage, Stage::Verifying { .. });
            return Handling::Trying { remedy: attempt.remedy, applied };
        }
        match self.next.tracks.get(&cause).and_then(|track| track.failure.clone()) {
            Some(failure) => Handling::Failed(failure),
            None if self.is_stale(cause) && self.awaits_source(cause) => Handling::AwaitsSource(self.observation.root),
            None => Handling::Subsiding,
        }
    }
}

fn generations(sessions: &[Session<'_>]) -> BTreeMap<String, u64> {
    sessions.iter().map(|session| (session.id.to_owned(), session.generation)).collect()
}
