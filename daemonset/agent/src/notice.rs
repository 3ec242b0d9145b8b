//! What is said about a share: a reason, what was found, what would help.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use virtiofs_contract::preflight::Finding;

/// Why a share is not, or not quite, as declared. `reason` is one of [`virtiofs_contract::preflight::Reason`]
/// or of the words below: the same word in status, metrics and logs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Notice {
    /// One word.
    pub(crate) reason: String,
    /// What was found.
    pub(crate) message: String,
    /// What would make it right.
    pub(crate) remedy: String,
}

/// A document does not make sense; the last good version, if there was one, stays in force.
pub(crate) const MANIFEST_INVALID: &str = "ManifestInvalid";

/// The broker does not answer.
pub(crate) const BROKER_UNAVAILABLE: &str = "BrokerUnavailable";

/// The broker will not have the share as it is now.
pub(crate) const BROKER_REFUSED: &str = "BrokerRefused";

/// A session has no engine.
pub(crate) const SESSION_FAILED: &str = "SessionFailed";

/// A request of a guest has been waiting for the source for long.
pub(crate) const SOURCE_HUNG: &str = "SourceHung";

/// A guest is near to what it may hold.
pub(crate) const NEAR_LIMIT: &str = "NearLimit";

/// A guest puts requests into memory that its VMM does not share.
pub(crate) const GUEST_MEMORY_UNREACHABLE: &str = "GuestMemoryUnreachable";

/// A second VM was refused a share that one at a time may use.
pub(crate) const EXCLUSIVE_REFUSED: &str = "ExclusiveRefused";

/// A remedy against staleness has changed the configuration.
pub(crate) const REMEDY_IN_FORCE: &str = "RemedyInForce";

/// No remedy against staleness is left.
pub(crate) const REMEDY_FAILED: &str = "RemedyFailed";

/// What the agent says of its own accord; the rest comes from the broker.
#[cfg(test)]
pub(crate) const REASONS: [&str; 10] = [
    MANIFEST_INVALID,
    BROKER_UNAVAILABLE,
    BROKER_REFUSED,
    SESSION_FAILED,
    SOURCE_HUNG,
    NEAR_LIMIT,
    GUEST_MEMORY_UNREACHABLE,
    EXCLUSIVE_REFUSED,
    REMEDY_IN_FORCE,
    REMEDY_FAILED,
];

impl Notice {
    /// A notice in words of the agent's own.
    pub(crate) fn new(reason: &str, message: impl Into<String>, remedy: impl Into<String>) -> Self {
        Notice { reason: reason.to_owned(), message: message.into(), remedy: remedy.into() }
    }
}

impl From<&Finding> for Notice {
    fn from(finding: &Finding) -> Self {
        Notice::new(finding.reason.as_str(), &finding.message, &finding.remedy)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_reason_of_the_agent_is_in_the_manual() {
        let manual = include_str!("../../../docs/MANUAL.md");
        for reason in REASONS {
            assert!(manual.contains(&format!("| `{reason}` |")), "{reason} has no row in docs/MANUAL.md");
        }
    }
}
