//! What an engine is to do: the concrete configuration that a share resolves to.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Longest entry and attribute timeout, in milliseconds: a day, as stock virtiofsd's `cache=always` gives.
pub const LONG_TIMEOUT_MS: u64 = 86_400_000;

/// How many nodes one guest may hold unless its share says otherwise.
pub const DEFAULT_MAX_INODES: u64 = 4_000_000;

/// May the guest change the share?
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

/// The complete configuration of one engine. Nothing is left to a default of the engine's own, so two
/// equal values mean two engines that behave alike.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct EngineConfig {
    /// May the guest change the share?
    pub access: Access,
    /// What the guest may keep in its page cache.
    pub cache: CachePolicy,
    /// How long, in milliseconds, the guest may trust a name it has looked up.
    pub entry_timeout_ms: u64,
    /// How long, in milliseconds, the guest may trust attributes.
    pub attr_timeout_ms: u64,
    /// How long, in milliseconds, the guest may trust that a name does not exist; 0: it asks each time.
    pub negative_timeout_ms: u64,
    /// How inodes are referred to.
    pub inode_file_handles: InodeFileHandles,
    /// May the guest collect writes before it sends them? Only for content that one guest writes.
    pub writeback: bool,
    /// Are extended attributes passed through?
    pub xattr: bool,
    /// Rules that translate names of extended attributes, in virtiofsd's `--xattrmap` language.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub xattr_map: Option<String>,
    /// Are POSIX ACLs offered to guests that know them? Needs `xattr`, excludes id translation.
    pub posix_acl: bool,
    /// Are security labels set on creation, for guests that send them? Needs `xattr`.
    pub security_label: bool,
    /// Does the engine clear suid and sgid bits on write (FUSE_HANDLE_KILLPRIV_V2)?
    pub killpriv: bool,
    /// Is the guest told which directories are mount points?
    pub announce_submounts: bool,
    /// Are names and attributes of a directory sent together (FUSE_READDIRPLUS)?
    pub readdirplus: bool,
    /// May files be mapped shared when contents are not cached?
    pub allow_mmap: bool,
    /// Is `O_DIRECT` passed on to the host?
    pub direct_io: bool,
    /// May the guest create device nodes? Gives the engine `CAP_MKNOD`.
    pub device_nodes: bool,
    /// May the guest set file capabilities? Gives the engine `CAP_SETFCAP`.
    pub file_capabilities: bool,
    /// Limit of open files of the engine; none: the hard limit it is started with.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub open_files: Option<u64>,
    /// How many nodes the guest may hold; beyond it a lookup is answered `ENFILE`.
    pub max_inodes: u64,
    /// Number of request queues offered.
    pub queues: u16,
    /// How the engine is confined.
    pub sandbox: Sandbox,
    /// Is what the guest was told compared with what is there? Off only to measure what that costs: no share says so.
    #[serde(default = "yes", skip_serializing_if = "Clone::clone")]
    #[schemars(skip)]
    pub detect_staleness: bool,
    /// Translation of user ids, first match wins.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub uid_translation: Vec<IdTranslation>,
    /// Translation of group ids, first match wins.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub gid_translation: Vec<IdTranslation>,
    /// What the engine may use of the host.
    #[serde(default)]
    pub limits: Limits,
}

impl EngineConfig {
    /// What stock virtiofsd does by default, plus `access`: the base that shares and tests start from.
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

    /// May the guest change the share?
    pub fn writable(&self) -> bool {
        self.access == Access::ReadWrite
    }
}

fn yes() -> bool {
    true
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_configuration_survives_json() {
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
    fn an_unknown_field_is_refused() {
        let mut value = serde_json::to_value(EngineConfig::stock(Access::ReadOnly)).unwrap();
        value["inodeFileHandels"] = "Never".into();
        let error = serde_json::from_value::<EngineConfig>(value).unwrap_err();
        assert!(error.to_string().contains("inodeFileHandels"), "{error}");
    }
}
