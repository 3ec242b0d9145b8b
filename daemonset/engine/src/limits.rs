//! Limits of open files and memory.

use nix::sys::resource::{Resource, getrlimit, setrlimit};
use virtiofs_contract::engine::MAX_MEMORY_REGIONS;
use virtiofs_contract::preflight::{Finding, Reason};

/// Most submounts that are tried in the preflight; others are served without a trial.
pub(crate) const MAX_MOUNTS: usize = 64;

/// Descriptors that the engine itself may need at once: guest memory, rings, sockets, two for each mount on which file
/// handles are opened, directories that are kept open, and those that the library opens briefly before it counts them.
const OWN_FILES: u64 = MAX_MEMORY_REGIONS as u64 + 2 * MAX_MOUNTS as u64 + TRANSIENT_FILES;

/// Of these, the descriptors that are open briefly: 64 of directories (`session_fs::open_directories`), 16 of
/// files (`session_fs::recent_lookups`), and the library's.
const TRANSIENT_FILES: u64 = 96;

/// Fewest descriptors for a guest: a shell and its libraries hold more.
const LEAST_GUEST_FILES: u64 = 128;

/// Disables core dumps: one would contain the guest's memory, and writing it would delay the next engine.
pub(crate) fn disable_core_dumps() {
    if let Err(error) = setrlimit(Resource::RLIMIT_CORE, 0, 0) {
        tracing::warn!("setting RLIMIT_CORE: {error}");
    }
}

/// Memory for threads, buffers and the library, whatever the guest holds. Bytes.
const OWN_MEMORY: u64 = 1 << 30;

/// Memory for each inode of the guest. Half a kilobyte is usual; tables double as they grow. Bytes.
const MEMORY_PER_INODE: u64 = 2048;

/// Limits private memory to what `most_inodes` inodes of the guest can cost. Guest memory is shared and does not count.
///
/// The broker may have set a lower limit. It stays, although this process may have the right to raise it.
pub(crate) fn bound_memory(most_inodes: u64) {
    let lower = |(_, hard): (u64, u64)| {
        let limit = memory_limit(most_inodes, hard);
        setrlimit(Resource::RLIMIT_DATA, limit, limit)
    };
    if let Err(error) = getrlimit(Resource::RLIMIT_DATA).and_then(lower) {
        tracing::warn!("setting RLIMIT_DATA: {error}");
    }
}

fn memory_limit(most_inodes: u64, hard: u64) -> u64 {
    most_inodes.saturating_mul(MEMORY_PER_INODE).saturating_add(OWN_MEMORY).min(hard)
}

/// The highest descriptor for files of the guest that the library does not count. The kernel returns the lowest free one,
/// so a higher one means that the rest is needed by the library itself.
pub(crate) fn highest_for_guest() -> u64 {
    getrlimit(Resource::RLIMIT_NOFILE).map_or(u64::MAX, |(soft, _)| soft.saturating_sub(TRANSIENT_FILES))
}

/// The active limit, and the guest's part of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct OpenFiles {
    pub(crate) limit: u64,
    pub(crate) guest: u64,
}

/// Raises the limit to `wanted`, or to the hard limit by default.
pub(crate) fn raise_open_files(wanted: Option<u64>, findings: &mut Vec<Finding>) -> Result<OpenFiles, Finding> {
    let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE).map_err(|error| too_few(&format!("getrlimit: {error}")))?;
    let limit = wanted.unwrap_or(hard);
    let active = if setrlimit(Resource::RLIMIT_NOFILE, limit, limit.max(hard)).is_ok() {
        limit
    } else if setrlimit(Resource::RLIMIT_NOFILE, hard, hard).is_ok() {
        findings.push(too_few(&format!("openFiles is {limit}, the hard limit is {hard}")));
        hard
    } else {
        soft
    };
    split(active)
}

fn split(limit: u64) -> Result<OpenFiles, Finding> {
    match limit.checked_sub(OWN_FILES) {
        Some(guest) if guest >= LEAST_GUEST_FILES => Ok(OpenFiles { limit, guest }),
        _ => Err(too_few(&format!(
            "the limit is {limit} open files, at least {} are needed",
            OWN_FILES + LEAST_GUEST_FILES
        ))),
    }
}

fn too_few(message: &str) -> Finding {
    Finding {
        reason: Reason::OpenFileLimitTooLow,
        message: message.into(),
        remedy: "raise the hard limit of open files of the broker (LimitNOFILE= under systemd, --ulimit nofile= \
                 under Podman), or lower spec.engine.openFiles"
            .into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_bounded_by_the_guests_inodes() {
        assert_eq!(memory_limit(0, u64::MAX), 1 << 30);
        assert_eq!(memory_limit(1 << 22, u64::MAX), (1 << 30) + (8 << 30));
        assert_eq!(memory_limit(u64::MAX, u64::MAX), u64::MAX);
    }

    #[test]
    fn memory_limit_of_the_broker_is_not_raised() {
        assert_eq!(memory_limit(1 << 22, 64 << 20), 64 << 20);
    }

    #[test]
    fn the_guest_gets_the_rest() {
        assert_eq!(split(20_000).unwrap(), OpenFiles { limit: 20_000, guest: 20_000 - OWN_FILES });
        let least = OWN_FILES + LEAST_GUEST_FILES;
        assert_eq!(split(least).unwrap().guest, LEAST_GUEST_FILES);
        assert_eq!(split(least - 1).unwrap_err().reason, Reason::OpenFileLimitTooLow);
        assert!(split(10).is_err());
    }
}
