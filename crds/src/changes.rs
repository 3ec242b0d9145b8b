//! Which fields differ between two configurations, and which of those a running session has to wait for.

use virtiofs_config::EngineConfig;

/// One field that differs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FieldChange {
    /// Name of the field as the API writes it, such as `writeback`.
    pub field: &'static str,
    /// Does it wait for the guest's next mount? It was agreed in FUSE_INIT then, or the guest has remembered it. All else
    /// is in force at a hand-over, although a guest goes on trusting what it was told before for as long as it was told to.
    pub at_next_mount: bool,
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
    let soon = |field, differs: bool| differs.then_some(FieldChange { field, at_next_mount: false });
    let late = |field, differs: bool| differs.then_some(FieldChange { field, at_next_mount: true });
    // A guest that was answered ENOSYS never asks for extended attributes again; one that has them is answered ENOSYS by
    // the next engine and stops asking.
    let xattr_change = if old.xattr { soon("xattr", !*xattr) } else { late("xattr", *xattr) };
    [
        soon("access", old.access != *access),
        soon("cache", old.cache != *cache),
        soon("entryTimeout", old.entry_timeout_ms != *entry_timeout_ms),
        soon("attrTimeout", old.attr_timeout_ms != *attr_timeout_ms),
        soon("negativeTimeout", old.negative_timeout_ms != *negative_timeout_ms),
        soon("inodeFileHandles", old.inode_file_handles != *inode_file_handles),
        late("writeback", old.writeback != *writeback),
        xattr_change,
        soon("xattrMap", old.xattr_map != *xattr_map),
        late("posixAcl", old.posix_acl != *posix_acl),
        late("securityLabel", old.security_label != *security_label),
        late("killpriv", old.killpriv != *killpriv),
        late("announceSubmounts", old.announce_submounts != *announce_submounts),
        late("readdirplus", old.readdirplus != *readdirplus),
        late("allowMmap", old.allow_mmap != *allow_mmap),
        soon("directIo", old.direct_io != *direct_io),
        soon("deviceNodes", old.device_nodes != *device_nodes),
        soon("fileCapabilities", old.file_capabilities != *file_capabilities),
        soon("openFiles", old.open_files != *open_files),
        soon("maxInodes", old.max_inodes != *max_inodes),
        late("queues", old.queues != *queues),
        soon("sandbox", old.sandbox != *sandbox),
        soon("uidTranslation", old.uid_translation != *uid_translation),
        soon("gidTranslation", old.gid_translation != *gid_translation),
        soon("limits", old.limits != *limits),
    ]
    .into_iter()
    .flatten()
    .collect()
}

#[cfg(test)]
mod tests {
    use virtiofs_config::{Access, CachePolicy, IdTranslation, IdTranslationKind, InodeFileHandles, Limits, Sandbox};

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
        let found: Vec<&str> = changes(&stock(), &other()).into_iter().map(|change| change.field).collect();
        let serde_json::Value::Object(config) = serde_json::to_value(other()).unwrap() else { unreachable!() };
        let names: Vec<&str> = config.keys().map(|name| name.trim_end_matches("Ms")).collect();
        assert_eq!(found.len(), names.len());
        assert!(names.iter().all(|name| found.contains(name)), "{names:?}");
    }

    #[test]
    fn what_was_agreed_at_the_mount_waits_for_the_next_one() {
        let waiting = |old: &EngineConfig, new: &EngineConfig| {
            let all = changes(old, new).into_iter().filter(|change| change.at_next_mount);
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
}
