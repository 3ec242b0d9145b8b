//! Which fields differ between two configurations, and when a difference takes effect.

use serde::Serialize;
use serde_json::Value;
use virtiofs_contract::config::EngineConfig;

/// When a changed field takes effect in a session that is running.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
pub enum Effect {
    /// At the hand-over to an engine with the new configuration.
    AtHandover,
    /// Only when the guest mounts again: it was agreed in FUSE_INIT, or the guest has remembered it.
    AtNextMount,
}

/// One field that differs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct FieldChange {
    /// Name of the field as the API writes it, such as `writeback`.
    pub field: &'static str,
    /// What it was.
    pub old: Value,
    /// What it becomes.
    pub new: Value,
    /// When that takes effect.
    pub effect: Effect,
}

/// The fields in which `new` differs from `old`, in the order of [`EngineConfig`].
pub fn changes(old: &EngineConfig, new: &EngineConfig) -> Vec<FieldChange> {
    // Taken apart, so that a field added to the configuration cannot be forgotten here.
    let EngineConfig {
        access,
        cache,
        entry_timeout_ms,
        attr_timeout_ms,
        negative_timeout_ms,
        inode_file_handles,
        writeback,
        xattr,
        xattr_map,
        posix_acl,
        security_label,
        killpriv,
        announce_submounts,
        readdirplus,
        allow_mmap,
        direct_io,
        device_nodes,
        file_capabilities,
        open_files,
        max_inodes,
        queues,
        sandbox,
        uid_translation,
        gid_translation,
    } = new;
    use Effect::{AtHandover, AtNextMount};
    // A guest that was answered ENOSYS never asks for extended attributes again; one that has them is
    // answered ENOSYS by the next engine and stops asking.
    let xattr_effect = if old.xattr { AtHandover } else { AtNextMount };
    [
        changed("access", &old.access, access, AtHandover),
        changed("cache", &old.cache, cache, AtHandover),
        changed("entryTimeout", &old.entry_timeout_ms, entry_timeout_ms, AtHandover),
        changed("attrTimeout", &old.attr_timeout_ms, attr_timeout_ms, AtHandover),
        changed("negativeTimeout", &old.negative_timeout_ms, negative_timeout_ms, AtHandover),
        changed("inodeFileHandles", &old.inode_file_handles, inode_file_handles, AtHandover),
        changed("writeback", &old.writeback, writeback, AtNextMount),
        changed("xattr", &old.xattr, xattr, xattr_effect),
        changed("xattrMap", &old.xattr_map, xattr_map, AtHandover),
        changed("posixAcl", &old.posix_acl, posix_acl, AtNextMount),
        changed("securityLabel", &old.security_label, security_label, AtNextMount),
        changed("killpriv", &old.killpriv, killpriv, AtNextMount),
        changed("announceSubmounts", &old.announce_submounts, announce_submounts, AtNextMount),
        changed("readdirplus", &old.readdirplus, readdirplus, AtNextMount),
        changed("allowMmap", &old.allow_mmap, allow_mmap, AtNextMount),
        changed("directIo", &old.direct_io, direct_io, AtHandover),
        changed("deviceNodes", &old.device_nodes, device_nodes, AtHandover),
        changed("fileCapabilities", &old.file_capabilities, file_capabilities, AtHandover),
        changed("openFiles", &old.open_files, open_files, AtHandover),
        changed("maxInodes", &old.max_inodes, max_inodes, AtHandover),
        changed("queues", &old.queues, queues, AtNextMount),
        changed("sandbox", &old.sandbox, sandbox, AtHandover),
        changed("uidTranslation", &old.uid_translation, uid_translation, AtNextMount),
        changed("gidTranslation", &old.gid_translation, gid_translation, AtNextMount),
    ]
    .into_iter()
    .flatten()
    .collect()
}

fn changed<T: PartialEq + Serialize>(field: &'static str, old: &T, new: &T, effect: Effect) -> Option<FieldChange> {
    let json = |value: &T| serde_json::to_value(value).unwrap_or(Value::Null);
    (old != new).then(|| FieldChange { field, old: json(old), new: json(new), effect })
}
