//! How engines work: the overrides in a spec.

use kube::KubeSchema;
use kube::core::Rule;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use virtiofs_config::{CachePolicy, IdTranslationKind, InodeFileHandles, REQUEST_QUEUES, Sandbox};

use super::rule::{rule, rule_on};
use crate::{Interval, Quantity};

/// How engines work. Every field overrides what follows from `content`; `status.engine` shows the result.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = never_caches("entryTimeout"))]
#[x_kube(validation = never_caches("attrTimeout"))]
#[x_kube(validation = never_caches("negativeTimeout"))]
#[x_kube(validation = readdirplus_caches())]
#[x_kube(validation = writeback_caches())]
#[x_kube(validation = needs_xattr("posixACL"))]
#[x_kube(validation = needs_xattr("securityLabel"))]
#[x_kube(validation = needs_xattr("fileCapabilities"))]
#[x_kube(validation = map_needs_xattr())]
#[x_kube(validation = acls_exclude_translation())]
pub struct EngineOptions {
    /// What the guest keeps in its page cache. `Never`: nothing; every read is sent to the engine. `Metadata`: names
    /// and attributes. `Auto`: also contents, while size and modification time stay the same from close to open.
    /// `Always`: contents across opens.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "CachePolicy")]
    pub cache: Option<CachePolicy>,
    /// How long the guest trusts a name that it has looked up: a duration such as `500ms`, `1m30s` or `24h`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[x_kube(validation = at_most_a_day())]
    pub entry_timeout: Option<Interval>,
    /// How long the guest trusts attributes: a duration such as `500ms`, `1m30s` or `24h`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[x_kube(validation = at_most_a_day())]
    pub attr_timeout: Option<Interval>,
    /// How long the guest trusts that a name does not exist: a duration such as `500ms`, `1m30s` or `24h`. With `0s`
    /// it looks the name up each time.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[x_kube(validation = at_most_a_day())]
    pub negative_timeout: Option<Interval>,
    /// How the engine refers to inodes that the guest holds but has not opened. `Never`: by a file descriptor each.
    /// `Prefer`: by file handle where that works, else by descriptor. `Mandatory`: by file handle; where that does not
    /// work, the share is not served.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "InodeFileHandles")]
    pub inode_file_handles: Option<InodeFileHandles>,
    /// Whether the guest collects writes before it sends them. A change takes effect at the next mount.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Switch")]
    pub writeback: Option<Switch>,
    /// Whether extended attributes are passed through. Enabling it takes effect at the next mount.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Switch")]
    pub xattr: Option<Switch>,
    /// Rules that translate names of extended attributes, in the language of virtiofsd's `--xattrmap`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 4096))]
    pub xattr_map: Option<String>,
    /// Whether POSIX ACLs are offered to guests that support them. A change takes effect at the next mount.
    #[serde(default, rename = "posixACL", skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Switch")]
    pub posix_acl: Option<Switch>,
    /// Whether security labels are set on creation, for guests that send them. A change takes effect at the next mount.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Switch")]
    pub security_label: Option<Switch>,
    /// Whether the engine clears suid and sgid bits on write. A change takes effect at the next mount.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Switch")]
    pub killpriv: Option<Switch>,
    /// Whether mount points below the source are announced to the guest. A change takes effect at the next mount.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Switch")]
    pub announce_submounts: Option<Switch>,
    /// Whether names and attributes of a directory are sent together. A change takes effect at the next mount.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Switch")]
    pub readdirplus: Option<Switch>,
    /// Whether files can be mapped shared when contents are not cached. A change takes effect at the next mount.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Switch")]
    pub allow_mmap: Option<Switch>,
    /// Whether `O_DIRECT` is passed on to the host.
    #[serde(default, rename = "directIO", skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Switch")]
    pub direct_io: Option<Switch>,
    /// Whether the guest can create device nodes on the host. `Enabled` gives the engine `CAP_MKNOD`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Switch")]
    pub device_nodes: Option<Switch>,
    /// Whether the guest can set file capabilities on the host. `Enabled` gives the engine `CAP_SETFCAP`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Switch")]
    pub file_capabilities: Option<Switch>,
    /// Limit of open files of each engine. By default the hard limit of the broker.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1024, max = 1_073_741_816_u64))]
    pub open_files: Option<u64>,
    /// Number of inodes that one guest can hold. Beyond it a lookup is answered `ENFILE`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1024, max = 100_000_000_u64))]
    pub max_inodes: Option<u64>,
    /// Number of request queues that are offered to the guest.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = REQUEST_QUEUES))]
    pub queues: Option<u16>,
    /// How the engine is confined. `Auto`: as strictly as the node allows. `Namespace`: in namespaces of its own with
    /// the share as root. `Chroot`: with the share as root. `None`: not confined, which is refused to uid 0.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Sandbox")]
    pub sandbox: Option<Sandbox>,
    /// Translation of user ids; the first match wins.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 32))]
    #[x_kube(merge_strategy = ListMerge::Atomic)]
    pub uid_translation: Vec<IdTranslation>,
    /// Translation of group ids; the first match wins.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 32))]
    #[x_kube(merge_strategy = ListMerge::Atomic)]
    pub gid_translation: Vec<IdTranslation>,
    /// Limits of each engine on resources of the host.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub limits: Option<EngineLimits>,
}

