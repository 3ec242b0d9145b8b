//! The configuration of an engine: the values that a share resolves to. No I/O and no IPC, so that the operator can use
//! it without linking either.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Longest entry and attribute timeout, in milliseconds: a day, as stock virtiofsd's `cache=always` gives.
pub const LONG_TIMEOUT_MS: u64 = 86_400_000;

/// Default limit of the inodes that one guest may hold.
pub const DEFAULT_MAX_INODES: u64 = 4_000_000;

/// Number of request queues that an engine serves.
pub const REQUEST_QUEUES: usize = 1;

/// Access of the guest to the share.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
pub enum Access {
    /// Every change is refused with `EROFS`.
    ReadOnly,
    /// The guest may change the share.
    ReadWrite,
}

/// What the guest may keep in its page cache; the library's `--cache`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
pub enum CachePolicy {
    /// Nothing is cached: every read is sent to the engine.
    Never,
    /// Names and attributes are cached, contents are not.
    Metadata,
    /// Contents are cached between close and open while size and modification time stay the same.
    Auto,
    /// Contents stay cached across opens.
    Always,
}

/// How the engine refers to an inode that the guest holds but has not opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
pub enum InodeFileHandles {
    /// By an `O_PATH` file descriptor each.
    Never,
    /// By file handle where the file system and the capabilities allow it, else by `O_PATH` descriptor.
    Prefer,
    /// By file handle; an inode without one is an error.
    Mandatory,
}

/// How the engine is confined.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
pub enum Sandbox {
    /// The strictest that this place allows: `Namespace`, else `Chroot`.
    Auto,
    /// Mount, network, IPC and UTS namespaces of its own and the share as root directory.
    Namespace,
    /// `chroot` into the share.
    Chroot,
    /// None. Refused for uid 0.
    None,
}

/// How a range of user or group ids is translated between guest and host.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
pub enum IdTranslationKind {
    /// Guest ids to host ids, one to one.
    Guest,
    /// Host ids to guest ids, one to one.
    Host,
    /// All guest ids of the range to one host id.
    SquashGuest,
    /// All host ids of the range to one guest id.
    SquashHost,
    /// Guest ids of the range are refused.
    ForbidGuest,
    /// Both directions, one to one.
    Map,
}

/// One rule of id translation, as virtiofsd's `--translate-uid` knows them.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct IdTranslation {
    /// What is translated, and in which direction.
    pub kind: IdTranslationKind,
    /// First id of the range that is translated; for `Map` the first guest id.
    pub from: u32,
    /// Id that `from` becomes; for `Map` the first host id. Not used by `ForbidGuest`.
    #[serde(default)]
    pub to: u32,
    /// Number of ids in the range.
    pub count: u32,
}

/// What one engine may use of the host. None: no limit of its own.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Limits {
    /// Private memory, in bytes (RLIMIT_DATA). The guest's own memory, which the engine maps, is not part of it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory_bytes: Option<u64>,
    /// CPU time, in thousandths of one CPU.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cpu_millis: Option<u64>,
    /// Share of the CPU against others that want it at the same time, 1 to 10000; 100 is what others have.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cpu_weight: Option<u64>,
    /// Share of the source's block device likewise.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub io_weight: Option<u64>,
    /// Bytes a second read from the source's block device.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub read_bytes_per_second: Option<u64>,
    /// Bytes a second written to it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub write_bytes_per_second: Option<u64>,
    /// Reads a second of it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reads_per_second: Option<u64>,
    /// Writes a second to it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub writes_per_second: Option<u64>,
}

