//! The active configuration of engines, as a status shows it.

use schemars::{JsonSchema, Schema};
use serde::{Deserialize, Deserializer, Serialize};
use virtiofs_config::{EngineConfig, IdTranslationKind};

use super::EngineLimits;
use crate::Interval;

/// The configuration that engines of the share run with: what follows from `content`, and the overrides of
/// `spec.engine`. The fields mean what they mean there.
// No rules, enumerations or required fields: an operator that is newer or older than the definition must not fail to
// write a status.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
#[schemars(transform = require_nothing)]
pub struct EngineStatus {
    /// What the guest caches: `Never`, `Metadata`, `Auto` or `Always`.
    #[schemars(length(max = 63))]
    pub cache: String,
    /// How long the guest trusts a name that it has looked up.
    pub entry_timeout: Interval,
    /// How long the guest trusts attributes.
    pub attr_timeout: Interval,
    /// How long the guest trusts that a name does not exist.
    pub negative_timeout: Interval,
    /// How the engine refers to inodes: `Never`, `Prefer` or `Mandatory` by file handle.
    #[schemars(length(max = 63))]
    pub inode_file_handles: String,
    /// Whether the guest collects writes.
    pub writeback: bool,
    /// Whether extended attributes are passed through.
    pub xattr: bool,
    /// Rules that translate names of extended attributes. Absent: none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 4096))]
    pub xattr_map: Option<String>,
    /// Whether POSIX ACLs are offered to guests.
    pub posix_acl: bool,
    /// Whether security labels are set on creation.
    pub security_label: bool,
    /// Whether the engine clears suid and sgid bits on write.
    pub killpriv: bool,
    /// Whether mount points are announced to the guest.
    pub announce_submounts: bool,
    /// Whether names and attributes of a directory are sent together.
    pub readdirplus: bool,
    /// Whether files can be mapped shared when contents are not cached.
    pub allow_mmap: bool,
    /// Whether `O_DIRECT` is passed on to the host.
    pub direct_io: bool,
    /// Whether the guest can create device nodes.
    pub device_nodes: bool,
    /// Whether the guest can set file capabilities.
    pub file_capabilities: bool,
    /// Limit of open files of each engine. Absent: the hard limit of the broker.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub open_files: Option<u64>,
    /// Number of inodes that one guest can hold.
    pub max_inodes: u64,
    /// Number of request queues.
    pub queues: u16,
    /// How the engine is confined: `Auto`, `Namespace`, `Chroot` or `None`.
    #[schemars(length(max = 63))]
    pub sandbox: String,
    /// Translation of user ids; the first match wins.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 32), extend("x-kubernetes-list-type" = "atomic"))]
    pub uid_translation: Vec<IdTranslationStatus>,
    /// Translation of group ids; the first match wins.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 32), extend("x-kubernetes-list-type" = "atomic"))]
    pub gid_translation: Vec<IdTranslationStatus>,
    /// Limits of each engine.
    #[serde(default)]
    pub limits: EngineLimits,
}

/// One rule of id translation.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
#[schemars(transform = require_nothing)]
pub struct IdTranslationStatus {
    /// What is translated: `Guest`, `Host`, `Map`, `SquashGuest`, `SquashHost` or `ForbidGuest`.
    #[serde(rename = "type")]
    #[schemars(length(max = 63))]
    pub kind: String,
    /// First id of the range.
    pub from: u32,
    /// Id that `from` becomes. Absent for `ForbidGuest`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub to: Option<u32>,
    /// Number of ids in the range.
    pub count: u32,
}

fn require_nothing(schema: &mut Schema) {
    schema.remove("required");
}

/// Reads the configuration of another release's status, or nothing: its fields may be others, and a share whose status
/// cannot be read must not become unreadable.
pub(super) fn lenient<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<EngineStatus>, D::Error> {
    let value = Option::<serde_json::Value>::deserialize(deserializer)?;
    Ok(value.and_then(|value| serde_json::from_value(value).ok()))
}

/// The word that stands for a value on the wire.
///
/// # Panics
/// Never for an enumeration without fields, which serializes to a string.
pub fn word(value: impl Serialize) -> String {
    match serde_json::to_value(value) {
        Ok(serde_json::Value::String(word)) => word,
        other => unreachable!("a value without fields is a word: {other:?}"),
    }
}

impl From<&EngineConfig> for EngineStatus {
    fn from(config: &EngineConfig) -> Self {
        EngineStatus {
            cache: word(config.cache),
            entry_timeout: Interval::from_millis(config.entry_timeout_ms),
            attr_timeout: Interval::from_millis(config.attr_timeout_ms),
            negative_timeout: Interval::from_millis(config.negative_timeout_ms),
            inode_file_handles: word(config.inode_file_handles),
            writeback: config.writeback,
            xattr: config.xattr,
            xattr_map: config.xattr_map.clone(),
            posix_acl: config.posix_acl,
            security_label: config.security_label,
            killpriv: config.killpriv,
            announce_submounts: config.announce_submounts,
            readdirplus: config.readdirplus,
            allow_mmap: config.allow_mmap,
            direct_io: config.direct_io,
            device_nodes: config.device_nodes,
            file_capabilities: config.file_capabilities,
            open_files: config.open_files,
            max_inodes: config.max_inodes,
            queues: config.queues,
            sandbox: word(config.sandbox),
            uid_translation: config.uid_translation.iter().map(Into::into).collect(),
            gid_translation: config.gid_translation.iter().map(Into::into).collect(),
            limits: (&config.limits).into(),
        }
    }
}

impl From<&virtiofs_config::IdTranslation> for IdTranslationStatus {
    fn from(rule: &virtiofs_config::IdTranslation) -> Self {
        let to = (rule.kind != IdTranslationKind::ForbidGuest).then_some(rule.to);
        IdTranslationStatus { kind: word(rule.kind), from: rule.from, to, count: rule.count }
    }
}
