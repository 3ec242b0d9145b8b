//! Landlock: restrictions of the kernel on top of the sandbox, where the kernel has them.
//!
//! What is denied depends on what else there is:
//!
//! - A read-only engine may write, create, remove and change nothing, wherever it is.
//! - An engine within whose reach other mounts are may open only what is below its root. This cannot be combined with file
//!   handles: a file that is opened by its handle may have no known path, and the kernel then denies it.
//! - No engine may signal processes outside, connect to abstract sockets or use TCP.

use std::fs::File;
use std::path::Path;

use landlock::{
    ABI, Access, AccessFs, AccessNet, LandlockStatus, PathBeneath, Ruleset, RulesetAttr, RulesetCreatedAttr,
    RulesetError, RulesetStatus, Scope,
};

/// Newest version whose rights are used. A kernel with an older one enforces what it has.
const NEWEST: ABI = ABI::V6;

/// What the kernel enforces.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Enforced {
    /// The kernel's version of Landlock; 0: nothing is enforced.
    pub(crate) abi: u32,
    /// True if only files below the root can be opened.
    pub(crate) paths: bool,
}

/// Restricts this thread and all threads that it starts, for good. `below`: the only directory below which files may be
/// opened, if that is restricted.
pub(crate) fn restrict(writable: bool, below: Option<&Path>) -> Enforced {
    match try_to_restrict(writable, below) {
        Ok(enforced) => enforced,
        Err(error) => {
            tracing::warn!("Landlock: {error}");
            Enforced::default()
        }
    }
}

/// Why Landlock could not be used.
#[derive(Debug, thiserror::Error)]
enum LandlockError {
    #[error("open the source: {0}")]
    Open(std::io::Error),
    #[error("{0}")]
    Rules(RulesetError),
}

fn try_to_restrict(writable: bool, below: Option<&Path>) -> Result<Enforced, LandlockError> {
    let ruleset = ruleset(writable, below.is_some()).map_err(LandlockError::Rules)?;
    let created = ruleset.create().map_err(LandlockError::Rules)?;
    let created = match below {
        Some(root) => {
            let root = File::open(root).map_err(LandlockError::Open)?;
            created.add_rule(PathBeneath::new(root, needed(writable))).map_err(LandlockError::Rules)?
        }
        None => created,
    };
    let status = created.restrict_self().map_err(LandlockError::Rules)?;
    let abi = match status.landlock {
        LandlockStatus::Available { effective_abi, kernel_abi } => kernel_abi.unwrap_or(effective_abi as i32),
        _ => 0,
    };
    let enforced = status.ruleset != RulesetStatus::NotEnforced;
    let abi = if enforced { u32::try_from(abi).unwrap_or(0) } else { 0 };
    Ok(Enforced { abi, paths: enforced && below.is_some() })
}

fn ruleset(writable: bool, paths: bool) -> Result<Ruleset, RulesetError> {
    let mut ruleset = Ruleset::default().handle_access(AccessNet::from_all(NEWEST))?.scope(Scope::from_all(NEWEST))?;
    if paths {
        ruleset = ruleset.handle_access(AccessFs::from_all(NEWEST))?;
    } else if !writable {
        ruleset = ruleset.handle_access(AccessFs::from_write(NEWEST) | AccessFs::Execute)?;
    }
    Ok(ruleset)
}

/// The rights that an engine needs below its root.
fn needed(writable: bool) -> landlock::BitFlags<AccessFs> {
    let reading = AccessFs::ReadFile | AccessFs::ReadDir;
    if writable { reading | (AccessFs::from_write(NEWEST) & !AccessFs::IoctlDev) } else { reading }
}
