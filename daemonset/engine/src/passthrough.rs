//! The library's configuration, from the engine's.
//!
//! `passthrough::Config::default()` differs from the stock command line (no limit of guest descriptors, no file handles, no
//! submounts), so every relevant field is set here, and a test compares them.

use std::time::Duration;

use virtiofs_config::{CachePolicy, EngineConfig, IdTranslation, IdTranslationKind, InodeFileHandles};
use virtiofs_contract::preflight::{Finding, Reason};
use virtiofsd::passthrough::xattrmap::XattrMap;
use virtiofsd::passthrough::{self, NegotiationMode};
use virtiofsd::soft_idmap::cmdline::IdMap;

use crate::sandbox::Jail;

/// The library's configuration in `jail`, with at most `guest_fd_limit` descriptors for the guest.
pub(crate) fn library_config(
    config: &EngineConfig,
    jail: Jail,
    guest_fd_limit: u64,
) -> Result<passthrough::Config, Finding> {
    Ok(passthrough::Config {
        root_dir: jail.root_dir,
        mountinfo_prefix: jail.mountinfo_prefix,
        proc_sfd_rawfd: Some(jail.proc_self_fd),
        proc_mountinfo_rawfd: Some(jail.mountinfo),
        ..settings(config, guest_fd_limit)?
    })
}

fn settings(config: &EngineConfig, guest_fd_limit: u64) -> Result<passthrough::Config, Finding> {
    Ok(passthrough::Config {
        entry_timeout: Duration::from_millis(config.entry_timeout_ms),
        attr_timeout: Duration::from_millis(config.attr_timeout_ms),
        cache_policy: cache_policy(config.cache),
        writeback: config.writeback,
        xattr: config.xattr || config.xattr_map.is_some() || config.posix_acl || config.security_label,
        xattrmap: config.xattr_map.as_deref().map(xattr_map).transpose()?,
        // Always: the session's file system distinguishes file systems by it, and decides what the guest sees.
        announce_submounts: true,
        inode_file_handles: match config.inode_file_handles {
            InodeFileHandles::Never => passthrough::InodeFileHandlesMode::Never,
            InodeFileHandles::Prefer => passthrough::InodeFileHandlesMode::Prefer,
            InodeFileHandles::Mandatory => passthrough::InodeFileHandlesMode::Mandatory,
        },
        readdirplus: config.readdirplus,
        allow_direct_io: config.direct_io,
        clean_noatime: !config.preserve_noatime,
        killpriv_v2: config.killpriv,
        // Never `Always`: guests of Linux 5.4 and 5.10 could not mount.
        posix_acl: offered(config.posix_acl),
        security_label: offered(config.security_label),
        allow_mmap: config.allow_mmap,
        uid_map: Some(config.uid_translation.iter().map(id_map).collect::<Result<_, _>>()?),
        gid_map: Some(config.gid_translation.iter().map(id_map).collect::<Result<_, _>>()?),
        guest_fd_limit,
        ..Default::default()
    })
}

fn offered(wanted: bool) -> NegotiationMode {
    if wanted { NegotiationMode::Auto } else { NegotiationMode::Never }
}

fn cache_policy(policy: CachePolicy) -> passthrough::CachePolicy {
    match policy {
        CachePolicy::Never => passthrough::CachePolicy::Never,
        CachePolicy::Metadata => passthrough::CachePolicy::Metadata,
        CachePolicy::Auto => passthrough::CachePolicy::Auto,
        CachePolicy::Always => passthrough::CachePolicy::Always,
    }
}

fn xattr_map(rules: &str) -> Result<XattrMap, Finding> {
    let refused = |why: &dyn std::fmt::Display| Finding {
        reason: Reason::EngineFailed,
        message: format!("xattrMap {rules:?} cannot be used: {why}"),
        remedy: "write spec.engine.xattrMap in virtiofsd's --xattrmap language, with a last rule for all names, for \
                 example \":map::user.virtiofs.:\""
            .into(),
    };
    let map = XattrMap::try_from(rules).map_err(|error| refused(&error))?;
    // The library panics at a name that no rule matches, and the guest chooses names.
    let matches_all = map.map_client_xattr(c"").is_ok() && map.map_server_xattrlist(b"\x01\0".to_vec()).is_ok();
    if matches_all { Ok(map) } else { Err(refused(&"no rule matches every name")) }
}

