//! Overrides of what follows from `content`.

use kube::KubeSchema;
use serde::{Deserialize, Serialize};
use virtiofs_contract::config::{self, CachePolicy, IdTranslationKind, InodeFileHandles, Sandbox};

use crate::Interval;

/// Overrides of what follows from `content`. The values in force show in the status.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
pub struct EngineOverrides {
    /// What the guest may keep in its page cache.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cache: Option<CachePolicy>,
    /// How long the guest may trust a name it has looked up, such as `1s`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub entry_timeout: Option<Interval>,
    /// How long the guest may trust attributes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub attr_timeout: Option<Interval>,
    /// How long the guest may trust that a name does not exist; `0s`: it asks each time.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub negative_timeout: Option<Interval>,
    /// How inodes that the guest holds are referred to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
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
    #[schemars(range(min = 1024, max = 1_000_000_000_u64))]
    pub max_inodes: Option<u64>,
    /// Number of request queues offered.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 64))]
    pub queues: Option<u16>,
    /// How the engine is confined.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sandbox: Option<Sandbox>,
    /// Translation of user ids, first match wins.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 32))]
    pub uid_translation: Vec<IdTranslation>,
    /// Translation of group ids, first match wins.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 32))]
    pub gid_translation: Vec<IdTranslation>,
}

/// One rule of id translation.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
pub struct IdTranslation {
    /// What is translated, and in which direction.
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

impl From<&IdTranslation> for config::IdTranslation {
    fn from(rule: &IdTranslation) -> Self {
        config::IdTranslation { kind: rule.kind, from: rule.from, to: rule.to.unwrap_or(0), count: rule.count }
    }
}
