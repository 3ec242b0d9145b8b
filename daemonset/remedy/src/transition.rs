//! Changes of state of a cause or a remedy.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::{Cause, Failure, Remedy};

/// A change of state.
#[derive(Clone, Debug, PartialEq)]
pub enum Transition {
    /// The events of a cause reached its limit.
    Stale {
        /// The cause.
        cause: Cause,
        /// Events within the window.
        events: u64,
    },
    /// The events of a cause have stopped.
    Recovered {
        /// The cause.
        cause: Cause,
    },
    /// A remedy was started; a trial engine checks whether it is possible.
    Started {
        /// The cause it is for.
        cause: Cause,
        /// The remedy.
        remedy: Remedy,
    },
    /// A remedy is being applied to the sessions.
    Applying {
        /// The cause it is for.
        cause: Cause,
        /// The remedy.
        remedy: Remedy,
    },
    /// A remedy is applied to every session.
    Applied {
        /// The cause it is for.
        cause: Cause,
        /// The remedy.
        remedy: Remedy,
        /// Time since it was started.
        took: Duration,
    },
    /// A remedy ended.
    Ended {
        /// The cause it was for.
        cause: Cause,
        /// The remedy.
        remedy: Remedy,
        /// How it ended.
        outcome: Outcome,
    },
    /// A remedy's change of the configuration was reverted.
    Reverted {
        /// The cause it was for.
        cause: Cause,
        /// The remedy.
        remedy: Remedy,
    },
    /// No remedy is left.
    Failed {
        /// The cause.
        cause: Cause,
        /// Why, and what a person can do.
        failure: Failure,
    },
}

impl Transition {
    /// The cause that it is about.
    pub fn cause(&self) -> Cause {
        match self {
            Transition::Stale { cause, .. }
            | Transition::Recovered { cause }
            | Transition::Started { cause, .. }
            | Transition::Applying { cause, .. }
            | Transition::Applied { cause, .. }
            | Transition::Ended { cause, .. }
            | Transition::Reverted { cause, .. }
            | Transition::Failed { cause, .. } => *cause,
        }
    }
}

/// How a remedy ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Outcome {
    /// The events stopped.
    Verified,
    /// The events continued.
    Ineffective,
    /// It is not possible here; nothing was changed.
    Rejected,
    /// It was not applied to every session in time.
    NotApplied,
    /// It is not needed any more: the share was changed, or no guest is left.
    Abandoned,
}

impl Outcome {
    /// All of them.
    pub const ALL: [Outcome; 5] =
        [Outcome::Verified, Outcome::Ineffective, Outcome::Rejected, Outcome::NotApplied, Outcome::Abandoned];

    /// The name in status, metrics and logs.
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
