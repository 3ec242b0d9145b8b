//! Notices: a reason, what was found, what would help.

use std::borrow::Cow;

use schemars::{JsonSchema, Schema, SchemaGenerator};
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use virtiofs_contract::preflight::{Finding, Reason};
use virtiofs_contract::staleness::{CAUSES, Cause};

/// Why a share is not, or not exactly, served as declared.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Notice {
    /// One word.
    pub reason: NoticeReason,
    /// What was found.
    pub message: String,
    /// What would make it right.
    pub remedy: String,
}

/// A reason. Its name is the same in status, metrics and logs, and is how it is serialized.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NoticeReason {
    /// Found by the broker, by a trial engine, or when the agent looked for the source.
    Finding(Reason),
    /// Guests hold stale names or handles, or a request hangs in the source.
    Stale(Cause),
    /// A document is invalid; the last good version, if there was one, stays active.
    ManifestInvalid,
    /// The broker does not answer.
    BrokerUnavailable,
    /// The broker rejects the share in its present state.
    BrokerRejected,
    /// A session has no engine.
    SessionFailed,
    /// A guest is near a limit of what it may hold.
    NearLimit,
    /// A guest puts requests into memory that its VMM does not share.
    GuestMemoryUnreachable,
    /// Engines cannot share a VM's memory.
    GuestMemoryRejected,
    /// A second VM was refused a share that one VM at a time may use.
    ExclusiveRejected,
    /// Sessions ended with their broker and could not be restored.
    SessionLost,
    /// A remedy against staleness has changed the configuration.
    RemedyActive,
    /// No remedy against staleness is left.
    RemedyFailed,
    /// A volume's share is not served on this node any more.
    NotServed,
}

impl NoticeReason {
    /// Reasons of the agent's own; the others come from the broker and the engines.
    const OWN: [NoticeReason; 12] = [
        NoticeReason::ManifestInvalid,
        NoticeReason::BrokerUnavailable,
        NoticeReason::BrokerRejected,
        NoticeReason::SessionFailed,
        NoticeReason::NearLimit,
        NoticeReason::GuestMemoryUnreachable,
        NoticeReason::GuestMemoryRejected,
        NoticeReason::ExclusiveRejected,
        NoticeReason::SessionLost,
        NoticeReason::RemedyActive,
        NoticeReason::RemedyFailed,
        NoticeReason::NotServed,
    ];

    /// The name in status, metrics and logs.
    pub fn as_str(self) -> &'static str {
        match self {
            NoticeReason::Finding(reason) => reason.as_str(),
            NoticeReason::Stale(cause) => cause.name(),
            NoticeReason::ManifestInvalid => "ManifestInvalid",
            NoticeReason::BrokerUnavailable => "BrokerUnavailable",
            NoticeReason::BrokerRejected => "BrokerRejected",
            NoticeReason::SessionFailed => "SessionFailed",
            NoticeReason::NearLimit => "NearLimit",
            NoticeReason::GuestMemoryUnreachable => "GuestMemoryUnreachable",
            NoticeReason::GuestMemoryRejected => "GuestMemoryRejected",
            NoticeReason::ExclusiveRejected => "ExclusiveRejected",
            NoticeReason::SessionLost => "SessionLost",
            NoticeReason::RemedyActive => "RemedyActive",
            NoticeReason::RemedyFailed => "RemedyFailed",
            NoticeReason::NotServed => "NotServed",
        }
    }

    /// The reason of this name, if there is one.
    fn parse(name: &str) -> Option<Self> {
        let finding = || Reason::deserialize(serde::de::value::StrDeserializer::<serde::de::value::Error>::new(name));
        let stale = || CAUSES.into_iter().find(|cause| cause.name() == name).map(NoticeReason::Stale);
        let own = NoticeReason::OWN.into_iter().find(|reason| reason.as_str() == name);
        own.or_else(|| finding().ok().map(NoticeReason::Finding)).or_else(stale)
    }
}

impl Serialize for NoticeReason {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.as_str())
    }
}

impl<'de> Deserialize<'de> for NoticeReason {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let name = Cow::<'de, str>::deserialize(deserializer)?;
        NoticeReason::parse(&name).ok_or_else(|| serde::de::Error::custom(format!("unknown reason {name:?}")))
    }
}

impl JsonSchema for NoticeReason {
    fn schema_name() -> Cow<'static, str> {
        "NoticeReason".into()
    }

    fn inline_schema() -> bool {
        true
    }

    fn json_schema(generator: &mut SchemaGenerator) -> Schema {
        String::json_schema(generator)
    }
}

impl Notice {
    /// A notice with a message of the agent's own.
    pub fn new(reason: NoticeReason, message: impl Into<String>, remedy: impl Into<String>) -> Self {
        Notice { reason, message: message.into(), remedy: remedy.into() }
    }
}

impl From<&Finding> for Notice {
    fn from(finding: &Finding) -> Self {
        Notice::new(NoticeReason::Finding(finding.reason), &finding.message, &finding.remedy)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_reason_of_the_agent_is_in_the_manual() {
        let manual = include_str!("../../../docs/MANUAL.md");
        for reason in NoticeReason::OWN.into_iter().filter(|reason| *reason != NoticeReason::NotServed) {
            let name = reason.as_str();
            assert!(manual.contains(&format!("| `{name}` |")), "{name} has no row in docs/MANUAL.md");
        }
    }

    #[test]
    fn reasons_are_read_back() {
        let stale = CAUSES.map(NoticeReason::Stale);
        let findings = [Reason::SourceMissing, Reason::RemountRequired].map(NoticeReason::Finding);
        for reason in NoticeReason::OWN.into_iter().chain(stale).chain(findings) {
            let text = serde_json::to_string(&reason).unwrap();
            assert_eq!(serde_json::from_str::<NoticeReason>(&text).unwrap(), reason);
        }
        assert!(serde_json::from_str::<NoticeReason>("\"Unknown\"").is_err());
    }
}
