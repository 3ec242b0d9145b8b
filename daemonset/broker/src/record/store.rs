//! What the next broker needs to know about a session, besides its descriptors.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use thiserror::Error;
use virtiofs_config::EngineConfig;
use virtiofs_contract::control::{EngineBinary, LastReplacement};
use virtiofs_contract::counters::Replacements;
use virtiofs_contract::engine::Predecessor;
use virtiofs_contract::preflight::Preflight;

use super::SessionRecord;
use super::plan::SentState;
use crate::control_group::Group;

/// Everything about a session that outlives the broker's process.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Stored {
    /// Name of the session.
    pub(crate) session: String,
    /// Name of its endpoint.
    pub(crate) endpoint: String,
    /// Process that connected.
    pub(crate) vmm_pid: i32,
    /// Seconds since the Unix epoch at which it connected.
    pub(crate) connected_at: u64,
    /// Number of inodes that the ledger has room for at least.
    pub(crate) max_inodes: u64,
    /// The record, with numbers instead of descriptors.
    pub(crate) record: SessionRecord<u32>,
    /// The VMM's message that is being handled.
    pub(crate) message: MessageState,
    /// Who has the rings.
    pub(crate) rings: RingOwner,
    /// What changes with engines.
    pub(crate) progress: Progress,
}

/// How far the handling of a VMM's message is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum MessageState {
    /// No message is being handled.
    #[default]
    None,
    /// The record has its effect. Of its `length` bytes, those that are not in the message pipe are still in the VMM's
    /// socket.
    Applied {
        /// Bytes of the message.
        length: usize,
        /// The ring whose position the reply has.
        base_of: Option<usize>,
    },
    /// Its reply is in the reply pipe, or was sent.
    Replying,
}

/// The engine that has the rings.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(crate) enum RingOwner {
    /// No engine.
    #[default]
    Nobody,
    /// This engine, which has all that was sent to it.
    Engine(Box<StoredEngine>),
    /// Unknown: an engine was being changed, replaced or killed.
    Unknown,
}

/// What a broker needs to know about an engine to continue with it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct StoredEngine {
    /// Its serial number in this host's brokers.
    pub(crate) serial: u64,
    /// Version of the messages that it speaks.
    pub(crate) version: u32,
    pub(crate) config: EngineConfig,
    pub(crate) generation: u64,
    pub(crate) preflight: Preflight,
    pub(crate) binary: Option<EngineBinary>,
    pub(crate) root: Option<StoredRoot>,
    /// Its control groups.
    pub(crate) groups: Vec<Group>,
    pub(crate) sent: SentState<u32>,
}

/// Identity of a directory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct StoredRoot {
    pub(crate) mount: u64,
    pub(crate) device: (u32, u32),
    pub(crate) inode: u64,
}

/// Configurations and counts of a session's engines.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Progress {
    /// True once the VMM has sent a valid message.
    pub(crate) begun: bool,
    /// True if an engine has served it.
    pub(crate) has_served: bool,
    pub(crate) desired: StoredRevision,
    pub(crate) active: Option<StoredRevision>,
    pub(crate) predecessor: Predecessor,
    pub(crate) engines_started: u64,
    pub(crate) engines_served: u64,
    pub(crate) replacements: Replacements,
    pub(crate) last_replacement: Option<LastReplacement>,
    /// Mount point of the source when the last engine was started.
    pub(crate) mounted_at: Option<PathBuf>,
    /// The control group to which the memory of its engines is charged.
    #[serde(default)]
    pub(crate) group: Option<PathBuf>,
}

/// A configuration and its generation.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct StoredRevision {
    pub(crate) config: EngineConfig,
    pub(crate) generation: u64,
}

impl StoredRevision {
    /// A session before its first engine.
    pub(crate) fn first(config: EngineConfig) -> Self {
        StoredRevision { config, generation: 0 }
    }
}

impl Progress {
    /// A session before its first message.
    pub(crate) fn first(config: EngineConfig) -> Self {
        Progress {
            begun: false,
            has_served: false,
            desired: StoredRevision::first(config),
            active: None,
            predecessor: Predecessor::Quiesced,
            engines_started: 0,
            engines_served: 0,
            replacements: Replacements::default(),
            last_replacement: None,
            mounted_at: None,
            group: None,
        }
    }
}

/// A descriptor of the record is not held.
#[derive(Debug, Error, PartialEq, Eq)]
#[error("descriptor {0} of the record is not held")]
pub(crate) struct MissingDescriptor(pub(crate) u32);

/// The record with descriptors instead of numbers.
pub(crate) fn with_descriptors<F>(
    record: &SessionRecord<u32>,
    mut find: impl FnMut(u32) -> Option<F>,
) -> Result<SessionRecord<F>, MissingDescriptor> {
    record.try_map(|number| find(*number).ok_or(MissingDescriptor(*number)))
}

#[cfg(test)]
mod tests {
    use virtiofs_contract::control::ReplacementOutcome;

