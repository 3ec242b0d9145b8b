//! From what is true of the content to one concrete engine configuration.

use virtiofs_contract::config::{CachePolicy, EngineConfig, LONG_TIMEOUT_MS};

use crate::Interval;
use crate::v1alpha1::{Content, EngineOverrides, VirtiofsShareSpec};

/// How long a guest trusts what it was told about content that anyone may change, in milliseconds.
const SHARED_TIMEOUT_MS: u64 = 1000;

/// The configuration that engines of this share run with.
///
/// `content` states a fact; caching is exactly as bold as that fact allows. `engine` overrides win, and what
/// follows from an overridden cache policy follows from the override.
///
/// # Guarantees
/// Pure: equal specs give equal configurations, on every node and in every release that reads them alike.
pub fn resolve(spec: &VirtiofsShareSpec) -> EngineConfig {
    let engine = &spec.engine;
    let cache = engine.cache.unwrap_or(natural_cache(spec.content));
    let timeout = natural_timeout(spec.content, cache);
    let negative = if spec.content == Content::Shared { 0 } else { timeout };
    let stock = EngineConfig::stock(spec.access);
    let caching = EngineConfig {
        cache,
        entry_timeout_ms: millis(&engine.entry_timeout).unwrap_or(timeout),
        attr_timeout_ms: millis(&engine.attr_timeout).unwrap_or(timeout),
        negative_timeout_ms: millis(&engine.negative_timeout).unwrap_or(negative),
        // Attributes sent along with names are thrown away by a guest that caches nothing: stock
        // virtiofsd switches this off too.
        readdirplus: engine.readdirplus.unwrap_or(cache != CachePolicy::Never),
        ..stock
    };
    overridden(caching, engine)
}

/// The boldest policy that is true.
///
/// `Exclusive` is as good as `Immutable` here: all changes go through the one guest's own page cache, so
/// what it holds never differs from the host. `Auto` would only throw pages away at each open.
fn natural_cache(content: Content) -> CachePolicy {
    match content {
        Content::Immutable | Content::Exclusive => CachePolicy::Always,
        Content::Shared => CachePolicy::Auto,
    }
}

/// How long names and attributes stay true, in milliseconds.
fn natural_timeout(content: Content, cache: CachePolicy) -> u64 {
    match (cache, content) {
        (CachePolicy::Never, _) => 0,
        (_, Content::Immutable | Content::Exclusive) => LONG_TIMEOUT_MS,
        (_, Content::Shared) => SHARED_TIMEOUT_MS,
    }
}

fn millis(interval: &Option<Interval>) -> Option<u64> {
    interval.as_ref().map(Interval::millis)
}

/// `base` with every override that has nothing to do with caching.
fn overridden(base: EngineConfig, engine: &EngineOverrides) -> EngineConfig {
    EngineConfig {
        inode_file_handles: engine.inode_file_handles.unwrap_or(base.inode_file_handles),
        writeback: engine.writeback.unwrap_or(base.writeback),
        xattr: engine.xattr.unwrap_or(base.xattr),
        xattr_map: engine.xattr_map.clone().or(base.xattr_map),
        posix_acl: engine.posix_acl.unwrap_or(base.posix_acl),
        security_label: engine.security_label.unwrap_or(base.security_label),
        killpriv: engine.killpriv.unwrap_or(base.killpriv),
        announce_submounts: engine.announce_submounts.unwrap_or(base.announce_submounts),
        allow_mmap: engine.allow_mmap.unwrap_or(base.allow_mmap),
        direct_io: engine.direct_io.unwrap_or(base.direct_io),
        device_nodes: engine.device_nodes.unwrap_or(base.device_nodes),
        file_capabilities: engine.file_capabilities.unwrap_or(base.file_capabilities),
        open_files: engine.open_files.or(base.open_files),
        max_inodes: engine.max_inodes.unwrap_or(base.max_inodes),
        queues: engine.queues.unwrap_or(base.queues),
        sandbox: engine.sandbox.unwrap_or(base.sandbox),
        uid_translation: engine.uid_translation.iter().map(Into::into).collect(),
        gid_translation: engine.gid_translation.iter().map(Into::into).collect(),
        ..base
    }
}
