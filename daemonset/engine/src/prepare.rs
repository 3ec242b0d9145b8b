//! From a configuration and a source to a process that is confined, and knows what works.

use std::fs::File;
use std::os::fd::OwnedFd;

use virtiofs_config::{EngineConfig, Limits};
use virtiofs_contract::preflight::{Finding, Preflight};
use virtiofsd::passthrough::Config as LibraryConfig;

use crate::{capabilities, limits, passthrough, preflight, sandbox};

/// A confined process, ready to start the library.
pub(crate) struct Prepared {
    /// What the library is to do.
    pub(crate) library: LibraryConfig,
    /// What was found on the way.
    pub(crate) preflight: Preflight,
    /// Where files can be opened by their handles; empty: nowhere.
    pub(crate) mounts: Vec<File>,
}

/// Confines this process for good: limits, sandbox, capabilities; then tries what is left.
///
/// # Errors
/// What keeps the configuration from being served here, with what would help.
pub(crate) fn prepare(config: &EngineConfig, source: OwnedFd) -> Result<Prepared, Finding> {
    let mut findings = Vec::new();
    limits::leave_no_core();
    limits::bound_memory(config.max_inodes);
    let open_files = limits::raise_open_files(config.open_files, &mut findings)?;
    let jail = sandbox::enter(config, source)?;
    let held = capabilities::keep_needed(config, &mut findings)?;
    let tried = preflight::try_out(config, &jail, &mut findings)?;
    let mounts = preflight::openable_mounts(&jail, &tried);
    let preflight = Preflight {
        sandbox: jail.mode,
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
    Ok(Prepared { library, preflight, mounts })
}
