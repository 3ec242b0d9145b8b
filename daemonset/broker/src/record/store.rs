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
    use super::super::Ring;
    use super::*;
    use crate::vhost_user::codec::{Layout, Region};

    #[test]
    fn descriptors_take_the_place_of_their_numbers() {
        let layout = Layout { guest_addr: 0, size: 1 << 30, user_addr: 0x7f00_0000_0000, offset: 4096 };
        let ring = Ring { kick: Some(2), call: Some(3), ..Ring::default() };
        let regions = vec![Region { layout, file: 1 }];
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
