//! Confines the process to its source and finds out what works there.

use std::io;
use std::os::fd::OwnedFd;

use nix::fcntl::{OFlag, open};
use nix::sys::stat::Mode;
use nix::unistd::geteuid;
use virtiofs_config::{EngineConfig, Limits};
use virtiofs_contract::preflight::{Finding, Preflight, Reason};
use virtiofsd::passthrough::Config as LibraryConfig;

use crate::mapped_ids::IdMapFiles;
use crate::session_fs::{HostTree, Places};
use crate::{capabilities, confinement, limits, passthrough, preflight, sandbox};

/// A confined process, ready to start the library.
pub(crate) struct Prepared {
    /// Configuration for the library.
    pub(crate) library: LibraryConfig,
    /// The result for the broker.
    pub(crate) preflight: Preflight,
    /// What else of the host the session's file system reaches.
    pub(crate) places: Places,
}

/// Confines this process for good (limits, sandbox, capabilities), then tries the features that the configuration needs.
///
/// # Errors
/// Why the configuration cannot be served here, with a remedy.
pub(crate) fn prepare(config: &EngineConfig, source: OwnedFd) -> Result<Prepared, Finding> {
    let mut findings = Vec::new();
    limits::disable_core_dumps();
    limits::bound_memory(config.max_inodes);
    let open_files = limits::raise_open_files(config.open_files, &mut findings)?;
    let id_maps = IdMapFiles::open().map_err(|error| unreadable_ids(&error))?;
    let jail = sandbox::enter(config, source)?;
    let mapped_ids = id_maps.read().map_err(|error| unreadable_ids(&error))?;
    drop(id_maps);
    let held = capabilities::keep_needed(config, &mut findings)?;
    if !geteuid().is_root() {
        findings.extend(mapped_ids.finding(config, capabilities::may_switch_users(&held)));
    }
    let tried = preflight::try_features(config, &jail, &mut findings)?;
    let mounts = preflight::openable_mounts(&jail, &tried);
    let host = host_tree(&jail).map_err(|error| unreadable_source(&error))?;
    let confinement = confinement::complete(config, &jail, tried.inode_file_handles, &mut findings);
    let preflight = Preflight {
        sandbox: jail.mode,
        confinement,
        user_namespace: jail.user_namespace,
        capabilities: held,
        inode_file_handles: tried.inode_file_handles,
        mounts: tried.mounts,
        open_files: open_files.limit,
        guest_open_files: open_files.guest,
        limits: Limits::default(),
        findings,
    };
    let effective = EngineConfig { inode_file_handles: preflight.inode_file_handles, ..config.clone() };
    let library = passthrough::library_config(&effective, jail, open_files.guest)?;
    Ok(Prepared { library, preflight, places: Places { mounts, host, mapped_ids } })
}

fn host_tree(jail: &sandbox::Jail) -> io::Result<HostTree> {
    let root = open(jail.root_dir.as_str(), OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC, Mode::empty())?;
    Ok(HostTree { root, mountinfo: jail.mountinfo.try_clone()? })
}

fn unreadable_source(error: &io::Error) -> Finding {
    Finding {
        reason: Reason::SourceUnreadable,
        message: format!("the source cannot be opened: {error}"),
        remedy: "check that the source exists and that the broker may enter it".into(),
    }
}

fn unreadable_ids(error: &io::Error) -> Finding {
    Finding {
        reason: Reason::EngineFailed,
        message: format!("/proc/self/uid_map and gid_map cannot be read: {error}"),
        remedy: "mount /proc where the broker runs".into(),
    }
}
