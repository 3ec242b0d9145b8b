//! Configurations under which the two are compared.

use std::time::Duration;

use virtiofsd::passthrough::xattrmap::XattrMap;
use virtiofsd::passthrough::{CachePolicy, Config, InodeFileHandlesMode, NegotiationMode};
use virtiofsd::soft_idmap::cmdline::IdMap;

/// Name, and what makes it different from the library's defaults.
pub(super) type Setting = (&'static str, fn(&mut Config));

pub(super) const SETTINGS: &[Setting] = &[
    ("defaults", |_| {}),
    ("long timeouts", |config| config.attr_timeout = Duration::from_millis(86_400_123)),
    ("xattr", |config| config.xattr = true),
    ("file handles", |config| {
        config.xattr = true;
        config.inode_file_handles = InodeFileHandlesMode::Prefer;
    }),
    ("killpriv", |config| {
        config.xattr = true;
        config.killpriv_v2 = true;
    }),
    ("ACLs", |config| {
        config.xattr = true;
        config.posix_acl = NegotiationMode::Auto;
    }),
    ("one xattr prefix for all", |config| map_xattrs(config, ":map::user.guest.:")),
    ("file capabilities renamed", |config| {
        map_xattrs(config, ":prefix:all:security.:user.guest.:\n:bad:all:user.guest.:security.:\n:ok:all:::");
        config.killpriv_v2 = true;
    }),
    ("some xattrs refused", |config| {
        map_xattrs(config, ":bad:all:user.secret:user.secret: :unsupported:all:trusted.:trusted.: :ok:all:::");
    }),
    ("ids translated", |config| {
        config.uid_map = Some(vec![
            IdMap::Bidirectional { guest: 0, host: 100_000, count: 1000 },
            IdMap::SquashGuest { from_guest: 1000, to_host: 107, count: 1000 },
            IdMap::ForbidGuest { from_guest: 3000, count: 10 },
            IdMap::SquashHost { from_host: 0, to_guest: 65534, count: 1000 },
        ]);
        config.gid_map = Some(vec![
            IdMap::Guest { from_guest: 0, to_host: 200_000, count: 2000 },
            IdMap::Host { from_host: 200_000, to_guest: 5, count: 2000 },
            IdMap::ForbidGuest { from_guest: 3000, count: 10 },
        ]);
    }),
    ("collected writes", |config| config.writeback = true),
    ("direct I/O, all cached", |config| {
        config.allow_direct_io = true;
        config.cache_policy = CachePolicy::Always;
    }),
    ("nothing cached", |config| config.cache_policy = CachePolicy::Never),
    ("only metadata cached, access times kept", |config| {
        config.cache_policy = CachePolicy::Metadata;
        config.clean_noatime = false;
    }),
];

fn map_xattrs(config: &mut Config, rules: &str) {
    config.xattr = true;
    config.xattrmap = Some(XattrMap::try_from(rules).unwrap());
}