/// The complete configuration of one engine. The engine has no defaults of its own, so engines with equal
/// configurations behave alike.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct EngineConfig {
    /// Access of the guest to the share.
    pub access: Access,
    /// What the guest may keep in its page cache.
    pub cache: CachePolicy,
    /// Time in milliseconds for which the guest may cache a name.
    pub entry_timeout_ms: u64,
    /// Time in milliseconds for which the guest may cache attributes.
    pub attr_timeout_ms: u64,
    /// Time in milliseconds for which the guest may cache that a name does not exist; 0: it is not cached.
    pub negative_timeout_ms: u64,
    /// How inodes are referred to.
    pub inode_file_handles: InodeFileHandles,
    /// True if the guest may cache writes (FUSE_WRITEBACK_CACHE). Only for content that one guest writes.
    pub writeback: bool,
    /// True if extended attributes are passed through.
    pub xattr: bool,
    /// Rules that translate names of extended attributes, in virtiofsd's `--xattrmap` language.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub xattr_map: Option<String>,
    /// True if POSIX ACLs are offered to the guest. Requires `xattr`, excludes id translation.
    pub posix_acl: bool,
    /// True if a security label that the guest sends is set on creation. Requires `xattr`.
    pub security_label: bool,
    /// True if the engine clears suid and sgid bits on write (FUSE_HANDLE_KILLPRIV_V2).
    pub killpriv: bool,
    /// True if mount points in the share are announced to the guest (FUSE_SUBMOUNTS).
    pub announce_submounts: bool,
    /// True if names and attributes of a directory are sent together (FUSE_READDIRPLUS).
    pub readdirplus: bool,
    /// True if files may be mapped shared although contents are not cached.
    pub allow_mmap: bool,
    /// True if `O_DIRECT` is passed on to the host.
    pub direct_io: bool,
    /// True if `O_NOATIME` is passed on to the host, which answers `EPERM` where the engine does not own the file. No share
    /// sets it; `virtiofsd-live` does on request.
    #[serde(default, skip_serializing_if = "is_false")]
    #[schemars(skip)]
    pub preserve_noatime: bool,
    /// True if the guest may create device nodes. The engine then has `CAP_MKNOD`.
    pub device_nodes: bool,
    /// True if the guest may set file capabilities. The engine then has `CAP_SETFCAP`.
    pub file_capabilities: bool,
    /// Limit of open files of the engine; none: its hard limit.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub open_files: Option<u64>,
    /// Limit of inodes that the guest may hold; beyond it a lookup fails with `ENFILE`.
    pub max_inodes: u64,
    /// Number of request queues offered.
    pub queues: u16,
    /// How the engine is confined.
    pub sandbox: Sandbox,
    /// True if the engine detects staleness. Benchmarks set it to false to measure its cost; no share does.
    #[serde(default = "default_true", skip_serializing_if = "Clone::clone")]
    #[schemars(skip)]
    pub detect_staleness: bool,
    /// Translation of user ids, first match wins.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub uid_translation: Vec<IdTranslation>,
    /// Translation of group ids, first match wins.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub gid_translation: Vec<IdTranslation>,
    /// Limits of the host resources that the engine may use.
    #[serde(default)]
    pub limits: Limits,
}

impl EngineConfig {
    /// The defaults of stock virtiofsd with this access.
    pub fn stock(access: Access) -> Self {
        EngineConfig {
            access,
            cache: CachePolicy::Auto,
            entry_timeout_ms: 1000,
            attr_timeout_ms: 1000,
            negative_timeout_ms: 0,
            inode_file_handles: InodeFileHandles::Prefer,
            writeback: false,
            xattr: false,
            xattr_map: None,
            posix_acl: false,
            security_label: false,
            killpriv: false,
            announce_submounts: true,
            readdirplus: true,
            allow_mmap: false,
            direct_io: false,
            preserve_noatime: false,
            device_nodes: false,
            file_capabilities: false,
            open_files: None,
            max_inodes: DEFAULT_MAX_INODES,
            queues: 1,
            sandbox: Sandbox::Auto,
            detect_staleness: true,
            uid_translation: Vec::new(),
            gid_translation: Vec::new(),
            limits: Limits::default(),
        }
    }

    /// True if the guest may change the share.
    pub fn writable(&self) -> bool {
        self.access == Access::ReadWrite
    }
}

#[allow(clippy::trivially_copy_pass_by_ref)] // The signature that serde calls.
fn is_false(value: &bool) -> bool {
    !value
}

fn default_true() -> bool {
    true
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn config_survives_json() {
        let mut config = EngineConfig::stock(Access::ReadWrite);
        config.uid_translation.push(IdTranslation {
            kind: IdTranslationKind::SquashGuest,
            from: 0,
            to: 107,
            count: 65536,
        });
        let text = serde_json::to_string(&config).unwrap();
        assert_eq!(serde_json::from_str::<EngineConfig>(&text).unwrap(), config);
    }

    #[test]
    fn unknown_field_is_rejected() {
        let mut value = serde_json::to_value(EngineConfig::stock(Access::ReadOnly)).unwrap();
        value["inodeFileHandels"] = "Never".into();
        let error = serde_json::from_value::<EngineConfig>(value).unwrap_err();
        assert!(error.to_string().contains("inodeFileHandels"), "{error}");
    }
}
