//! What has been counted, tried and changed so far.

use std::collections::{BTreeMap, VecDeque};

use serde::{Deserialize, Serialize};
use virtiofs_config::EngineConfig;

use crate::ladder::{InsteadOf, Obstacle, amended, amendment};
use crate::track::Track;
use crate::{Cause, Change, Moment, Rung};

/// The past of one share, as far as it matters for the next decision. Plain data: it can be written down, and read
/// by the next agent of the same boot.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct History {
    /// When the share was looked at last, and whose counts those were.
    pub(crate) observed: Option<(Moment, u32)>,
    pub(crate) tracks: BTreeMap<Cause, Track>,
    /// When remedies were begun, as far as the budget counts.
    pub(crate) begun: VecDeque<Moment>,
    pub(crate) trial: Option<Trial>,
    pub(crate) amendments: Vec<Amendment>,
    pub(crate) outcomes: BTreeMap<Cause, BTreeMap<Outcome, u64>>,
    pub(crate) last: Option<Past>,
}

/// A remedy that is on trial.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Trial {
    /// What it is for.
    pub cause: Cause,
    /// The remedy.
    pub rung: Rung,
    /// When it was begun.
    pub begun: Moment,
    /// How far it is.
    pub stage: Stage,
}

/// How far a remedy is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Stage {
    /// A trial engine is to say whether it is possible; no guest has been touched.
    Asked,
    /// It is to come into force.
    Ordered {
        /// The generation of each session before.
        before: BTreeMap<String, u64>,
    },
    /// It is in force, and whether it helps will be seen.
    InForce {
        /// Since when.
        since: Moment,
    },
}

/// A change of the configuration that is in force as a remedy.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Amendment {
    /// The remedy.
    pub rung: Rung,
    /// What it is for.
    pub cause: Cause,
    /// Since when.
    pub since: Moment,
    pub(crate) instead_of: InsteadOf,
}

/// What became of a remedy.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Outcome {
    /// The rate has fallen.
    Verified,
    /// The rate has not fallen.
    Ineffective,
    /// It is not possible here; nothing was changed.
    Rejected,
    /// It was not active in time.
    NotApplied,
    /// Its reason is gone: the share says something else, or no guest is left.
    Abandoned,
}

impl Outcome {
    /// All of them.
    pub const ALL: [Outcome; 5] =
        [Outcome::Verified, Outcome::Ineffective, Outcome::Rejected, Outcome::NotApplied, Outcome::Abandoned];

    /// The word as it stands in status, metrics and logs.
    pub fn as_str(self) -> &'static str {
        match self {
            Outcome::Verified => "Verified",
            Outcome::Ineffective => "Ineffective",
            Outcome::Rejected => "Rejected",
            Outcome::NotApplied => "NotApplied",
            Outcome::Abandoned => "Abandoned",
        }
    }
}

/// The last remedy that was begun.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Past {
    /// What it is for.
    pub cause: Cause,
    /// The remedy.
    pub rung: Rung,
    /// When it was begun.
    pub begun: Moment,
    /// When it came into force.
    pub in_force: Option<Moment>,
    /// When it ended, and how; none: it is on trial.
    pub ended: Option<(Moment, Outcome)>,
}

impl History {
    /// What engines are to run with: what is declared, with the remedies in it.
    pub fn amended(&self, declared: &EngineConfig) -> EngineConfig {
        amended(declared, &self.amendments)
    }

    /// Changes of the configuration that are in force as remedies.
    pub fn amendments(&self) -> &[Amendment] {
        &self.amendments
    }

    /// The remedy that is on trial.
    pub fn trial(&self) -> Option<&Trial> {
        self.trial.as_ref()
    }

    /// The last remedy that was begun.
    pub fn last(&self) -> Option<&Past> {
        self.last.as_ref()
    }

    /// How often remedies for a cause ended so.
    pub fn outcomes(&self, cause: Cause, outcome: Outcome) -> u64 {
        self.outcomes.get(&cause).and_then(|outcomes| outcomes.get(&outcome)).copied().unwrap_or(0)
    }

    /// What a trial engine is to be asked about: the remedy and the configuration with it. None: nothing, or the
    /// answer is known.
    pub fn question(&self, declared: &EngineConfig) -> Option<(Rung, EngineConfig)> {
        let trial = self.trial.as_ref().filter(|trial| trial.stage == Stage::Asked)?;
        Some((trial.rung, trial.rung.amend(self.amended(declared))))
    }

    /// The answer to [`question`](Self::question). An answer to a question that is not asked any more changes
    /// nothing.
    pub fn answer(
        &self,
        rung: Rung,
        answer: Result<(), Obstacle>,
        declared: &EngineConfig,
        now: Moment,
    ) -> (History, Vec<Change>) {
        let mut next = self.clone();
        let Some(trial) = next.trial.as_mut().filter(|it| it.stage == Stage::Asked && it.rung == rung) else {
            return (next, Vec::new());
        };
        let cause = trial.cause;
        if let Err(obstacle) = answer {
            next.track(cause).spent.push((rung, obstacle));
            let change = next.end(Outcome::Rejected, now);
            return (next, change.into_iter().collect());
        }
        // Which sessions have it follows from their configuration.
        trial.stage = Stage::Ordered { before: BTreeMap::new() };
        next.amendments.push(amendment(rung, cause, declared, now));
        (next, vec![Change::Ordered { cause, rung }])
    }

    pub(crate) fn track(&mut self, cause: Cause) -> &mut Track {
        self.tracks.entry(cause).or_default()
    }

    /// Ends the remedy that is on trial.
    pub(crate) fn end(&mut self, outcome: Outcome, now: Moment) -> Option<Change> {
        let Trial { cause, rung, .. } = self.trial.take()?;
        let count = self.outcomes.entry(cause).or_default().entry(outcome).or_default();
        *count = count.saturating_add(1);
        if let Some(last) = &mut self.last {
            last.ended = Some((now, outcome));
        }
        Some(Change::Ended { cause, rung, outcome })
    }
}
