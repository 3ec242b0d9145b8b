//! From the broker's status to what the remedy policy observes. The agent and `virtiofsd-live` share it.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::time::Duration;

use rustix::fs::{AtFlags, CWD, StatxAttributes, StatxFlags, statx};
use virtiofs_contract::control::{EndpointStatus, SessionState, SessionStatus};
use virtiofs_contract::staleness::{CAUSES, Cause};
use virtiofs_remedy::Session;

/// A request that has been in progress for this long hangs: no disk takes that long.
const HUNG_AFTER: Duration = Duration::from_secs(10);

/// A guest this close to its inode limit counts as full.
const NEARLY: u64 = 64;

/// Stale events by cause, of all these endpoints.
pub fn stale_events(endpoints: &[&EndpointStatus]) -> BTreeMap<Cause, u64> {
    let count = |cause| endpoints.iter().map(|it| it.totals.stale(cause)).sum();
    CAUSES.into_iter().map(|cause| (cause, count(cause))).collect()
}

/// True if an engine serves the session, or is about to.
pub fn is_served(session: &SessionStatus) -> bool {
    use SessionState::{Recovering, Serving, Stopped};
    session.engine_pid.is_some() && matches!(session.state, Serving | Stopped | Recovering)
}

/// What the policy observes of one session.
pub fn session(session: &SessionStatus) -> Session<'_> {
    Session {
        id: &session.id,
        generation: session.active_generation,
        engine: &session.engine,
        preflight: session.preflight.as_ref(),
        full: session.held.inodes.saturating_add(NEARLY) >= session.inodes_limit,
        gone: session.source_gone.is_some(),
        hung: hangs(session),
    }
}

/// True if a request of the session's guest hangs.
pub fn hangs(session: &SessionStatus) -> bool {
    session.oldest_request.as_ref().is_some_and(|oldest| u128::from(oldest.age_ms) >= HUNG_AFTER.as_millis())
}

/// True for an empty directory that is no mount point, which is what an unmounted file system leaves. Reads the directory: it
/// may hang.
pub fn is_bare(directory: &Path) -> bool {
    let empty = fs::read_dir(directory).is_ok_and(|mut entries| entries.next().is_none());
    empty && !is_mount_point(directory)
}

fn is_mount_point(path: &Path) -> bool {
    let found = statx(CWD, path, AtFlags::empty(), StatxFlags::BASIC_STATS);
    found.is_ok_and(|found| found.stx_attributes.contains(StatxAttributes::MOUNT_ROOT))
}

#[cfg(test)]
mod tests {
    use virtiofs_contract::control::OldestRequest;

    use super::*;
    use crate::fixtures;

    #[test]
    fn old_request_hangs_and_nearly_full_guest_is_full() {
        let oldest = |age_ms| Some(OldestRequest { age_ms, opcode: 15, node: 1, path: None });
        let mut status = SessionStatus { inodes_limit: 1000, ..fixtures::session("data-1") };
        assert!(!session(&status).hung && !session(&status).full);
        status.oldest_request = oldest(9_999);
        assert!(!hangs(&status));
        status.oldest_request = oldest(10_000);
        status.held.inodes = status.inodes_limit - NEARLY;
        assert!(session(&status).hung && session(&status).full);
    }

    #[test]
    fn session_without_an_engine_is_not_served() {
        let served = SessionStatus { engine_pid: Some(7), ..fixtures::session("data-1") };
        assert!(is_served(&served));
        assert!(!is_served(&SessionStatus { engine_pid: None, ..served.clone() }));
        assert!(!is_served(&SessionStatus { state: SessionState::Connecting, ..served }));
    }

    #[test]
    fn an_empty_directory_without_mount_is_bare() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path();
        assert!(is_bare(path));
        fs::write(path.join("file"), "").unwrap();
        assert!(!is_bare(path));
        assert!(!is_bare(&path.join("file")) && !is_bare(&path.join("nothing")));
        assert!(is_mount_point(Path::new("/proc")) && !is_mount_point(path));
    }
}