    use super::super::Ring;
    use super::*;
    use crate::control_group::{Controller, Written};
    use crate::engine::unknown_fields;
    use crate::state_file::{StateFile, check_layout, file_of};
    use crate::vhost_user::codec::{Layout, Region, Reply, ReplyValue, RingAddress};

    #[test]
    fn sessions_are_stored_in_the_layout_of_their_version() {
        check_layout("session", &sample());
    }

    #[test]
    fn session_of_a_newer_broker_is_read_and_what_restricts_it_is_named() {
        let mut newer = serde_json::to_value(sample()).unwrap();
        newer["new"] = serde_json::json!({"any": [1]});
        newer["record"]["rings"][0]["new"] = 1.into();
        newer["rings"]["Engine"]["preflight"]["new"] = 2.into();
        newer["progress"]["desired"]["config"]["noLinks"] = true.into();
        newer["progress"]["desired"]["config"]["limits"]["files"] = 3.into();
        let (_, read, unknown) = StateFile::<Stored>::open_newer(file_of(&newer)).unwrap();
        assert_eq!(read, sample());
        assert_eq!(unknown.len(), 5, "{unknown:?}");
        let mut restricting = unknown_fields::of_session(unknown);
        restricting.sort();
        assert_eq!(restricting, ["progress.desired.config.limits.files", "progress.desired.config.noLinks"]);
    }

    fn layout() -> Layout {
        Layout { guest_addr: 0, size: 1 << 30, user_addr: 0x7f00_0000_0000, offset: 4096 }
    }

    /// A session with all fields set.
    fn sample() -> Stored {
        let address = Some(RingAddress { descriptors: 0x7f00_0000_1000, used: 0x7f00_0000_2000, available: 3 });
        let (enabled, started, served) = (true, true, true);
        let (kick, call, err) = (Some(2), Some(3), Some(4));
        let ring = Ring { size: 1024, base: 7, address, kick, call, err, enabled, started, served };
        let record = SessionRecord {
            features: Some(1 << 32),
            protocol_features: 8,
            regions: vec![Region { layout: layout(), file: 1 }],
            rings: [ring, Ring::default()],
            reset_owed: true,
            reply_owed: Some(Reply { request: 11, value: ReplyValue::Vring { ring: 0, base: 7 } }),
        };
        let config = || EngineConfig::stock(virtiofs_config::Access::ReadWrite);
        let revision = |generation| StoredRevision { config: config(), generation };
        let mut replacements = Replacements::default();
        replacements.hand_overs.record(1_000_000);
        let written = Written {
            controller: Controller::Cpu,
            file: "cpu.max".into(),
            value: "50000 100000".into(),
            shown: "50000 100000".into(),
        };
        let engine = StoredEngine {
            serial: 5,
            version: 4,
            config: config(),
            generation: 6,
            preflight: virtiofs_client::fixtures::preflight(vec![virtiofs_client::fixtures::finding()]),
            binary: Some(EngineBinary { inode: 8, size: 9, modified: 10 }),
            root: Some(StoredRoot { mount: 11, device: (12, 13), inode: 14 }),
            groups: vec![Group { path: "/sys/fs/cgroup/engine-5".into(), written: vec![written] }],
            sent: SentState::sample(),
        };
        let finding = Some(virtiofs_client::fixtures::finding());
        let last_replacement =
            Some(LastReplacement { at: 15, outcome: ReplacementOutcome::Aborted, pause_ns: 16, finding });
        Stored {
            session: "data-1".into(),
            endpoint: "data".into(),
            vmm_pid: 17,
            connected_at: 18,
            max_inodes: 19,
            record,
            message: MessageState::Applied { length: 20, base_of: Some(1) },
            rings: RingOwner::Engine(Box::new(engine)),
            progress: Progress {
                begun: true,
                has_served: true,
                desired: revision(7),
                active: Some(revision(6)),
                predecessor: Predecessor::Faulted,
                engines_started: 21,
                engines_served: 22,
                replacements,
                last_replacement,
                mounted_at: Some("/srv".into()),
                group: Some("/sys/fs/cgroup/session-1".into()),
            },
        }
    }

    #[test]
    fn descriptors_take_the_place_of_their_numbers() {
        let ring = Ring { kick: Some(2), call: Some(3), ..Ring::default() };
        let regions = vec![Region { layout: layout(), file: 1 }];
        let record = SessionRecord { regions, rings: [ring, Ring::default()], ..SessionRecord::default() };
        let restored = with_descriptors(&record, |number| Some(format!("fd {number}"))).unwrap();
        assert_eq!(restored.regions[0].file, "fd 1");
        assert_eq!(
            (restored.rings[0].kick.as_deref(), restored.rings[0].call.as_deref()),
            (Some("fd 2"), Some("fd 3"))
        );
        let missing = with_descriptors(&record, |number| (number != 3).then_some(number));
        assert_eq!(missing, Err(MissingDescriptor(3)));
    }
}
