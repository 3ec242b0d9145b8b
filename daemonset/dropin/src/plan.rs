//! From the command line to what is served, where, and how: pure. What cannot be honoured is refused by name.

mod modcaps;

use std::os::fd::RawFd;

use log::LevelFilter;
use thiserror::Error;
use virtiofs_config::{
    Access, CachePolicy, EngineConfig, IdTranslation, IdTranslationKind, InodeFileHandles, LONG_TIMEOUT_MS, Sandbox,
};
use virtiofsd::idmap::{GidMap, UidMap};
use virtiofsd::passthrough::{self, NegotiationMode};
use virtiofsd::sandbox::SandboxMode;
use virtiofsd::soft_idmap::cmdline::IdMap;

use crate::args::{FileHandles, Options, Seccomp, Staleness};
use modcaps::modcaps;

/// Limit of open files that stock virtiofsd sets where none is given.
pub(crate) const DEFAULT_OPEN_FILES: u64 = 1_000_000;

/// What the plan depends on besides the command line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Site {
    /// Effective user.
    pub(crate) uid: u32,
    /// Effective group.
    pub(crate) gid: u32,
    /// True in the initial user namespace.
    pub(crate) initial_user_namespace: bool,
    /// `/proc/sys/fs/nr_open`.
    pub(crate) nr_open: u64,
    /// Limit of open files of this process: soft and hard.
    pub(crate) open_files: (u64, u64),
}

/// What to serve, and where.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Plan {
    /// The directory, as given.
    pub(crate) shared_dir: String,
    /// Where to listen.
    pub(crate) listen: Listen,
    /// Configuration of the engine.
    pub(crate) engine: EngineConfig,
    /// True if staleness is remedied.
    pub(crate) heal: bool,
    /// What to say about options that are deprecated, or that change nothing here.
    pub(crate) warnings: Vec<String>,
}

/// Where to listen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Listen {
    /// At a new socket.
    Path {
        /// Its path, as given.
        path: String,
        /// Name of the group that may connect.
        group: Option<String>,
    },
    /// At an inherited socket.
    Descriptor(RawFd),
}

/// Why a command line is refused.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub(crate) enum Refusal {
    /// Stock virtiofsd refuses it, too.
    #[error("{0}")]
    Invalid(String),
    /// Stock virtiofsd accepts it, and this program cannot do it.
    #[error("{option} is not supported: {why}")]
    Unsupported {
        /// The option.
        option: String,
        /// Why, and what to do instead.
        why: &'static str,
    },
}

fn unsupported<T>(option: impl Into<String>, why: &'static str) -> Result<T, Refusal> {
    Err(Refusal::Unsupported { option: option.into(), why })
}

/// Decides what the command line means at this site.
pub(crate) fn plan(options: &Options, site: &Site) -> Result<Plan, Refusal> {
    let Some(shared_dir) = options.shared_dir.clone() else {
        return Err(Refusal::Invalid("missing \"--shared-dir\" or \"-o source\" option".into()));
    };
    refuse_unsupported(options, site)?;
    let engine = engine(options, site)?;
    let chosen = options.inode_file_handles == FileHandles::Never || options.rlimit_nofile.is_some();
    Ok(Plan {
        shared_dir,
        listen: listen(options)?,
        engine,
        heal: options.staleness.map_or(!chosen, |staleness| staleness == Staleness::Heal),
        warnings: warnings(options),
    })
}

fn listen(options: &Options) -> Result<Listen, Refusal> {
    match (options.fd, options.socket_path.as_ref().or(options.socket.as_ref())) {
        (Some(fd), _) => Ok(Listen::Descriptor(fd)),
        (None, Some(path)) => Ok(Listen::Path { path: path.clone(), group: options.socket_group.clone() }),
        (None, None) => Err(Refusal::Invalid("missing \"--socket-path\" or \"--fd\" option".into())),
    }
}

