//! Actions on sources and endpoints, and their results.

use std::path::PathBuf;
use std::time::Instant;

use virtiofs_contract::control::Endpoint;
use virtiofs_contract::preflight::{Finding, Preflight};

use super::source::{Probe, Source};

/// One action.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Action {
    /// Probe the source of a share.
    Probe { share: String },
    /// Let the broker serve an endpoint.
    Apply { endpoint: Box<Endpoint>, source: Source },
    /// Let the broker close an endpoint's socket; with `force` its sessions end too.
    Withdraw { endpoint: String, force: bool },
}

/// The result of an action.
#[derive(Debug)]
pub(crate) enum ActionResult {
    /// A source was probed.
    Probed {
        /// Its share.
        share: String,
        /// The path that was declared when the probe began.
        declared: PathBuf,
        /// What was found.
        probe: Probe,
    },
    /// An endpoint was applied, or not.
    Applied(Box<Attempt>),
    /// The broker was asked to withdraw an endpoint.
    Withdrawn {
        /// Its name.
        endpoint: String,
    },
}

/// An attempt to apply an endpoint.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Attempt {
    /// When it ended.
    pub(crate) at: Instant,
    /// The endpoint sent to the broker.
    pub(crate) endpoint: Endpoint,
    /// The source at that time.
    pub(crate) source: Source,
    /// How many attempts in a row before this one applied the same without full success.
    pub(crate) repeated: u32,
    /// The outcome.
    pub(crate) outcome: Outcome,
}

/// Outcome of an attempt.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Outcome {
    /// Served; what the trial engine found.
    Served(Box<Preflight>),
    /// Rejected by the broker, with its reason.
    Rejected(Finding),
    /// Not possible in the broker's present state; the broker's message.
    Impossible(String),
    /// The broker could not be reached, or its response not be understood.
    Failed(String),
}

impl Outcome {
    /// True if the endpoint is served without findings.
    pub(crate) fn is_clean(&self) -> bool {
        matches!(self, Outcome::Served(preflight) if preflight.findings.is_empty())
    }
}

/// What was done about one endpoint so far.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Progress {
    /// Since when an action on it has been running.
    pub(crate) busy_since: Option<Instant>,
    /// The directory on which a trial of it runs.
    pub(crate) trial: Option<PathBuf>,
    /// The last attempt to apply it.
    pub(crate) attempt: Option<Attempt>,
    /// Since when it has not been desired.
    pub(crate) undesired_since: Option<Instant>,
    /// How many VMs the exclusive share rejected there.
    pub(crate) rejected: Option<u64>,
    /// When that number last grew.
    pub(crate) rejected_at: Option<Instant>,
    /// How many VMs were rejected there because of their memory.
    pub(crate) rejected_memory: Option<u64>,
    /// When that number last grew.
    pub(crate) rejected_memory_at: Option<Instant>,
}
