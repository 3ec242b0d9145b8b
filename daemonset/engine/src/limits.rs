//! The limits of open files and of memory.

use nix::sys::resource::{Resource, getrlimit, setrlimit};
use virtiofs_contract::engine::MAX_MEMORY_REGIONS;
use virtiofs_contract::preflight::{Finding, Reason};

use crate::preflight::MOST_MOUNTS;

/// Descriptors that the engine itself may need at once: guest memory, rings, sockets, two for each mount that
/// handles are opened on, and those the library opens for a moment before it counts them against the guest.
const OWN_FILES: u64 = MAX_MEMORY_REGIONS as u64 + 2 * MOST_MOUNTS as u64 + SPARE_FILES;

/// Of these, the ones opened for a moment.
const SPARE_FILES: u64 = 96;

/// Fewer than this for a guest is not worth starting: a shell and its libraries hold more.
const LEAST_GUEST_FILES: u64 = 128;

/// A core of an engine would hold its guest's memory, and writing it would keep the next engine waiting.
pub(crate) fn leave_no_core() {
    if let Err(error) = setrlimit(Resource::RLIMIT_CORE, 0, 0) {
        tracing::warn!("limit of core files: {error}");
    }
}

/// Memory that the engine may have whatever the guest holds: threads, buffers, the library.
const OWN_MEMORY: u64 = 1 << 30;

/// Memory that it may have for each inode of the guest. Half a kilobyte is usual, tables double as they grow.
const MEMORY_PER_INODE: u64 = 2048;

/// A guest may have the engine hold so many inodes; whatever goes wrong, it must not have it hold more memory than
/// those can cost. Guest memory, which is shared, does not count here.
pub(crate) fn bound_memory(most_inodes: u64) {
    let limit = most_memory(most_inodes);
    if let Err(error) = setrlimit(Resource::RLIMIT_DATA, limit, limit) {
        // Somebody has set a lower one.
        tracing::debug!("limit of memory: {error}");
    }
}

fn most_memory(most_inodes: u64) -> u64 {
    most_inodes.saturating_mul(MEMORY_PER_INODE).saturating_add(OWN_MEMORY)
}

/// The highest descriptor that a file opened for the guest may get, where the library does not count it. The kernel
/// gives the lowest that is free, so one above says that there are as many: what is left, the library needs itself.
pub(crate) fn highest_for_guest() -> u64 {
    getrlimit(Resource::RLIMIT_NOFILE).map_or(u64::MAX, |(soft, _)| soft.saturating_sub(SPARE_FILES))
}

/// The limit in force, and what of it the guest may use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct OpenFiles {
    pub(crate) limit: u64,
    pub(crate) guest: u64,
}

/// Raises the limit to `wanted`, or to the hard limit where nothing is asked for.
pub(crate) fn raise_open_files(wanted: Option<u64>, findings: &mut Vec<Finding>) -> Result<OpenFiles, Finding> {
    let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE).map_err(|error| too_few(&format!("getrlimit: {error}")))?;
    let limit = wanted.unwrap_or(hard);
    let in_force = if setrlimit(Resource::RLIMIT_NOFILE, limit, limit.max(hard)).is_ok() {
        limit
    } else if setrlimit(Resource::RLIMIT_NOFILE, hard, hard).is_ok() {
        findings.push(too_few(&format!("openFiles asks for {limit}, the hard limit is {hard}")));
        hard
    } else {
        soft
    };
    split(in_force)
}

fn split(limit: u64) -> Result<OpenFiles, Finding> {
    match limit.checked_sub(OWN_FILES) {
        Some(guest) if guest >= LEAST_GUEST_FILES => Ok(OpenFiles { limit, guest }),
        _ => Err(too_few(&format!(
            "{limit} open files are allowed, at least {} are needed",
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
    fn memory_is_bounded_by_what_the_guest_may_hold() {
        assert_eq!(most_memory(0), 1 << 30);
        assert_eq!(most_memory(1 << 22), (1 << 30) + (8 << 30));
        assert_eq!(most_memory(u64::MAX), u64::MAX);
    }

    #[test]
    fn the_guest_gets_what_the_engine_does_not_need() {
        assert_eq!(split(20_000).unwrap(), OpenFiles { limit: 20_000, guest: 20_000 - OWN_FILES });
        let least = OWN_FILES + LEAST_GUEST_FILES;
        assert_eq!(split(least).unwrap().guest, LEAST_GUEST_FILES);
        assert_eq!(split(least - 1).unwrap_err().reason, Reason::OpenFileLimitTooLow);
        assert!(split(10).is_err());
    }
}
