//! From the content of a share and its overrides to one concrete engine configuration.

use virtiofs_config::{CachePolicy, EngineConfig, LONG_TIMEOUT_MS};

use crate::Interval;
use crate::v1alpha1::{Content, EngineOptions, Switch, VirtiofsShareSpec};

/// How long a guest caches names and attributes of content that anyone may change, in milliseconds.
const SHARED_TIMEOUT_MS: u64 = 1000;

/// The configuration that engines of this share run with.
///
/// `content` states a fact; the guest caches as much as that fact allows. Overrides in `engine` win, and what follows
/// from the cache policy follows from an overridden one.
///
/// # Guarantees
/// Pure: equal specs give equal configurations, on every node and in every release that reads them alike.
pub fn resolve(spec: &VirtiofsShareSpec) -> EngineConfig {
    let engine = &spec.engine;
    let cache = engine.cache.unwrap_or(default_cache(spec.content));
    let timeout = default_timeout(spec.content, cache);
    let negative = if spec.content == Content::Shared { 0 } else { timeout };
    let stock = EngineConfig::stock(spec.access);
    let caching = EngineConfig {
        cache,
        entry_timeout_ms: millis(&engine.entry_timeout).unwrap_or(timeout),
        attr_timeout_ms: millis(&engine.attr_timeout).unwrap_or(timeout),
        negative_timeout_ms: millis(&engine.negative_timeout).unwrap_or(negative),
        // A guest that caches nothing discards attributes that are sent with names; stock virtiofsd disables this too.
        readdirplus: engine.readdirplus.map_or(cache != CachePolicy::Never, Switch::is_enabled),
        ..stock
    };
    overridden(caching, engine)
}

/// The policy that caches most and is still correct.
///
/// `Exclusive` equals `Immutable` here: all changes go through the page cache of the one guest, which therefore never
/// differs from the host. `Auto` would only discard pages at each open.
fn default_cache(content: Content) -> CachePolicy {
    match content {
        Content::Immutable | Content::Exclusive => CachePolicy::Always,
        Content::Shared => CachePolicy::Auto,
    }
}

/// How long names and attributes stay correct, in milliseconds.
fn default_timeout(content: Content, cache: CachePolicy) -> u64 {
    match (cache, content) {
        (CachePolicy::Never, _) => 0,
        (_, Content::Immutable | Content::Exclusive) => LONG_TIMEOUT_MS,
        (_, Content::Shared) => SHARED_TIMEOUT_MS,
    }
}

fn millis(interval: &Option<Interval>) -> Option<u64> {
    interval.as_ref().map(Interval::millis)
}

