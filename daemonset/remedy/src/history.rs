//! What was counted, tried and changed so far.

use std::collections::{BTreeMap, VecDeque};

use serde::{Deserialize, Serialize};
use virtiofs_config::EngineConfig;

use crate::escalation::{Amendment, Blocker, amended, amendment};
use crate::track::Track;
use crate::transition::{Outcome, Transition};
use crate::{Cause, Moment, Remedy};

/// The past of one share, as far as the next decision needs it. Serializable, for the next agent of the same boot.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct History {
    /// When the share was last observed, and the process id of the broker that counted.
    pub(crate) observed: Option<(Moment, u64)>,
    pub(crate) tracks: BTreeMap<Cause, Track>,
    /// When remedies were started, within the span of the budget.
    pub(crate) started: VecDeque<Moment>,
    pub(crate) attempt: Option<Attempt>,
    pub(crate) amendments: Vec<Amendment>,
    pub(crate) outcomes: BTreeMap<Cause, BTreeMap<Outcome, u64>>,
    pub(crate) last: Option<RemedyRecord>,
}

/// A remedy that is being tried.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Attempt {
    /// The cause it is for.
    pub cause: Cause,
    /// The remedy.
    pub remedy: Remedy,
    /// When it was started.
    pub started: Moment,
    /// Its stage.
    pub stage: Stage,
}

/// Stage of a remedy.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Stage {
    /// A trial engine checks whether it is possible; no guest is affected.
    Checking,
    /// It is being applied to the sessions.
    Applying {
        /// The generation of each session before.
        before: BTreeMap<String, u64>,
    },
    /// It is applied, and its effect is observed.
    Verifying {
        /// Since when.
        since: Moment,
    },
}

/// The last remedy that was started.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct RemedyRecord {
    /// The cause it is for.
    pub cause: Cause,
    /// The remedy.
    pub remedy: Remedy,
    /// When it was started.
    pub started: Moment,
    /// When it was applied to every session.
    pub applied: Option<Moment>,
    /// When it ended, and how; `None` while it is being tried.
    pub ended: Option<(Moment, Outcome)>,
}

impl History {
    /// The configuration for engines: as declared, with the remedies.
    pub fn amended(&self, declared: &EngineConfig) -> EngineConfig {
        amended(declared, &self.amendments)
    }

    /// Changes of the configuration by remedies.
    pub fn amendments(&self) -> &[Amendment] {
        &self.amendments
    }

    /// The remedy that is being tried.
    pub fn attempt(&self) -> Option<&Attempt> {
        self.attempt.as_ref()
    }

    /// The last remedy that was started.
    pub fn last(&self) -> Option<&RemedyRecord> {
        self.last.as_ref()
    }

    /// How often remedies for a cause ended with this outcome.
    pub fn outcomes(&self, cause: Cause, outcome: Outcome) -> u64 {
        self.outcomes.get(&cause).and_then(|outcomes| outcomes.get(&outcome)).copied().unwrap_or(0)
    }

    /// The remedy and the configuration that a trial engine must check; `None` if there is nothing to check.
    pub fn pending_check(&self, declared: &EngineConfig) -> Option<(Remedy, EngineConfig)> {
        let attempt = self.attempt.as_ref().filter(|attempt| attempt.stage == Stage::Checking)?;
        Some((attempt.remedy, attempt.remedy.amend(self.amended(declared))))
    }

    /// Takes in the result of the [pending check](Self::pending_check). The result of an outdated check changes nothing.
    pub fn finish_check(
        &self,
        remedy: Remedy,
        result: Result<(), Blocker>,
        declared: &EngineConfig,
        now: Moment,
    ) -> (History, Vec<Transition>) {
        let mut next = self.clone();
        let Some(attempt) = next.attempt.as_mut().filter(|it| it.stage == Stage::Checking && it.remedy == remedy)
        else {
            return (next, Vec::new());
        };
        let cause = attempt.cause;
        if let Err(blocker) = result {
            next.track(cause).tried.push((remedy, blocker));
            let change = next.end(Outcome::Rejected, now);
            return (next, change.into_iter().collect());
        }
        // The configuration of a session says whether the remedy is applied to it.
        attempt.stage = Stage::Applying { before: BTreeMap::new() };
        next.amendments.push(amendment(remedy, cause, declared, now));
        (next, vec![Transition::Applying { cause, remedy }])
    }

    pub(crate) fn track(&mut self, cause: Cause) -> &mut Track {
        self.tracks.entry(cause).or_default()
    }

    /// Ends the remedy that is being tried.
    pub(crate) fn end(&mut self, outcome: Outcome, now: Moment) -> Option<Transition> {
        let Attempt { cause, remedy, .. } = self.attempt.take()?;
        let count = self.outcomes.entry(cause).or_default().entry(outcome).or_default();
        *count = count.saturating_add(1);
        if let Some(last) = &mut self.last {
            last.ended = Some((now, outcome));
        }
        Some(Transition::Ended { cause, remedy, outcome })
    }
}