fn refuse_unsupported(options: &Options, site: &Site) -> Result<(), Refusal> {
    const MIGRATION: &str = "the state of this device does not migrate; leave the option out, and unmount in the guest \
                             before a live migration";
    for (given, option) in [
        (options.migration_mode.is_some(), "--migration-mode"),
        (options.migration_on_error.is_some(), "--migration-on-error"),
        (options.migration_verify_handles, "--migration-verify-handles"),
        (options.migration_confirm_paths, "--migration-confirm-paths"),
    ] {
        if given {
            return unsupported(option, MIGRATION);
        }
    }
    if options.tag.is_some() {
        return unsupported("--tag", "give the tag to the VMM, as with `-device vhost-user-fs-pci,tag=...`");
    }
    let root = site.uid == 0;
    if options.sandbox == SandboxMode::None && root && site.initial_user_namespace {
        return unsupported("--sandbox=none for root", "use --sandbox=namespace or chroot, or run it as another user");
    }
    if options.sandbox == SandboxMode::Chroot && !root {
        return Err(Refusal::Invalid("sandbox mode 'chroot' can only be used by root (uid: 0)".into()));
    }
    Ok(())
}

fn engine(options: &Options, site: &Site) -> Result<EngineConfig, Refusal> {
    let offers = |mode| mode != NegotiationMode::Never;
    let (posix_acl, security_label) = (offers(options.posix_acl), offers(options.security_label));
    let (uid_translation, gid_translation) = translations(options, site)?;
    if posix_acl && !(uid_translation.is_empty() && gid_translation.is_empty()) {
        return Err(Refusal::Invalid(format!(
            "--posix-acl={} excludes --translate-uid, --translate-gid, --uid-map and --gid-map: other ids would break \
             POSIX ACLs",
            options.posix_acl
        )));
    }
    let modcaps = modcaps(options.modcaps.as_deref().filter(|_| site.uid == 0), options)?;
    let (cache, timeout_ms) = cache(&options.cache);
    let access = if options.readonly { Access::ReadOnly } else { Access::ReadWrite };
    Ok(EngineConfig {
        cache,
        entry_timeout_ms: timeout_ms,
        attr_timeout_ms: timeout_ms,
        inode_file_handles: match options.inode_file_handles {
            FileHandles::Never => InodeFileHandles::Never,
            FileHandles::Fallback | FileHandles::Prefer => InodeFileHandles::Prefer,
            FileHandles::Mandatory => InodeFileHandles::Mandatory,
        },
        writeback: options.writeback,
        xattr: options.xattr || options.xattrmap.is_some() || posix_acl || security_label,
        xattr_map: options.xattrmap.clone(),
        posix_acl,
        security_label,
        killpriv: options.killpriv_v2,
        announce_submounts: !options.no_announce_submounts,
        readdirplus: cache != CachePolicy::Never && !options.no_readdirplus,
        allow_mmap: options.allow_mmap,
        direct_io: options.allow_direct_io,
        preserve_noatime: options.preserve_noatime,
        device_nodes: modcaps.device_nodes,
        file_capabilities: modcaps.file_capabilities,
        open_files: open_files(options.rlimit_nofile, site)?,
        sandbox: match options.sandbox {
            SandboxMode::Namespace => Sandbox::Namespace,
            SandboxMode::Chroot => Sandbox::Chroot,
            SandboxMode::None => Sandbox::None,
        },
        uid_translation,
        gid_translation,
        ..EngineConfig::stock(access)
    })
}

/// Policy, and the time for which the guest may cache names and attributes.
fn cache(policy: &passthrough::CachePolicy) -> (CachePolicy, u64) {
    match policy {
        passthrough::CachePolicy::Never => (CachePolicy::Never, 0),
        passthrough::CachePolicy::Metadata => (CachePolicy::Metadata, LONG_TIMEOUT_MS),
        passthrough::CachePolicy::Auto => (CachePolicy::Auto, 1000),
        passthrough::CachePolicy::Always => (CachePolicy::Always, LONG_TIMEOUT_MS),
    }
}

/// None: the hard limit.
fn open_files(given: Option<u64>, site: &Site) -> Result<Option<u64>, Refusal> {
    let (soft, hard) = site.open_files;
    match given {
        Some(0) => Ok(Some(soft)),
        Some(limit) if limit > site.nr_open => {
            Err(Refusal::Invalid(format!("--rlimit-nofile={limit} is more than fs.nr_open, {}", site.nr_open)))
        }
        Some(limit) if limit > hard => {
            Err(Refusal::Invalid(format!("--rlimit-nofile={limit} is more than the hard limit, {hard}")))
        }
        Some(limit) => Ok(Some(limit)),
        None if soft >= DEFAULT_OPEN_FILES => Ok(Some(soft)),
        None => Ok(Some(DEFAULT_OPEN_FILES.min(site.nr_open)).filter(|limit| *limit <= hard)),
    }
}