/// Whether a feature is used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
pub enum Switch {
    /// The feature is used.
    Enabled,
    /// The feature is not used.
    Disabled,
}

impl Switch {
    /// Whether the feature is used.
    pub fn is_enabled(self) -> bool {
        self == Switch::Enabled
    }
}

impl From<bool> for Switch {
    fn from(enabled: bool) -> Self {
        if enabled { Switch::Enabled } else { Switch::Disabled }
    }
}

pub(super) fn readdirplus_caches() -> Rule {
    rule_on(
        ".readdirplus",
        "!has(self.cache) || self.cache != 'Never' || !has(self.readdirplus) || self.readdirplus != 'Enabled'",
        "'Enabled sends attributes ahead, which cache Never discards; write Disabled or remove it'",
    )
}

pub(super) fn writeback_caches() -> Rule {
    rule_on(
        ".writeback",
        "!has(self.writeback) || self.writeback != 'Enabled' || !has(self.cache) || self.cache in ['Auto', 'Always']",
        "'Enabled collects writes in the page cache, which cache ' + self.cache + ' does not use; write cache Auto or Always, or remove it'",
    )
}

pub(super) fn map_needs_xattr() -> Rule {
    rule_on(
        ".xattrMap",
        "!has(self.xattrMap) || (has(self.xattr) && self.xattr == 'Enabled')",
        "'translates names of extended attributes, which are disabled; write xattr: Enabled, or remove it'",
    )
}

pub(super) fn acls_exclude_translation() -> Rule {
    rule_on(
        ".posixACL",
        "!has(self.posixACL) || self.posixACL != 'Enabled' || ((!has(self.uidTranslation) || self.uidTranslation.size() == 0) && (!has(self.gidTranslation) || self.gidTranslation.size() == 0))",
        "'Enabled excludes uidTranslation and gidTranslation, because ids inside an ACL are not translated; remove one or the other'",
    )
}

/// No guest trusts anything for longer than with stock virtiofsd's `cache=always`.
pub(super) fn at_most_a_day() -> Rule {
    rule("duration(self) <= duration('24h')", "self + ' is too long; write 24h or less'")
}

pub(super) fn never_caches(timeout: &str) -> Rule {
    rule_on(
        &format!(".{timeout}"),
        format!(
            "!has(self.cache) || self.cache != 'Never' || !has(self.{timeout}) || duration(self.{timeout}) == duration('0s')"
        ),
        format!("self.{timeout} + ' contradicts cache Never, which caches nothing; write 0s or remove it'"),
    )
}

pub(super) fn needs_xattr(switch: &str) -> Rule {
    rule_on(
        &format!(".{switch}"),
        format!("!has(self.{switch}) || self.{switch} != 'Enabled' || (has(self.xattr) && self.xattr == 'Enabled')"),
        "'Enabled needs extended attributes, which are disabled; write xattr: Enabled, or remove it'",
    )
}

/// Limits of each engine on resources of the host. A limit that is absent does not apply. CPU and I/O are limited where
/// the broker can create control groups; where it cannot, the share reports `LimitUnavailable`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
pub struct EngineLimits {
    /// Private memory in bytes, such as `256Mi`. The guest's own memory does not count.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Quantity")]
    #[x_kube(validation = within("64Mi", "1Ti"))]
    pub memory: Option<Quantity>,
    /// CPU time in CPUs, such as `500m`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Quantity")]
    #[x_kube(validation = within("10m", "1024"))]
    pub cpu: Option<Quantity>,
    /// Weight of the CPU time against other processes; theirs is 100.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 10_000))]
    pub cpu_weight: Option<u64>,
    /// Weight of the I/O of the source's block device against other processes; theirs is 100.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 10_000))]
    pub io_weight: Option<u64>,
    /// Bytes per second read from the source's block device, such as `100Mi`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Quantity")]
    #[x_kube(validation = within("4Ki", "1Ti"))]
    pub read_bandwidth: Option<Quantity>,
    /// Bytes per second written to the source's block device, such as `100Mi`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Quantity")]
    #[x_kube(validation = within("4Ki", "1Ti"))]
    pub write_bandwidth: Option<Quantity>,
    /// Reads per second from the source's block device, such as `1k`.
    #[serde(default, rename = "readIOPS", skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Quantity")]
    #[x_kube(validation = within("1", "100M"))]
    pub read_iops: Option<Quantity>,
    /// Writes per second to the source's block device, such as `1k`.
    #[serde(default, rename = "writeIOPS", skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Quantity")]
    #[x_kube(validation = within("1", "100M"))]
    pub write_iops: Option<Quantity>,
}

