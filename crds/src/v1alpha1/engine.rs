//! How engines work: overrides in a spec, the values in force in a status.

use kube::KubeSchema;
use kube::core::Rule;
use serde::{Deserialize, Serialize};
use virtiofs_config::{CachePolicy, EngineConfig, IdTranslationKind, InodeFileHandles, REQUEST_QUEUES, Sandbox};

use super::rule::{rule, rule_on};
use crate::Interval;

/// How engines work.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = never_keeps("entryTimeout"))]
#[x_kube(validation = never_keeps("attrTimeout"))]
#[x_kube(validation = never_keeps("negativeTimeout"))]
#[x_kube(validation = rule_on(
    ".readdirplus",
    "!has(self.cache) || self.cache != 'Never' || !has(self.readdirplus) || !self.readdirplus",
    "'true sends attributes ahead, which cache Never throws away; write false or remove it'",
))]
#[x_kube(validation = rule_on(
    ".writeback",
    "!has(self.writeback) || !self.writeback || !has(self.cache) || self.cache in ['Auto', 'Always']",
    "'true collects writes in the page cache, which cache ' + self.cache + ' does without; write cache Auto or Always, or remove it'",
))]
#[x_kube(validation = needs_xattr("posixAcl"))]
#[x_kube(validation = needs_xattr("securityLabel"))]
#[x_kube(validation = needs_xattr("fileCapabilities"))]
#[x_kube(validation = rule_on(
    ".xattrMap",
    "!has(self.xattrMap) || (has(self.xattr) && self.xattr)",
    "'translates names of extended attributes, which are off; write xattr: true, or remove it'",
))]
#[x_kube(validation = rule_on(
    ".posixAcl",
    "!has(self.posixAcl) || !self.posixAcl || ((!has(self.uidTranslation) || self.uidTranslation.size() == 0) && (!has(self.gidTranslation) || self.gidTranslation.size() == 0))",
    "'true excludes uidTranslation and gidTranslation, as ids inside an ACL are not translated; remove one or the other'",
))]
pub struct EngineOptions {
    /// What the guest may keep in its page cache. `Never`: nothing, every read is asked for. `Metadata`:
    /// names and attributes. `Auto`: contents too, while size and modification time stay the same from
    /// close to open. `Always`: contents across opens.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "CachePolicy")]
    pub cache: Option<CachePolicy>,
    /// How long the guest may trust a name it has looked up: a duration such as `500ms`, `1m30s` or `24h`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[x_kube(validation = at_most_a_day())]
    pub entry_timeout: Option<Interval>,
    /// How long the guest may trust attributes: a duration such as `500ms`, `1m30s` or `24h`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[x_kube(validation = at_most_a_day())]
    pub attr_timeout: Option<Interval>,
    /// How long the guest may trust that a name does not exist: a duration such as `500ms`, `1m30s` or `24h`;
    /// `0s`: it asks each time.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[x_kube(validation = at_most_a_day())]
    pub negative_timeout: Option<Interval>,
    /// How inodes are referred to that the guest holds but has not opened. `Never`: by a file descriptor
    /// each. `Prefer`: by file handle where that works, else by descriptor. `Mandatory`: by file handle, and
    /// where that does not work the share is not served.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "InodeFileHandles")]
    pub inode_file_handles: Option<InodeFileHandles>,
    /// May the guest collect writes before it sends them? Takes effect at the next mount.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub writeback: Option<bool>,
    /// Are extended attributes passed through? Switching it on takes effect at the next mount.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub xattr: Option<bool>,
    /// Rules that translate names of extended attributes, in virtiofsd's `--xattrmap` language.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 4096))]
    pub xattr_map: Option<String>,
    /// Are POSIX ACLs offered to guests that know them? Takes effect at the next mount.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub posix_acl: Option<bool>,
    /// Are security labels set on creation, for guests that send them? Takes effect at the next mount.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub security_label: Option<bool>,
    /// Does the engine clear suid and sgid bits on write? Takes effect at the next mount.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub killpriv: Option<bool>,
    /// Is the guest told which directories are mount points? Takes effect at the next mount.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub announce_submounts: Option<bool>,
    /// Are names and attributes of a directory sent together? Takes effect at the next mount.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub readdirplus: Option<bool>,
    /// May files be mapped shared when contents are not cached? Takes effect at the next mount.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub allow_mmap: Option<bool>,
    /// Is `O_DIRECT` passed on to the host?
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub direct_io: Option<bool>,
    /// May the guest create device nodes on the host? Gives the engine `CAP_MKNOD`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub device_nodes: Option<bool>,
    /// May the guest set file capabilities on the host? Gives the engine `CAP_SETFCAP`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub file_capabilities: Option<bool>,
    /// Limit of open files of each engine. None: the hard limit of the place.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1024, max = 1_073_741_816_u64))]
    pub open_files: Option<u64>,
    /// How many inodes one guest may hold; beyond it a lookup is answered `ENFILE`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1024, max = 100_000_000_u64))]
    pub max_inodes: Option<u64>,
    /// Number of request queues offered.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = REQUEST_QUEUES))]
    pub queues: Option<u16>,
    /// How the engine is confined. `Auto`: as strictly as the place allows. `Namespace`: in namespaces of its
    /// own with the share as root. `Chroot`: with the share as root. `None`: not at all, which is refused
    /// to uid 0.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Sandbox")]
    pub sandbox: Option<Sandbox>,
    /// Translation of user ids, first match wins.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 32))]
    pub uid_translation: Vec<IdTranslation>,
    /// Translation of group ids, first match wins.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 32))]
    pub gid_translation: Vec<IdTranslation>,
    /// What each engine may use of the host.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub limits: Option<EngineLimits>,
}

