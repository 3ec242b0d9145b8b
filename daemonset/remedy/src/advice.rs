//! What somebody has to do where no remedy of ours helps.

use serde::{Deserialize, Serialize};

use crate::history::Amendment;
use crate::ladder::{Obstacle, amended, handles};
use crate::policy::BUDGET_SPAN;
use crate::{Cause, Content, Moment, Observation, Policy, Rung};
use virtiofs_config::InodeFileHandles;

/// How file handles are made possible, where it is for want of a capability that they are not.
const GRANT_HANDLES: &str = "give the broker CAP_DAC_READ_SEARCH in the initial user namespace. Kubernetes: \
     securityContext.capabilities.add [DAC_READ_SEARCH] on its container, without hostUsers: false, and no seccomp \
     profile that forbids name_to_handle_at. Podman: as root, --cap-add dac_read_search, without --userns. systemd: \
     CAP_DAC_READ_SEARCH in CapabilityBoundingSet= and, unless it runs as root, AmbientCapabilities=, without \
     PrivateUsers=";

/// How the limit of open files is raised.
const GRANT_FILES: &str = "raise the broker's hard limit of open files. Kubernetes: LimitNOFILE= of the container \
     runtime's unit, or securityContext.capabilities.add [SYS_RESOURCE] on the broker's container. Podman: --ulimit \
     nofile=1048576:1048576. systemd: LimitNOFILE=1048576 in the broker's unit";

/// Another file system, where this one makes no file handles.
const OTHER_FILE_SYSTEM: &str =
    "share a directory of ext4, xfs, btrfs or tmpfs, which have file handles (overlayfs: mounted with nfs_export=on)";

/// No remedy is left.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Failure {
    /// Of what there was no more.
    pub end: End,
    /// Since when.
    pub since: Moment,
    /// What was tried, and what stood in the way.
    pub message: String,
    /// What would help.
    pub remedy: String,
}

/// Of what there is no more.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum End {
    /// Of remedies.
    Ladder,
    /// Of the budget: as many remedies were begun within an hour as the share allows.
    Budget,
}

/// The budget is spent.
pub(crate) fn budget(cause: Cause, policy: &Policy, now: Moment) -> Failure {
    let hours = BUDGET_SPAN.as_secs() / 3600;
    let remedy = match cause {
        Cause::SourceGone => {
            "something mounts or replaces the source again and again: find and stop it (mount units, an automounter, a \
             script); it is cured again when the hour has passed"
        }
        _ => {
            "see status for what was tried and what became of it; it goes on when the hour has passed, or sooner with \
              a larger spec.staleness.maxRemediesPerHour"
        }
    };
    Failure {
        end: End::Budget,
        since: now,
        message: format!(
            "{cause:?} again after {} remedies within {hours} h, as many as spec.staleness.maxRemediesPerHour allows",
            policy.budget
        ),
        remedy: remedy.to_owned(),
    }
}

/// The ladder has ended.
pub(crate) fn ladder(
    cause: Cause,
    seen: &Observation<'_>,
    amendments: &[Amendment],
    spent: &[(Rung, Obstacle)],
    now: Moment,
) -> Failure {
    let (message, remedy) = match cause {
        Cause::FdExhausted if seen.sessions.iter().any(|session| session.full) => (
            "a guest holds as many inodes as it may".to_owned(),
            "raise spec.engine.maxInodes and have that VM connect anew, or drop caches in the guest".to_owned(),
        ),
        Cause::FdExhausted => files(seen, amendments, spent),
        _ => (
            "another engine did not help: file handles that guests hold still do not open".to_owned(),
            "see the paths in status and the log of the source's file system; a server that gives out new handles for \
             the same files (NFS after a restart) needs spec.engine.inodeFileHandles: Never"
                .to_owned(),
        ),
    };
    Failure { end: End::Ladder, since: now, message, remedy }
}

/// Of an engine that is out of open files.
fn files(seen: &Observation<'_>, amendments: &[Amendment], spent: &[(Rung, Obstacle)]) -> (String, String) {
    let spent_on = |matches: fn(&Rung) -> bool| {
        spent.iter().rev().find(|(rung, _)| matches(rung)).map(|(_, obstacle)| obstacle.clone())
    };
    let handles = spent_on(|rung| *rung == Rung::FileHandles).or_else(|| unavailable(seen, amendments));
    let files = spent_on(|rung| matches!(rung, Rung::OpenFiles { .. }));
    let caching = match seen.content {
        Content::Immutable => "guests cache for as long as they may",
        _ => "longer caching is for content that is Immutable",
    };
    let message = format!(
        "guests run out of open files. File handles: {}. Open files: {}. Beyond that, {caching}",
        handles.as_ref().map_or_else(|| "in use".to_owned(), told),
        files.as_ref().map_or_else(|| format!("{} are allowed", seen.preflight.open_files), told),
    );
    let remedies: Vec<&str> = match &handles {
        Some(Obstacle::HandlesForbidden { .. }) => vec![GRANT_HANDLES, GRANT_FILES],
        Some(Obstacle::NoHandles { .. }) => vec![OTHER_FILE_SYSTEM, GRANT_FILES],
        _ => vec![GRANT_FILES],
    };
    (message, remedies.join("; or "))
}

/// Why file handles are not in use although the configuration asks for them.
fn unavailable(seen: &Observation<'_>, amendments: &[Amendment]) -> Option<Obstacle> {
    let asked_for = amended(seen.declared, amendments).inode_file_handles != InodeFileHandles::Never;
    let found = seen.sessions.iter().find_map(|session| session.preflight).unwrap_or(seen.preflight);
    (asked_for && found.inode_file_handles == InodeFileHandles::Never).then(|| handles(found))
}

fn told(obstacle: &Obstacle) -> String {
    match obstacle {
        Obstacle::NoHandles { fs_type } => format!("{fs_type} makes none"),
        Obstacle::HandlesForbidden { fs_type } => {
            format!("{fs_type} makes them, and opening by them is not permitted (CAP_DAC_READ_SEARCH is missing)")
        }
        Obstacle::HardLimit { open_files } => format!("{open_files} is the hard limit"),
        Obstacle::NotHelped => "in use, and it went on".to_owned(),
        Obstacle::Refused(words) => format!("refused ({words})"),
    }
}

/// What is to be done about a cause that has no remedy of ours, or with a policy that leaves it to people.
pub fn whose(cause: Cause, content: Content) -> &'static str {
    match cause {
        Cause::SourceReplaced | Cause::SourceRemoved if content != Content::Shared => {
            "whoever changes the source has to stop, or the share has to say so: content: Shared. Guests see the new \
             content after echo 2 > /proc/sys/vm/drop_caches, or a new mount"
        }
        Cause::SourceReplaced | Cause::SourceRemoved => {
            "guests with overlayfs on the share do not bear that: give them content that nobody changes; others see the \
             new content by themselves"
        }
        Cause::SourceHung => "see to the source's file system or its server; the guest goes on when that answers",
        Cause::SourceGone => "mount the source again, or have engines exchanged with spec.staleness.policy: Heal",
        Cause::FdExhausted => {
            "file handles (spec.engine.inodeFileHandles: Prefer), or a higher limit of open files; with \
             spec.staleness.policy: Heal that is tried by itself"
        }
        Cause::HandleStale => "have engines exchanged, by hand or with spec.staleness.policy: Heal",
        Cause::Fenced => "nothing: the guest walks again by itself",
    }
}
