//! Kernel file systems that are mounted below a source.
//!
//! A root file system often has `/proc`, `/sys` or `/dev` mounted in it. They would give a guest access to the host's
//! settings and devices, so they are not shared.

use std::path::Path;

use nix::mount::{MntFlags, umount2};
use virtiofs_contract::preflight::{Finding, Reason};

/// File system types of the kernel, as in mountinfo.
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

/// Most passes: several may be mounted on top of each other.
const ROUNDS: usize = 8;

/// True for a kernel file system.
pub(crate) fn is_kernel(fs_type: &str) -> bool {
    TYPES.contains(&fs_type)
}

/// Unmounts them in this mount namespace, whose root is the share. Returns their mount points, relative to the root.
///
/// `list` returns all mounts, as mount points and types.
pub(crate) fn hide<E>(mut list: impl FnMut() -> Result<Vec<(String, String)>, E>) -> Result<Vec<String>, E> {
    let mut hidden = Vec::new();
    for _ in 0..ROUNDS {
        let mut found: Vec<String> =
            list()?.into_iter().filter(|(_, kind)| is_kernel(kind)).map(|(at, _)| at).collect();
        found.retain(|at| at != "/");
        // Nested ones first.
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

/// The finding about kernel file systems that are hidden.
pub(crate) fn hidden(places: &[String]) -> Option<Finding> {
    (!places.is_empty()).then(|| {
        let message = format!("kernel file systems below the source are not shared: {}", list(places));
        finding(message)
    })
}

/// The finding about kernel file systems that could not be hidden.
pub(crate) fn in_view(places: &[String]) -> Option<Finding> {
    (!places.is_empty()).then(|| {
        finding(format!("kernel file systems below the source, which this sandbox cannot hide: {}", list(places)))
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
