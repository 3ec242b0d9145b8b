//! The active configuration of engines, as a status shows it.

use schemars::{JsonSchema, Schema};
use serde::{Deserialize, Deserializer, Serialize};
use virtiofs_config::{EngineConfig, IdTranslationKind};

use super::{EngineLimits, Switch};
use crate::{Interval, Quantity};

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
    #[schemars(length(max = 63))]
    pub entry_timeout: String,
    /// How long the guest trusts attributes.
    #[schemars(length(max = 63))]
    pub attr_timeout: String,
    /// How long the guest trusts that a name does not exist.
    #[schemars(length(max = 63))]
    pub negative_timeout: String,
    /// How the engine refers to inodes: `Never`, `Prefer` or `Mandatory` by file handle.
    #[schemars(length(max = 63))]
    pub inode_file_handles: String,
    /// Whether the guest collects writes: `Enabled` or `Disabled`, as all features below.
    #[schemars(length(max = 63))]
    pub writeback: String,
    /// Whether extended attributes are passed through.
    #[schemars(length(max = 63))]
    pub xattr: String,
    /// Rules that translate names of extended attributes. Absent: none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 4096))]
    pub xattr_map: Option<String>,
    /// Whether POSIX ACLs are offered to guests.
    #[serde(rename = "posixACL")]
    #[schemars(length(max = 63))]
    pub posix_acl: String,
    /// Whether security labels are set on creation.
    #[schemars(length(max = 63))]
    pub security_label: String,
    /// Whether the engine clears suid and sgid bits on write.
    #[schemars(length(max = 63))]
    pub killpriv: String,
    /// Whether mount points are announced to the guest.
    #[schemars(length(max = 63))]
    pub announce_submounts: String,
    /// Whether names and attributes of a directory are sent together.
    #[schemars(length(max = 63))]
    pub readdirplus: String,
    /// Whether files can be mapped shared when contents are not cached.
    #[schemars(length(max = 63))]
    pub allow_mmap: String,
    /// Whether `O_DIRECT` is passed on to the host.
    #[serde(rename = "directIO")]
    #[schemars(length(max = 63))]
    pub direct_io: String,
    /// Whether the guest can create device nodes.
    #[schemars(length(max = 63))]
    pub device_nodes: String,
    /// Whether the guest can set file capabilities.
    #[schemars(length(max = 63))]
    pub file_capabilities: String,
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
    pub limits: LimitsStatus,
}

/// Limits of each engine. A limit that is absent does not apply.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
#[schemars(transform = require_nothing)]
pub struct LimitsStatus {
    /// Private memory, in bytes.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 32))]
    pub memory: Option<String>,
    /// CPU time, in CPUs.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 32))]
    pub cpu: Option<String>,
    /// Weight of the CPU time.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cpu_weight: Option<u64>,
    /// Weight of the I/O of the source's block device.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub io_weight: Option<u64>,
    /// Bytes per second read from the source's block device.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 32))]
    pub read_bandwidth: Option<String>,
    /// Bytes per second written to the source's block device.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 32))]
    pub write_bandwidth: Option<String>,
    /// Reads per second from the source's block device.
    #[serde(rename = "readIOPS", skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 32))]
    pub read_iops: Option<String>,
    /// Writes per second to the source's block device.
    #[serde(rename = "writeIOPS", skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 32))]
    pub write_iops: Option<String>,
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

/// The word for a feature that is used or not.
fn switch(enabled: bool) -> String {
    word(Switch::from(enabled))
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
            entry_timeout: Interval::from_millis(config.entry_timeout_ms).to_string(),
            attr_timeout: Interval::from_millis(config.attr_timeout_ms).to_string(),
            negative_timeout: Interval::from_millis(config.negative_timeout_ms).to_string(),
            inode_file_handles: word(config.inode_file_handles),
            writeback: switch(config.writeback),
            xattr: switch(config.xattr),
            xattr_map: config.xattr_map.clone(),
            posix_acl: switch(config.posix_acl),
            security_label: switch(config.security_label),
            killpriv: switch(config.killpriv),
            announce_submounts: switch(config.announce_submounts),
            readdirplus: switch(config.readdirplus),
            allow_mmap: switch(config.allow_mmap),
            direct_io: switch(config.direct_io),
            device_nodes: switch(config.device_nodes),
            file_capabilities: switch(config.file_capabilities),
            open_files: config.open_files,
            max_inodes: config.max_inodes,
            queues: config.queues,
            sandbox: word(config.sandbox),
            uid_translation: config.uid_translation.iter().map(Into::into).collect(),
            gid_translation: config.gid_translation.iter().map(Into::into).collect(),
            limits: LimitsStatus::from(&EngineLimits::from(&config.limits)),
        }
    }
}

impl From<&EngineLimits> for LimitsStatus {
    fn from(limits: &EngineLimits) -> Self {
        let text = |quantity: &Option<Quantity>| quantity.as_ref().map(Quantity::to_string);
        LimitsStatus {
            memory: text(&limits.memory),
            cpu: text(&limits.cpu),
            cpu_weight: limits.cpu_weight,
            io_weight: limits.io_weight,
            read_bandwidth: text(&limits.read_bandwidth),
            write_bandwidth: text(&limits.write_bandwidth),
            read_iops: text(&limits.read_iops),
            write_iops: text(&limits.write_iops),
        }
    }
}

impl From<&virtiofs_config::IdTranslation> for IdTranslationStatus {
    fn from(rule: &virtiofs_config::IdTranslation) -> Self {
        let to = (rule.kind != IdTranslationKind::ForbidGuest).then_some(rule.to);
        IdTranslationStatus { kind: word(rule.kind), from: rule.from, to, count: rule.count }
    }
}