/// `base` with every override that does not concern caching.
fn overridden(base: EngineConfig, engine: &EngineOptions) -> EngineConfig {
    EngineConfig {
        inode_file_handles: engine.inode_file_handles.unwrap_or(base.inode_file_handles),
        writeback: engine.writeback.map_or(base.writeback, Switch::is_enabled),
        xattr: engine.xattr.map_or(base.xattr, Switch::is_enabled),
        xattr_map: engine.xattr_map.clone().or(base.xattr_map),
        posix_acl: engine.posix_acl.map_or(base.posix_acl, Switch::is_enabled),
        security_label: engine.security_label.map_or(base.security_label, Switch::is_enabled),
        killpriv: engine.killpriv.map_or(base.killpriv, Switch::is_enabled),
        announce_submounts: engine.announce_submounts.map_or(base.announce_submounts, Switch::is_enabled),
        allow_mmap: engine.allow_mmap.map_or(base.allow_mmap, Switch::is_enabled),
        direct_io: engine.direct_io.map_or(base.direct_io, Switch::is_enabled),
        device_nodes: engine.device_nodes.map_or(base.device_nodes, Switch::is_enabled),
        file_capabilities: engine.file_capabilities.map_or(base.file_capabilities, Switch::is_enabled),
        open_files: engine.open_files.or(base.open_files),
        max_inodes: engine.max_inodes.unwrap_or(base.max_inodes),
        queues: engine.queues.unwrap_or(base.queues),
        sandbox: engine.sandbox.unwrap_or(base.sandbox),
        uid_translation: engine.uid_translation.iter().map(Into::into).collect(),
        gid_translation: engine.gid_translation.iter().map(Into::into).collect(),
        limits: engine.limits.as_ref().map(Into::into).unwrap_or_default(),
        ..base
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};
    use virtiofs_config::{Access, IdTranslation, IdTranslationKind, InodeFileHandles, Limits, Sandbox};

    use super::*;
    use crate::v1alpha1::{EngineStatus, ResolvedEngine};

    const DAY: u64 = 86_400_000;

    fn spec(fields: Value) -> VirtiofsShareSpec {
        let mut spec = json!({"source": {"hostPath": {"path": "/srv"}}});
        spec.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
        serde_json::from_value(spec).unwrap()
    }

    #[test]
    fn the_guest_caches_what_the_content_allows() {
        use CachePolicy::{Always, Auto, Metadata, Never};
        // content, overrides -> cache, entry, attr and negative timeouts, readdirplus
        for (content, engine, cache, entry, attr, negative, readdirplus) in [
            ("Immutable", json!({}), Always, DAY, DAY, DAY, true),
            ("Exclusive", json!({}), Always, DAY, DAY, DAY, true),
            ("Shared", json!({}), Auto, 1000, 1000, 0, true),
            // Timeouts follow from an overridden policy.
            ("Immutable", json!({"cache": "Auto"}), Auto, DAY, DAY, DAY, true),
            ("Immutable", json!({"cache": "Never"}), Never, 0, 0, 0, false),
            ("Exclusive", json!({"cache": "Metadata"}), Metadata, DAY, DAY, DAY, true),
            ("Shared", json!({"cache": "Metadata"}), Metadata, 1000, 1000, 0, true),
            ("Shared", json!({"cache": "Never"}), Never, 0, 0, 0, false),
            // Overridden timeouts win over all of it.
            ("Immutable", json!({"entryTimeout": "5s"}), Always, 5000, DAY, DAY, true),
            ("Immutable", json!({"negativeTimeout": "0s"}), Always, DAY, DAY, 0, true),
            ("Exclusive", json!({"cache": "Auto", "attrTimeout": "1m"}), Auto, DAY, 60_000, DAY, true),
            ("Shared", json!({"entryTimeout": "0s", "attrTimeout": "10s"}), Auto, 0, 10_000, 0, true),
            ("Shared", json!({"readdirplus": "Disabled"}), Auto, 1000, 1000, 0, false),
        ] {
            let config = resolve(&spec(json!({"content": content, "engine": engine})));
            let found = (
                config.cache,
                config.entry_timeout_ms,
                config.attr_timeout_ms,
                config.negative_timeout_ms,
                config.readdirplus,
            );
            assert_eq!(found, (cache, entry, attr, negative, readdirplus), "{content} {engine}");
        }
    }

    #[test]
    fn all_else_equals_stock_virtiofsd() {
        for (word, access) in [("ReadOnly", Access::ReadOnly), ("ReadWrite", Access::ReadWrite)] {
            assert_eq!(resolve(&spec(json!({"access": word}))), EngineConfig::stock(access));
        }
        assert_eq!(EngineConfig::stock(Access::ReadOnly).inode_file_handles, InodeFileHandles::Prefer);
    }

    #[test]
    fn every_override_wins() {
        let engine = json!({
            "cache": "Metadata", "entryTimeout": "1s", "attrTimeout": "2s", "negativeTimeout": "3s",
            "inodeFileHandles": "Mandatory", "writeback": "Enabled", "xattr": "Enabled", "xattrMap": ":map::user.:",
            "posixACL": "Enabled", "securityLabel": "Enabled", "killpriv": "Enabled", "announceSubmounts": "Disabled",
            "readdirplus": "Disabled", "allowMmap": "Enabled", "directIO": "Enabled", "deviceNodes": "Enabled",
            "fileCapabilities": "Enabled", "openFiles": 4096, "maxInodes": 5000, "queues": 2, "sandbox": "Chroot",
            "uidTranslation": [{"type": "Map", "from": 0, "to": 1000, "count": 10}],
            "gidTranslation": [{"type": "ForbidGuest", "from": 0, "count": 1}],
            "limits": {
                "memory": "1Gi", "cpu": "1500m", "cpuWeight": 50, "ioWeight": 200, "readBandwidth": "1Mi",
                "writeBandwidth": "2Mi", "readIOPS": "100", "writeIOPS": "2k",
            },
        });
        let config = resolve(&spec(json!({"access": "ReadWrite", "content": "Exclusive", "engine": engine})));
        let expected = EngineConfig {
            access: Access::ReadWrite,
            cache: CachePolicy::Metadata,
            entry_timeout_ms: 1000,
            attr_timeout_ms: 2000,
            negative_timeout_ms: 3000,
            inode_file_handles: InodeFileHandles::Mandatory,
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
            uid_translation: vec![IdTranslation { kind: IdTranslationKind::Map, from: 0, to: 1000, count: 10 }],
            gid_translation: vec![IdTranslation { kind: IdTranslationKind::ForbidGuest, from: 0, to: 0, count: 1 }],
            limits: Limits {
                memory_bytes: Some(1 << 30),
                cpu_millis: Some(1500),
                cpu_weight: Some(50),
                io_weight: Some(200),
                read_bytes_per_second: Some(1 << 20),
                write_bytes_per_second: Some(2 << 20),
                reads_per_second: Some(100),
                writes_per_second: Some(2000),
            },
        };
        assert_eq!(config, expected);
        // And back: the active configuration is shown in the words of the spec.
        assert_eq!(serde_json::to_value(ResolvedEngine::from(&config)).unwrap(), engine);
        assert_eq!(serde_json::to_value(EngineStatus::from(&config)).unwrap(), engine);
    }
}
