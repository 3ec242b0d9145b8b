//! The configuration of engines in an export: every value, so that all nodes serve the same whatever the version of their
//! agents.

use kube::KubeSchema;
use serde::{Deserialize, Serialize};
use virtiofs_config::{Access, CachePolicy, EngineConfig, InodeFileHandles, REQUEST_QUEUES, Sandbox};

use super::engine::{
    acls_exclude_translation, at_most_a_day, map_needs_xattr, needs_xattr, never_caches, readdirplus_caches,
    writeback_caches,
};
use super::{EngineLimits, IdTranslation, Switch};
use crate::Interval;

/// The configuration that engines run with. The fields mean what they mean in `spec.engine` of a share.
// A field that a later release adds needs a default, so that exports of an earlier operator stay valid.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
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
pub struct ResolvedEngine {
    /// What the guest keeps in its page cache.
    pub cache: CachePolicy,
    /// How long the guest trusts a name that it has looked up.
    #[x_kube(validation = at_most_a_day())]
    pub entry_timeout: Interval,
    /// How long the guest trusts attributes.
    #[x_kube(validation = at_most_a_day())]
    pub attr_timeout: Interval,
    /// How long the guest trusts that a name does not exist.
    #[x_kube(validation = at_most_a_day())]
    pub negative_timeout: Interval,
    /// How the engine refers to inodes that the guest holds but has not opened.
    pub inode_file_handles: InodeFileHandles,
    /// Whether the guest collects writes before it sends them.
    pub writeback: Switch,
    /// Whether extended attributes are passed through.
    pub xattr: Switch,
    /// Rules that translate names of extended attributes. Absent: none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 4096))]
    pub xattr_map: Option<String>,
    /// Whether POSIX ACLs are offered to guests.
    #[serde(rename = "posixACL")]
    pub posix_acl: Switch,
    /// Whether security labels are set on creation.
    pub security_label: Switch,
    /// Whether the engine clears suid and sgid bits on write.
    pub killpriv: Switch,
    /// Whether mount points below the source are announced to the guest.
    pub announce_submounts: Switch,
    /// Whether names and attributes of a directory are sent together.
    pub readdirplus: Switch,
    /// Whether files can be mapped shared when contents are not cached.
    pub allow_mmap: Switch,
    /// Whether `O_DIRECT` is passed on to the host.
    #[serde(rename = "directIO")]
    pub direct_io: Switch,
    /// Whether the guest can create device nodes on the host.
    pub device_nodes: Switch,
    /// Whether the guest can set file capabilities on the host.
    pub file_capabilities: Switch,
    /// Limit of open files of each engine. Absent: the hard limit of the broker.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1024, max = 1_073_741_816_u64))]
    pub open_files: Option<u64>,
    /// Number of inodes that one guest can hold.
    #[schemars(range(min = 1024, max = 100_000_000_u64))]
    pub max_inodes: u64,
    /// Number of request queues that are offered to the guest.
    #[schemars(range(min = 1, max = REQUEST_QUEUES))]
    pub queues: u16,
    /// How the engine is confined.
    pub sandbox: Sandbox,
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
    #[serde(default, skip_serializing_if = "is_unlimited")]
    pub limits: EngineLimits,
}

fn is_unlimited(limits: &EngineLimits) -> bool {
    *limits == EngineLimits::default()
}

impl ResolvedEngine {
    /// The configuration of an engine with this access.
    pub fn config(&self, access: Access) -> EngineConfig {
        EngineConfig {
            cache: self.cache,
            entry_timeout_ms: self.entry_timeout.millis(),
            attr_timeout_ms: self.attr_timeout.millis(),
            negative_timeout_ms: self.negative_timeout.millis(),
            inode_file_handles: self.inode_file_handles,
            writeback: self.writeback.is_enabled(),
            xattr: self.xattr.is_enabled(),
            xattr_map: self.xattr_map.clone(),
            posix_acl: self.posix_acl.is_enabled(),
            security_label: self.security_label.is_enabled(),
            killpriv: self.killpriv.is_enabled(),
            announce_submounts: self.announce_submounts.is_enabled(),
            readdirplus: self.readdirplus.is_enabled(),
            allow_mmap: self.allow_mmap.is_enabled(),
            direct_io: self.direct_io.is_enabled(),
            device_nodes: self.device_nodes.is_enabled(),
            file_capabilities: self.file_capabilities.is_enabled(),
            open_files: self.open_files,
            max_inodes: self.max_inodes,
            queues: self.queues,
            sandbox: self.sandbox,
            uid_translation: self.uid_translation.iter().map(Into::into).collect(),
            gid_translation: self.gid_translation.iter().map(Into::into).collect(),
            limits: (&self.limits).into(),
            ..EngineConfig::stock(access)
        }
    }
}

impl From<&EngineConfig> for ResolvedEngine {
    /// The configuration in the words of the API.
    fn from(config: &EngineConfig) -> Self {
        ResolvedEngine {
            cache: config.cache,
            entry_timeout: Interval::from_millis(config.entry_timeout_ms),
            attr_timeout: Interval::from_millis(config.attr_timeout_ms),
            negative_timeout: Interval::from_millis(config.negative_timeout_ms),
            inode_file_handles: config.inode_file_handles,
            writeback: config.writeback.into(),
            xattr: config.xattr.into(),
            xattr_map: config.xattr_map.clone(),
            posix_acl: config.posix_acl.into(),
            security_label: config.security_label.into(),
            killpriv: config.killpriv.into(),
            announce_submounts: config.announce_submounts.into(),
            readdirplus: config.readdirplus.into(),
            allow_mmap: config.allow_mmap.into(),
            direct_io: config.direct_io.into(),
            device_nodes: config.device_nodes.into(),
            file_capabilities: config.file_capabilities.into(),
            open_files: config.open_files,
            max_inodes: config.max_inodes,
            queues: config.queues,
            sandbox: config.sandbox,
            uid_translation: config.uid_translation.iter().map(Into::into).collect(),
            gid_translation: config.gid_translation.iter().map(Into::into).collect(),
            limits: (&config.limits).into(),
        }
    }
}