/// No guest is told to trust anything for longer than stock virtiofsd's `cache=always` tells it to.
fn at_most_a_day() -> Rule {
    rule(
        "duration(self) <= duration('24h')",
        "self + ' is longer than a guest is ever told to trust; write 24h or less'",
    )
}

fn never_keeps(timeout: &str) -> Rule {
    rule_on(
        &format!(".{timeout}"),
        format!(
            "!has(self.cache) || self.cache != 'Never' || !has(self.{timeout}) || duration(self.{timeout}) == duration('0s')"
        ),
        format!("self.{timeout} + ' is of no use to cache Never, which keeps nothing; write 0s or remove it'"),
    )
}

fn needs_xattr(switch: &str) -> Rule {
    rule_on(
        &format!(".{switch}"),
        format!("!has(self.{switch}) || !self.{switch} || (has(self.xattr) && self.xattr)"),
        "'true is stored in extended attributes, which are off; write xattr: true, or remove it'",
    )
}

/// What each engine may use of the host. Left out: no limit of its own. CPU and I/O are limited where the broker may
/// make cgroups; where it may not, the share says `LimitUnavailable`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
pub struct EngineLimits {
    /// Private memory in bytes; the guest's own memory is not part of it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 67_108_864, max = 1_099_511_627_776_u64))]
    pub memory_bytes: Option<u64>,
    /// CPU time, in thousandths of one CPU.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 10, max = 1_024_000))]
    pub cpu_millis: Option<u64>,
    /// Share of the CPU against others that want it at the same time; 100 is what others have.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 10_000))]
    pub cpu_weight: Option<u64>,
    /// Share of the source's block device likewise.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 10_000))]
    pub io_weight: Option<u64>,
    /// Bytes a second read from the source's block device.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 4096, max = 1_099_511_627_776_u64))]
    pub read_bytes_per_second: Option<u64>,
    /// Bytes a second written to it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 4096, max = 1_099_511_627_776_u64))]
    pub write_bytes_per_second: Option<u64>,
    /// Reads a second of it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 100_000_000))]
    pub reads_per_second: Option<u64>,
    /// Writes a second to it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 100_000_000))]
    pub writes_per_second: Option<u64>,
}

