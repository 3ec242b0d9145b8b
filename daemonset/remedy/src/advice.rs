//! What a person can do where no remedy helps.

use serde::{Deserialize, Serialize};

use crate::escalation::{Amendment, Blocker, amended, handles};
use crate::policy::BUDGET_SPAN;
use crate::{Cause, Content, Moment, Observation, Policy, Remedy};
use virtiofs_config::InodeFileHandles;

/// How to make file handles possible if a capability is missing.
const GRANT_HANDLES: &str = "give the broker CAP_DAC_READ_SEARCH in the initial user namespace. Kubernetes: \
     securityContext.capabilities.add [DAC_READ_SEARCH] on its container, without hostUsers: false, and no seccomp \
     profile that forbids name_to_handle_at. Podman: as root, --cap-add dac_read_search, without --userns. systemd: \
     CAP_DAC_READ_SEARCH in CapabilityBoundingSet= and, unless it runs as root, AmbientCapabilities=, without \
     PrivateUsers=";

/// How to raise the limit of open files.
const GRANT_FILES: &str = "raise the broker's hard limit of open files. Kubernetes: LimitNOFILE= of the container \
     runtime's unit, or securityContext.capabilities.add [SYS_RESOURCE] on the broker's container. Podman: --ulimit \
     nofile=1048576:1048576. systemd: LimitNOFILE=1048576 in the broker's unit";

/// What to do if the file system has no file handles.
const OTHER_FILE_SYSTEM: &str =
    "share a directory of ext4, xfs, btrfs or tmpfs, which have file handles (overlayfs: mounted with nfs_export=on)";

/// No remedy is left.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Failure {
    /// What is exhausted.
    pub exhausted: Exhausted,
    /// Since when.
    pub since: Moment,
    /// What was tried, and what blocked it.
    pub message: String,
    /// What would help.
    pub remedy: String,
}

/// What is exhausted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Exhausted {
    /// The remedies.
    Remedies,
    /// The budget: as many remedies were started within an hour as the share allows.
    Budget,
}

/// The failure of a cause whose budget is exhausted.
pub(crate) fn over_budget(cause: Cause, policy: &Policy, now: Moment) -> Failure {
    let hours = BUDGET_SPAN.as_secs() / 3600;
    let remedy = match cause {
        Cause::SourceGone => {
            "something mounts or replaces the source repeatedly: find and stop it (mount units, an automounter, a script); \
             remedies continue when the hour has passed"
        }
        _ => {
            "see status for what was tried and with which outcome; remedies continue when the hour has passed, or sooner \
              with a larger spec.staleness.maxRemediesPerHour"
        }
    };
    Failure {
        exhausted: Exhausted::Budget,
        since: now,
        message: format!(
            "{cause:?} again after {} remedies within {hours} h, as many as spec.staleness.maxRemediesPerHour allows",
            policy.budget
        ),
        remedy: remedy.to_owned(),
    }
}

/// The failure of a cause without further remedies.
pub(crate) fn exhausted(
    cause: Cause,
    observation: &Observation<'_>,
    amendments: &[Amendment],
    tried: &[(Remedy, Blocker)],
    now: Moment,
) -> Failure {
    let (message, remedy) = match cause {
        Cause::FdExhausted if observation.sessions.iter().any(|session| session.full) => (
            "a guest holds as many inodes as it may".to_owned(),
            "raise spec.engine.maxInodes and have that VM connect restarted, or drop caches in the guest".to_owned(),
        ),
        Cause::FdExhausted => files(observation, amendments, tried),
        _ => (
            "a new engine did not help: file handles that guests hold still do not open".to_owned(),
            "see the paths in status and the log of the source's file system; a server that gives out new handles for \
             the same files (NFS after a restart) needs spec.engine.inodeFileHandles: Never"
                .to_owned(),
        ),
    };
    Failure { exhausted: Exhausted::Remedies, since: now, message, remedy }
}

/// Message and remedy for an engine without open files.
fn files(observation: &Observation<'_>, amendments: &[Amendment], tried: &[(Remedy, Blocker)]) -> (String, String) {
    let spent_on = |matches: fn(&Remedy) -> bool| {
        tried.iter().rev().find(|(remedy, _)| matches(remedy)).map(|(_, blocker)| blocker.clone())
    };
    let handles = spent_on(|remedy| *remedy == Remedy::FileHandles).or_else(|| unavailable(observation, amendments));
    let files = spent_on(|remedy| matches!(remedy, Remedy::OpenFiles { .. }));
    let caching = match observation.content {
        Content::Immutable => "guests cache for as long as they may",
        _ => "longer caching is for content that is Immutable",
    };
    let message = format!(
        "guests have no open files left. File handles: {}. Open files: {}. Beyond that, {caching}",
        handles.as_ref().map_or_else(|| "in use".to_owned(), describe),
        files.as_ref().map_or_else(|| format!("{} are allowed", observation.preflight.open_files), describe),
    );
    let remedies: Vec<&str> = match &handles {
        Some(Blocker::HandlesForbidden { .. }) => vec![GRANT_HANDLES, GRANT_FILES],
        Some(Blocker::NoHandles { .. }) => vec![OTHER_FILE_SYSTEM, GRANT_FILES],
        _ => vec![GRANT_FILES],
    };
    (message, remedies.join("; or "))
}

/// Why file handles are not used although the configuration requests them.
fn unavailable(observation: &Observation<'_>, amendments: &[Amendment]) -> Option<Blocker> {
    let asked_for = amended(observation.declared, amendments).inode_file_handles != InodeFileHandles::Never;
    let found = observation.sessions.iter().find_map(|session| session.preflight).unwrap_or(observation.preflight);
    (asked_for && found.inode_file_handles == InodeFileHandles::Never).then(|| handles(found))
}

fn describe(blocker: &Blocker) -> String {
    match blocker {
        Blocker::NoHandles { fs_type } => format!("{fs_type} has none"),
        Blocker::HandlesForbidden { fs_type } => {
            format!("{fs_type} has them, but opening by them is not permitted (CAP_DAC_READ_SEARCH is missing)")
        }
        Blocker::HardLimit { open_files } => format!("{open_files} is the hard limit"),
        Blocker::Ineffective => "in use, and the events continued".to_owned(),
        Blocker::Rejected(message) => format!("rejected ({message})"),
    }
}

/// What a person can do about a cause without automatic remedy, or with a policy that only reports.
///
/// Of `SourceReplaced` and `SourceRemoved` only violations of the declared content are reported.
pub fn advice_for(cause: Cause) -> &'static str {
    match cause {
        Cause::SourceReplaced | Cause::SourceRemoved => {
            "stop changing the source, or declare content: Shared. Guests see the new content after echo 2 > \
             /proc/sys/vm/drop_caches, or a new mount"
        }
        Cause::SourceHung => "check the source's file system or its server; the guest continues when it answers",
        Cause::SourceGone => "mount the source again, or let engines be replaced with spec.staleness.policy: Heal",
        Cause::FdExhausted => {
            "file handles (spec.engine.inodeFileHandles: Prefer), or a higher limit of open files; with \
             spec.staleness.policy: Heal both are tried automatically"
        }
        Cause::HandleStale => "replace the engines with virtiofsctl handover, or with spec.staleness.policy: Heal",
        Cause::Fenced => "nothing: the guest looks the path up again by itself",
    }
}
