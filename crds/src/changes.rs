//! Which fields differ between two configurations, and when each difference takes effect.

use virtiofs_config::EngineConfig;

/// One field that differs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FieldChange {
    /// Name of the field as the API writes it, such as `writeback`.
    pub field: &'static str,
    /// True if it takes effect at the guest's next mount, because FUSE_INIT negotiated it or the guest remembers it. All
    /// other fields take effect at a hand-over; what the guest has cached before stays valid for its timeout.
    pub at_next_mount: bool,
}

/// The fields in which `new` differs from `old`, in the order of [`EngineConfig`].
pub fn changes(old: &EngineConfig, new: &EngineConfig) -> Vec<FieldChange> {
    // Destructured, so that a field that is added to the configuration cannot be forgotten here.
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
        // Not fields of a share: always off, and always on.
        preserve_noatime: _,
        detect_staleness: _,
        uid_translation,
        gid_translation,
        limits,
    } = new;
    let now = |field, differs: bool| differs.then_some(FieldChange { field, at_next_mount: false });
    let at_mount = |field, differs: bool| differs.then_some(FieldChange { field, at_next_mount: true });
    // A guest that was answered ENOSYS never requests extended attributes again. One that uses them is answered ENOSYS by
    // the next engine and stops.
    let xattr_change = if old.xattr { now("xattr", !*xattr) } else { at_mount("xattr", *xattr) };
    [
        now("access", old.access != *access),
        now("cache", old.cache != *cache),
        now("entryTimeout", old.entry_timeout_ms != *entry_timeout_ms),
        now("attrTimeout", old.attr_timeout_ms != *attr_timeout_ms),
        now("negativeTimeout", old.negative_timeout_ms != *negative_timeout_ms),
        now("inodeFileHandles", old.inode_file_handles != *inode_file_handles),
        at_mount("writeback", old.writeback != *writeback),
        xattr_change,
        now("xattrMap", old.xattr_map != *xattr_map),
        at_mount("posixACL", old.posix_acl != *posix_acl),
        at_mount("securityLabel", old.security_label != *security_label),
        at_mount("killpriv", old.killpriv != *killpriv),
        at_mount("announceSubmounts", old.announce_submounts != *announce_submounts),
        at_mount("readdirplus", old.readdirplus != *readdirplus),
        at_mount("allowMmap", old.allow_mmap != *allow_mmap),
        now("directIO", old.direct_io != *direct_io),
        now("deviceNodes", old.device_nodes != *device_nodes),
        now("fileCapabilities", old.file_capabilities != *file_capabilities),
        now("openFiles", old.open_files != *open_files),
        now("maxInodes", old.max_inodes != *max_inodes),
        at_mount("queues", old.queues != *queues),
        now("sandbox", old.sandbox != *sandbox),
        now("uidTranslation", old.uid_translation != *uid_translation),
        now("gidTranslation", old.gid_translation != *gid_translation),
        now("limits", old.limits != *limits),
    ]
    .into_iter()
    .flatten()
    .collect()
}

#[cfg(test)]
mod tests {
    use virtiofs_config::{Access, CachePolicy, IdTranslation, IdTranslationKind, InodeFileHandles, Limits, Sandbox};

    use super::*;
    use crate::v1alpha1::EngineStatus;

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
            preserve_noatime: false,
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
    fn equal_configurations_have_no_changes() {
        assert_eq!(changes(&other(), &other()), []);
    }

    #[test]
    fn every_field_is_compared_under_its_api_name() {
        let found: Vec<&str> = changes(&stock(), &other()).into_iter().map(|change| change.field).collect();
        let shown = serde_json::to_value(EngineStatus::from(&other())).unwrap();
        let names: Vec<&str> = shown.as_object().unwrap().keys().map(String::as_str).chain(["access"]).collect();
        assert_eq!(found.len(), names.len());
        assert!(names.iter().all(|name| found.contains(name)), "{names:?}");
    }

    #[test]
    fn fields_negotiated_at_mount_wait_for_the_next_mount() {
        let waiting = |old: &EngineConfig, new: &EngineConfig| {
            let all = changes(old, new).into_iter().filter(|change| change.at_next_mount);
            all.map(|change| change.field).collect::<Vec<_>>()
        };
        let agreed = [
            "writeback",
            "xattr",
            "posixACL",
            "securityLabel",
            "killpriv",
            "announceSubmounts",
            "readdirplus",
            "allowMmap",
            "queues",
        ];
        assert_eq!(waiting(&stock(), &other()), agreed);
        // Disabling extended attributes takes effect at once.
        assert!(!waiting(&other(), &stock()).contains(&"xattr"));
    }
}
