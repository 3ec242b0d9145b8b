//! Which sources must not be served because of where they are.
//!
//! Whoever may write to a directory decides what is found below it: a guest with a writable share could
//! plant a symbolic link where another share's source begins, or a manifest where the agent reads its own.

use std::path::{Path, PathBuf};

use virtiofs_contract::preflight::{Finding, Reason};

/// A source as far as overlapping is concerned.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Place<'a> {
    /// Name of the share.
    pub(crate) share: &'a str,
    /// Canonical path.
    pub(crate) path: &'a Path,
    /// May a guest change what is below it?
    pub(crate) writable: bool,
}

/// Directories of the agent's own.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Own {
    /// Holds sockets: reaching one is reaching a share.
    pub(crate) runtime_dir: PathBuf,
    /// Holds manifests: writing one is serving any directory. None where they come from elsewhere.
    pub(crate) manifests: Option<PathBuf>,
}

/// Directories of the kernel's.
const KERNEL: [&str; 3] = ["/proc", "/sys", "/dev"];

/// Why `place` must not be served beside `others`, if so.
pub(crate) fn conflict(place: Place<'_>, others: &[Place<'_>], own: &Own) -> Option<Finding> {
    if let Some(kernel) = KERNEL.iter().find(|kernel| overlap(place.path, Path::new(kernel))) {
        return Some(forbidden(place, &format!("overlaps {kernel}, which the kernel makes up")));
    }
    if overlap(place.path, &own.runtime_dir) {
        return Some(forbidden(place, &format!("overlaps the runtime directory {}", own.runtime_dir.display())));
    }
    if let Some(manifests) = own.manifests.as_deref()
        && place.writable
        && overlap(place.path, manifests)
    {
        let why = format!("is writable and overlaps {}, where shares are declared", manifests.display());
        return Some(forbidden(place, &why));
    }
    let outer = others.iter().find(|other| {
        other.share != place.share && other.writable && other.path != place.path && place.path.starts_with(other.path)
    })?;
    Some(forbidden(place, &format!("lies inside the writable share {} ({})", outer.share, outer.path.display())))
}

fn overlap(a: &Path, b: &Path) -> bool {
    a.starts_with(b) || b.starts_with(a)
}

fn forbidden(place: Place<'_>, why: &str) -> Finding {
    Finding {
        reason: Reason::SourceForbidden,
        message: format!("{} {why}", place.path.display()),
        remedy: "share a directory apart from it, or make the outer share ReadOnly".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn place<'a>(share: &'a str, path: &'a str, writable: bool) -> Place<'a> {
        Place { share, path: Path::new(path), writable }
    }

    fn own() -> Own {
        Own { runtime_dir: "/run/virtiofs".into(), manifests: Some("/etc/virtiofs/shares".into()) }
    }

    #[test]
    fn what_may_be_served_beside_what() {
        let rw_data = place("data", "/srv/data", true);
        let ro_data = place("data", "/srv/data", false);
        for (inner, outer, refused) in [
            (place("x", "/srv/data/x", false), rw_data, true),
            (place("x", "/srv/data/x", true), rw_data, true),
            (place("x", "/srv/data/x", true), ro_data, false),
            (place("x", "/srv/data", false), rw_data, false),
            (place("x", "/srv/database", true), rw_data, false),
            (place("x", "/srv", true), rw_data, false),
        ] {
            let finding = conflict(inner, &[inner, outer], &own());
            assert_eq!(finding.is_some(), refused, "{inner:?} beside {outer:?}: {finding:?}");
        }
    }

    #[test]
    fn places_that_are_never_served() {
        for (path, writable, refused) in [
            ("/", false, true),
            ("/proc/1", false, true),
            ("/dev/shm", true, true),
            ("/run", false, true),
            ("/run/virtiofs/shares", false, true),
            ("/run/user", false, false),
            ("/etc", true, true),
            ("/etc", false, false),
            ("/etc/virtiofs/shares/below", true, true),
            ("/processes", true, false),
        ] {
            assert_eq!(conflict(place("x", path, writable), &[], &own()).is_some(), refused, "{path}");
        }
    }
}