type Translations = (Vec<IdTranslation>, Vec<IdTranslation>);

fn translations(options: &Options, site: &Site) -> Result<Translations, Refusal> {
    let users =
        options.uid_map.iter().map(|&UidMap { inside_uid, outside_uid, count }| (inside_uid, outside_uid, count));
    let groups =
        options.gid_map.iter().map(|&GidMap { inside_gid, outside_gid, count }| (inside_gid, outside_gid, count));
    let users = mapped("--uid-map", users.collect(), site.uid, options, site)?;
    let groups = mapped("--gid-map", groups.collect(), site.gid, options, site)?;
    let translated = |rules: &[IdMap]| rules.iter().map(translation).collect::<Vec<_>>();
    Ok(([translated(&options.translate_uid), users].concat(), [translated(&options.translate_gid), groups].concat()))
}

/// A user namespace in which the only id has another number is a translation of that id.
fn mapped(
    option: &'static str,
    map: Vec<(u32, u32, u32)>,
    own: u32,
    options: &Options,
    site: &Site,
) -> Result<Vec<IdTranslation>, Refusal> {
    if !map.is_empty() && (site.uid == 0 || options.sandbox != SandboxMode::Namespace) {
        let who = "can only be used by an ordinary user and with --sandbox=namespace";
        return Err(Refusal::Invalid(format!("{option} {who}")));
    }
    match map[..] {
        [] => Ok(Vec::new()),
        [(inside, outside, 1)] if outside == own && inside == own => Ok(Vec::new()),
        [(inside, outside, 1)] if outside == own => {
            Ok(vec![IdTranslation { kind: IdTranslationKind::Map, from: inside, to: outside, count: 1 }])
        }
        _ => unsupported(
            option,
            "only the id of the user that runs this program can be mapped, as in :0:UID:1:; for more ids run it in a user \
             namespace that has them (podman unshare, or unshare --map-auto) with --sandbox=none or chroot",
        ),
    }
}

fn translation(rule: &IdMap) -> IdTranslation {
    let (kind, from, to, count) = match *rule {
        IdMap::Guest { from_guest, to_host, count } => (IdTranslationKind::Guest, from_guest, to_host, count),
        IdMap::Host { from_host, to_guest, count } => (IdTranslationKind::Host, from_host, to_guest, count),
        IdMap::SquashGuest { from_guest, to_host, count } => {
            (IdTranslationKind::SquashGuest, from_guest, to_host, count)
        }
        IdMap::SquashHost { from_host, to_guest, count } => (IdTranslationKind::SquashHost, from_host, to_guest, count),
        IdMap::ForbidGuest { from_guest, count } => (IdTranslationKind::ForbidGuest, from_guest, 0, count),
        IdMap::Bidirectional { guest, host, count } => (IdTranslationKind::Map, guest, host, count),
    };
    IdTranslation { kind, from, to, count }
}

fn warnings(options: &Options) -> Vec<String> {
    let said = [
        (options.compat_foreground, "Use of deprecated flag '-f': This flag has no effect, please remove it"),
        (options.compat_debug, "Use of deprecated flag '-d': Please use the '--log-level debug' option instead"),
        (
            options.compat_options.is_some(),
            "Use of deprecated option format '-o': Please specify options without it (e.g., '--cache auto' instead of \
             '-o cache=auto')",
        ),
        (
            options.inode_file_handles == FileHandles::Fallback,
            "Use of deprecated value 'fallback' for '--inode-file-handles': Please use 'prefer' instead",
        ),
        (
            options.socket_path.is_none() && options.socket.is_some(),
            "use of deprecated parameter '--socket': Please use the '--socket-path' option instead",
        ),
        (options.thread_pool_size > 0, "--thread-pool-size has no effect: requests are served one after another"),
        (options.seccomp != Seccomp::Kill, "--seccomp has no effect: the filter is always on and kills"),
        (
            options.posix_acl == NegotiationMode::Always || options.security_label == NegotiationMode::Always,
            "--posix-acl=always and --security-label=always act as auto: a guest without them can mount",
        ),
    ];
    said.into_iter().filter(|(applies, _)| *applies).map(|(_, text)| text.to_owned()).collect()
}

/// The level at which everything logs.
pub(crate) fn log_level(options: &Options) -> LevelFilter {
    if options.compat_debug { LevelFilter::Debug } else { options.log_level }
}

#[cfg(test)]
mod tests;
