//! Confines the process to its source and finds out what works there.

use std::fs::File;
use std::os::fd::OwnedFd;

use virtiofs_config::{EngineConfig, Limits};
use virtiofs_contract::preflight::{Finding, Preflight};
use virtiofsd::passthrough::Config as LibraryConfig;

use crate::{capabilities, limits, passthrough, preflight, sandbox};

/// A confined process, ready to start the library.
pub(crate) struct Prepared {
    /// Configuration for the library.
    pub(crate) library: LibraryConfig,
    /// The result for the broker.
    pub(crate) preflight: Preflight,
    /// Where files can be opened by file handle; empty: nowhere.
    pub(crate) mounts: Vec<File>,
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
    let jail = sandbox::enter(config, source)?;
    let held = capabilities::keep_needed(config, &mut findings)?;
    let tried = preflight::try_features(config, &jail, &mut findings)?;
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
