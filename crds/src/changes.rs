//! Which fields differ between two configurations, and when a difference takes effect.

use serde::Serialize;
use serde_json::Value;
use virtiofs_contract::config::EngineConfig;

use crate::Interval;

/// When a changed field takes effect in a session that is running.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
pub enum Effect {
    /// At the hand-over to an engine with the new configuration.
    AtHandover,
    /// At the hand-over, for what the guest asks from then on. What it was told before it goes on trusting
    /// for as long as it was told to.
    AsItExpires,
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
        // Of no share: it is always on.
        detect_staleness: _,
        uid_translation,
        gid_translation,
        limits,
    } = new;
    use Effect::{AsItExpires, AtHandover, AtNextMount};
    // A guest that was answered ENOSYS never asks for extended attributes again; one that has them is
    // answered ENOSYS by the next engine and stops asking.
    let xattr_effect = if old.xattr { AtHandover } else { AtNextMount };
    [
        changed("access", &old.access, access, AtHandover),
        changed("cache", &old.cache, cache, AtHandover),
        timeout("entryTimeout", old.entry_timeout_ms, *entry_timeout_ms),
        timeout("attrTimeout", old.attr_timeout_ms, *attr_timeout_ms),
        timeout("negativeTimeout", old.negative_timeout_ms, *negative_timeout_ms),
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
        // Owners that a guest has in its cache stay there.
        changed("uidTranslation", &old.uid_translation, uid_translation, AsItExpires),
        changed("gidTranslation", &old.gid_translation, gid_translation, AsItExpires),
        changed("limits", &old.limits, limits, AtHandover),
    ]
    .into_iter()
    .flatten()
    .collect()
}

fn timeout(field: &'static str, old: u64, new: u64) -> Option<FieldChange> {
    let effect = if new < old { Effect::AsItExpires } else { Effect::AtHandover };
    changed(field, &Interval::from_millis(old), &Interval::from_millis(new), effect)
}

fn changed<T: PartialEq + Serialize>(field: &'static str, old: &T, new: &T, effect: Effect) -> Option<FieldChange> {
    let json = |value: &T| serde_json::to_value(value).unwrap_or(Value::Null);
    (old != new).then(|| FieldChange { field, old: json(old), new: json(new), effect })
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use virtiofs_contract::config::{
        Access, CachePolicy, IdTranslation, IdTranslationKind, InodeFileHandles, Limits, Sandbox,
    };

    use super::*;

    fn stock() -> EngineConfig {
        EngineConfig::stock(Access::ReadWrite)
    }

    fn other() -> EngineConfig {
        let rule = IdTranslation { kind: IdTranslationKind::Map, from: 0, to: 1000, count: 10 };
        EngineConfig {
            access: Access::ReadOnly,
            cache: CachePolicy::Always,
            entry_timeout_ms: 2000,
            attr_timeout_ms: 500,
            negative_timeout_ms: 1,
            inode_file_handles: InodeFileHandles::Never,
            writeback: true,
            xattr: true,
            xattr_map: Some(":map::user.:".to_owned()),
            posix_acl: true,
            security_label: true,
            killpriv: true,
            announce_submounts: false,
            readdirplus: false,
            allow_mmap: true,
            direct_io: true,
            device_nodes: true,
            file_capabilities: true,
            open_files: Some(4096),
            max_inodes: 5000,
            queues: 2,
            sandbox: Sandbox::Chroot,
            detect_staleness: true,
            uid_translation: vec![rule.clone()],
            gid_translation: vec![rule],
            limits: Limits { cpu_millis: Some(500), ..Limits::default() },
        }
    }

    #[test]
    fn nothing_changed_is_no_change() {
        assert_eq!(changes(&other(), &other()), []);
    }

    #[test]
    fn every_field_is_compared_under_the_name_it_has_in_the_api() {
        let found: BTreeMap<&str, FieldChange> =
            changes(&stock(), &other()).into_iter().map(|change| (change.field, change)).collect();
        let serde_json::Value::Object(config) = serde_json::to_value(other()).unwrap() else { unreachable!() };
        let names: Vec<&str> = config.keys().map(|name| name.trim_end_matches("Ms")).collect();
        assert_eq!(found.len(), names.len());
        assert!(names.iter().all(|name| found.contains_key(name)), "{names:?}");
        assert_eq!(found["cache"].old, "Auto");
        assert_eq!(found["cache"].new, "Always");
        assert_eq!(found["entryTimeout"].new, "2s");
    }

    #[test]
    fn what_was_agreed_at_the_mount_waits_for_the_next_one() {
        let waiting = |old: &EngineConfig, new: &EngineConfig| {
            let all = changes(old, new).into_iter().filter(|change| change.effect == Effect::AtNextMount);
            all.map(|change| change.field).collect::<Vec<_>>()
        };
        let agreed = [
            "writeback",
            "xattr",
            "posixAcl",
            "securityLabel",
            "killpriv",
            "announceSubmounts",
            "readdirplus",
            "allowMmap",
            "queues",
        ];
        assert_eq!(waiting(&stock(), &other()), agreed);
        // Taken away, extended attributes are gone at once.
        assert!(!waiting(&other(), &stock()).contains(&"xattr"));
    }

    #[test]
    fn a_shorter_timeout_does_not_take_back_what_was_promised() {
        let effect = |field| {
            let found = changes(&stock(), &other());
            found.into_iter().find(|change| change.field == field).unwrap().effect
        };
        assert_eq!(effect("uidTranslation"), Effect::AsItExpires, "owners are remembered");
        assert_eq!(effect("entryTimeout"), Effect::AtHandover);
        assert_eq!(effect("attrTimeout"), Effect::AsItExpires);
    }
}
