//! File systems of the kernel that are mounted below a source.
//!
//! A directory that programs are run in often has `/proc`, `/sys` or `/dev` mounted in it. Served, they would give a
//! guest the host's settings and devices; so they are no part of a share.

use std::path::Path;

use nix::mount::{MntFlags, umount2};
use virtiofs_contract::preflight::{Finding, Reason};

/// Types by which the kernel shows itself, as mountinfo names them.
const TYPES: [&str; 17] = [
    "proc",
    "sysfs",
    "devtmpfs",
    "devpts",
    "cgroup",
    "cgroup2",
    "debugfs",
    "tracefs",
    "securityfs",
    "selinuxfs",
    "bpf",
    "configfs",
    "efivarfs",
    "pstore",
    "mqueue",
    "fusectl",
    "binfmt_misc",
];

/// How often it is looked again: one may lie below another at the same place.
const ROUNDS: usize = 8;

/// Is this a file system of the kernel?
pub(crate) fn is_kernel(fs_type: &str) -> bool {
    TYPES.contains(&fs_type)
}

/// Takes them away in this mount namespace, whose root is the share. Returns where they were, relative to it.
///
/// `list` says which mounts there are, as mount points and types.
pub(crate) fn hide<E>(mut list: impl FnMut() -> Result<Vec<(String, String)>, E>) -> Result<Vec<String>, E> {
    let mut hidden = Vec::new();
    for _ in 0..ROUNDS {
        let mut found: Vec<String> =
            list()?.into_iter().filter(|(_, kind)| is_kernel(kind)).map(|(at, _)| at).collect();
        found.retain(|at| at != "/");
        // Those below another first.
        found.sort_by_key(|at| std::cmp::Reverse(at.len()));
        let flags = MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW;
        let taken: Vec<String> = found.into_iter().filter(|at| umount2(Path::new(at), flags).is_ok()).collect();
        if taken.is_empty() {
            break;
        }
        hidden.extend(taken.into_iter().map(|at| at.trim_start_matches('/').to_owned()));
    }
    hidden.sort();
    hidden.dedup();
    Ok(hidden)
}

/// What is said of those that are hidden.
pub(crate) fn hidden(places: &[String]) -> Option<Finding> {
    (!places.is_empty()).then(|| {
        let message =
            format!("below the source, {} hold file systems of the kernel, which are not shared", list(places));
        finding(message)
    })
}

/// What is said of those that could not be.
pub(crate) fn in_view(places: &[String]) -> Option<Finding> {
    (!places.is_empty()).then(|| {
        finding(format!(
            "below the source, {} hold file systems of the kernel, which this sandbox cannot hide",
            list(places)
        ))
    })
}

fn list(places: &[String]) -> String {
    const MOST: usize = 8;
    let mut text = places.iter().take(MOST).map(String::as_str).collect::<Vec<_>>().join(", ");
    if places.len() > MOST {
        text.push_str(&format!(" and {} more", places.len() - MOST));
    }
    text
}

fn finding(message: String) -> Finding {
    Finding {
        reason: Reason::SourceForbidden,
        message,
        remedy: "unmount them, or share a directory without them".into(),
    }
}