/// One rule of id translation.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = rule_on(
    ".to",
    "self.kind == 'ForbidGuest' || has(self.to)",
    "'is missing; ' + self.kind + ' needs the id that from becomes'",
))]
#[x_kube(validation = rule_on(
    ".to",
    "self.kind != 'ForbidGuest' || !has(self.to)",
    "'is of no use to ForbidGuest, which translates nothing; remove it'",
))]
#[x_kube(validation = rule_on(
    ".count",
    "self.from + self.count <= 4294967296",
    "'reaches beyond the last id, 4294967295, when counted from `from`; lower it'",
))]
#[x_kube(validation = rule_on(
    ".count",
    "!(self.kind in ['Guest', 'Host', 'Map']) || !has(self.to) || self.to + self.count <= 4294967296",
    "'reaches beyond the last id, 4294967295, when counted from `to`; lower it'",
))]
pub struct IdTranslation {
    /// What is translated, and in which direction. `Guest`: guest ids to host ids. `Host`: host ids to guest
    /// ids. `Map`: both. `SquashGuest`, `SquashHost`: all ids of the range to one. `ForbidGuest`: guest ids of
    /// the range are refused.
    pub kind: IdTranslationKind,
    /// First id of the range that is translated; for `Map` the first guest id.
    pub from: u32,
    /// Id that `from` becomes; for `Map` the first host id. Not for `ForbidGuest`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub to: Option<u32>,
    /// Number of ids in the range.
    #[schemars(range(min = 1))]
    pub count: u32,
}

impl From<&EngineConfig> for EngineOptions {
    /// The configuration in force, in the words of the API.
    fn from(config: &EngineConfig) -> Self {
        EngineOptions {
            cache: Some(config.cache),
            entry_timeout: Some(Interval::from_millis(config.entry_timeout_ms)),
            attr_timeout: Some(Interval::from_millis(config.attr_timeout_ms)),
            negative_timeout: Some(Interval::from_millis(config.negative_timeout_ms)),
            inode_file_handles: Some(config.inode_file_handles),
            writeback: Some(config.writeback),
            xattr: Some(config.xattr),
            xattr_map: config.xattr_map.clone(),
            posix_acl: Some(config.posix_acl),
            security_label: Some(config.security_label),
            killpriv: Some(config.killpriv),
            announce_submounts: Some(config.announce_submounts),
            readdirplus: Some(config.readdirplus),
            allow_mmap: Some(config.allow_mmap),
            direct_io: Some(config.direct_io),
            device_nodes: Some(config.device_nodes),
            file_capabilities: Some(config.file_capabilities),
            open_files: config.open_files,
            max_inodes: Some(config.max_inodes),
            queues: Some(config.queues),
            sandbox: Some(config.sandbox),
            uid_translation: config.uid_translation.iter().map(Into::into).collect(),
            gid_translation: config.gid_translation.iter().map(Into::into).collect(),
            limits: (config.limits != virtiofs_config::Limits::default()).then(|| (&config.limits).into()),
        }
    }
}

impl From<&virtiofs_config::Limits> for EngineLimits {
    fn from(limits: &virtiofs_config::Limits) -> Self {
        EngineLimits {
            memory_bytes: limits.memory_bytes,
            cpu_millis: limits.cpu_millis,
            cpu_weight: limits.cpu_weight,
            io_weight: limits.io_weight,
            read_bytes_per_second: limits.read_bytes_per_second,
            write_bytes_per_second: limits.write_bytes_per_second,
            reads_per_second: limits.reads_per_second,
            writes_per_second: limits.writes_per_second,
        }
    }
}

impl From<&EngineLimits> for virtiofs_config::Limits {
    fn from(limits: &EngineLimits) -> Self {
        virtiofs_config::Limits {
            memory_bytes: limits.memory_bytes,
            cpu_millis: limits.cpu_millis,
            cpu_weight: limits.cpu_weight,
            io_weight: limits.io_weight,
            read_bytes_per_second: limits.read_bytes_per_second,
            write_bytes_per_second: limits.write_bytes_per_second,
            reads_per_second: limits.reads_per_second,
            writes_per_second: limits.writes_per_second,
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
