//! The library's configuration, from ours.
//!
//! `passthrough::Config::default()` is not what the stock command line does (no limit of guest descriptors, no
//! file handles, no submounts), so every field that means something is set here and a test compares them.

use std::time::Duration;

use virtiofs_contract::config::{CachePolicy, EngineConfig, IdTranslation, IdTranslationKind, InodeFileHandles};
use virtiofs_contract::preflight::{Finding, Reason};
use virtiofsd::passthrough::xattrmap::XattrMap;
use virtiofsd::passthrough::{self, NegotiationMode};
use virtiofsd::soft_idmap::cmdline::IdMap;

use crate::sandbox::Jail;

/// What the library is to do in `jail` with at most `guest_fd_limit` descriptors for the guest.
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
        // Always: what lies below tells file systems apart by it. What the guest sees is decided above.
        announce_submounts: true,
        inode_file_handles: match config.inode_file_handles {
            InodeFileHandles::Never => passthrough::InodeFileHandlesMode::Never,
            InodeFileHandles::Prefer => passthrough::InodeFileHandlesMode::Prefer,
            InodeFileHandles::Mandatory => passthrough::InodeFileHandlesMode::Mandatory,
        },
        readdirplus: config.readdirplus,
        allow_direct_io: config.direct_io,
        killpriv_v2: config.killpriv,
        // Never `Always`: guests of Linux 5.4 and 5.10 could not mount at all.
        posix_acl: offered(config.posix_acl),
        security_label: offered(config.security_label),
        allow_mmap: config.allow_mmap,
        uid_map: Some(config.uid_translation.iter().map(id_map).collect()),
        gid_map: Some(config.gid_translation.iter().map(id_map).collect()),
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
    XattrMap::try_from(rules).map_err(|error| Finding {
        reason: Reason::EngineFailed,
        message: format!("xattrMap {rules:?} is not understood: {error}"),
        remedy: "write spec.engine.xattrMap in virtiofsd's --xattrmap language, for example \":map::user.virtiofs.:\""
            .into(),
    })
}

fn id_map(rule: &IdTranslation) -> IdMap {
    let IdTranslation { kind, from, to, count } = *rule;
    match kind {
        IdTranslationKind::Guest => IdMap::Guest { from_guest: from, to_host: to, count },
        IdTranslationKind::Host => IdMap::Host { from_host: from, to_guest: to, count },
        IdTranslationKind::SquashGuest => IdMap::SquashGuest { from_guest: from, to_host: to, count },
        IdTranslationKind::SquashHost => IdMap::SquashHost { from_host: from, to_guest: to, count },
        IdTranslationKind::ForbidGuest => IdMap::ForbidGuest { from_guest: from, count },
        IdTranslationKind::Map => IdMap::Bidirectional { guest: from, host: to, count },
    }
}

#[cfg(test)]
mod tests {
    use virtiofs_contract::config::Access;

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
    fn stock_settings_are_those_of_the_stock_command_line() {
        let ours = settings(&EngineConfig::stock(Access::ReadWrite), 4711).unwrap();
        assert_eq!(format!("{ours:?}"), format!("{:?}", stock_default(4711)));
    }

    #[test]
    fn what_needs_extended_attributes_turns_them_on() {
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
    fn a_broken_xattr_map_is_refused_by_name() {
        let config = EngineConfig { xattr_map: Some("nonsense".into()), ..EngineConfig::stock(Access::ReadWrite) };
        assert!(settings(&config, 1).unwrap_err().message.contains("xattrMap"));
    }
}