fn id_map(rule: &IdTranslation) -> Result<IdMap, Finding> {
    let IdTranslation { kind, from, to, count } = *rule;
    let to_one_id = matches!(kind, IdTranslationKind::SquashGuest | IdTranslationKind::SquashHost);
    // The library adds without a check for overflow.
    if from.checked_add(count).is_none() || !to_one_id && to.checked_add(count).is_none() {
        return Err(Finding {
            reason: Reason::EngineFailed,
            message: format!("a translation of {count} ids from {from} to {to} exceeds the last id"),
            remedy: "lower count in spec.engine.uidTranslation and gidTranslation".into(),
        });
    }
    Ok(match kind {
        IdTranslationKind::Guest => IdMap::Guest { from_guest: from, to_host: to, count },
        IdTranslationKind::Host => IdMap::Host { from_host: from, to_guest: to, count },
        IdTranslationKind::SquashGuest => IdMap::SquashGuest { from_guest: from, to_host: to, count },
        IdTranslationKind::SquashHost => IdMap::SquashHost { from_host: from, to_guest: to, count },
        IdTranslationKind::ForbidGuest => IdMap::ForbidGuest { from_guest: from, count },
        IdTranslationKind::Map => IdMap::Bidirectional { guest: from, host: to, count },
    })
}

#[cfg(test)]
mod tests {
    use virtiofs_config::Access;

    use super::*;

    /// The stock binary's configuration where nothing but the directory and the socket is given (read from
    /// virtiofsd 1.14's `main`), for a limit of guest descriptors of `fds`.
    fn stock_default(fds: u64) -> passthrough::Config {
        passthrough::Config {
            entry_timeout: Duration::from_secs(1),
            attr_timeout: Duration::from_secs(1),
            cache_policy: passthrough::CachePolicy::Auto,
            xattr: false,
            announce_submounts: true,
            inode_file_handles: passthrough::InodeFileHandlesMode::Prefer,
            readdirplus: true,
            writeback: false,
            allow_direct_io: false,
            killpriv_v2: false,
            security_label: NegotiationMode::Never,
            posix_acl: NegotiationMode::Never,
            clean_noatime: true,
            allow_mmap: false,
            uid_map: Some(Vec::new()),
            gid_map: Some(Vec::new()),
            guest_fd_limit: fds,
            ..Default::default()
        }
    }

    #[test]
    fn stock_settings_match_the_stock_command_line() {
        let ours = settings(&EngineConfig::stock(Access::ReadWrite), 4711).unwrap();
        assert_eq!(format!("{ours:?}"), format!("{:?}", stock_default(4711)));
    }

    #[test]
    fn features_that_need_xattrs_enable_them() {
        let base = EngineConfig::stock(Access::ReadWrite);
        for config in [
            EngineConfig { posix_acl: true, ..base.clone() },
            EngineConfig { security_label: true, ..base.clone() },
            EngineConfig { xattr_map: Some(":map::user.virtiofs.:".into()), ..base.clone() },
        ] {
            assert!(settings(&config, 1).unwrap().xattr, "{config:?}");
        }
    }

    #[test]
    fn an_invalid_xattr_map_is_refused() {
        for rules in ["nonsense", ":prefix:all:trusted.:user.virtiofs.:"] {
            let config = EngineConfig { xattr_map: Some(rules.into()), ..EngineConfig::stock(Access::ReadWrite) };
            assert!(settings(&config, 1).unwrap_err().message.contains("xattrMap"), "{rules}");
        }
    }

    #[test]
    fn id_ranges_do_not_overflow() {
        let kind = IdTranslationKind::Map;
        let rule = |from, to, count| id_map(&IdTranslation { kind, from, to, count });
        assert!(rule(0, 100_000, 65536).is_ok());
        assert!(rule(u32::MAX - 1, 0, 2).is_err() && rule(0, u32::MAX, 1).is_err());
        let squash =
            |from| id_map(&IdTranslation { kind: IdTranslationKind::SquashGuest, from, to: 1000, count: u32::MAX });
        assert!(squash(0).is_ok(), "all ids become one");
        assert!(squash(1).is_err());
    }
}