/// Bounds of a quantity, which may be a number or text.
fn within(least: &str, most: &str) -> Rule {
    rule(
        format!(
            "quantity(string(self)).compareTo(quantity('{least}')) >= 0 && quantity(string(self)).compareTo(quantity('{most}')) <= 0"
        ),
        format!("string(self) + ' is out of range; write {least} to {most}'"),
    )
}

/// One rule of id translation.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = rule_on(
    ".to",
    "self.type == 'ForbidGuest' || has(self.to)",
    "'is missing; ' + self.type + ' needs the id that from becomes'",
))]
#[x_kube(validation = rule_on(
    ".to",
    "self.type != 'ForbidGuest' || !has(self.to)",
    "'contradicts ForbidGuest, which translates nothing; remove it'",
))]
#[x_kube(validation = rule_on(
    ".count",
    "self.from + self.count <= 4294967296",
    "'exceeds the last id, 4294967295, when counted from `from`; lower it'",
))]
#[x_kube(validation = rule_on(
    ".count",
    "!(self.type in ['Guest', 'Host', 'Map']) || !has(self.to) || self.to + self.count <= 4294967296",
    "'exceeds the last id, 4294967295, when counted from `to`; lower it'",
))]
pub struct IdTranslation {
    /// What is translated. `Guest`: guest ids to host ids. `Host`: host ids to guest ids. `Map`: both. `SquashGuest`,
    /// `SquashHost`: all ids of the range to one. `ForbidGuest`: guest ids of the range are refused.
    #[serde(rename = "type")]
    pub kind: IdTranslationKind,
    /// First id of the range; for `Map` the first guest id.
    pub from: u32,
    /// Id that `from` becomes; for `Map` the first host id. Not for `ForbidGuest`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub to: Option<u32>,
    /// Number of ids in the range.
    #[schemars(range(min = 1))]
    pub count: u32,
}

impl From<&virtiofs_config::Limits> for EngineLimits {
    fn from(limits: &virtiofs_config::Limits) -> Self {
        EngineLimits {
            memory: limits.memory_bytes.map(Quantity::from_bytes),
            cpu: limits.cpu_millis.map(Quantity::from_thousandths),
            cpu_weight: limits.cpu_weight,
            io_weight: limits.io_weight,
            read_bandwidth: limits.read_bytes_per_second.map(Quantity::from_bytes),
            write_bandwidth: limits.write_bytes_per_second.map(Quantity::from_bytes),
            read_iops: limits.reads_per_second.map(Quantity::from_count),
            write_iops: limits.writes_per_second.map(Quantity::from_count),
        }
    }
}

impl From<&EngineLimits> for virtiofs_config::Limits {
    fn from(limits: &EngineLimits) -> Self {
        let units = |quantity: &Option<Quantity>| quantity.as_ref().map(Quantity::units);
        virtiofs_config::Limits {
            memory_bytes: units(&limits.memory),
            cpu_millis: limits.cpu.as_ref().map(Quantity::thousandths),
            cpu_weight: limits.cpu_weight,
            io_weight: limits.io_weight,
            read_bytes_per_second: units(&limits.read_bandwidth),
            write_bytes_per_second: units(&limits.write_bandwidth),
            reads_per_second: units(&limits.read_iops),
            writes_per_second: units(&limits.write_iops),
        }
    }
}

impl From<&virtiofs_config::IdTranslation> for IdTranslation {
    fn from(rule: &virtiofs_config::IdTranslation) -> Self {
        let to = (rule.kind != IdTranslationKind::ForbidGuest).then_some(rule.to);
        IdTranslation { kind: rule.kind, from: rule.from, to, count: rule.count }
    }
}

impl From<&IdTranslation> for virtiofs_config::IdTranslation {
    fn from(rule: &IdTranslation) -> Self {
        virtiofs_config::IdTranslation { kind: rule.kind, from: rule.from, to: rule.to.unwrap_or(0), count: rule.count }
    }
}
