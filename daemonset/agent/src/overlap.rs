//! Which sources must not be served because of what else is served or declared there. What no share may touch
//! whatever is declared, such as `/proc`, the broker refuses itself.
//!
//! Whoever may write to a directory decides what is found below it: a guest with a writable share could
//! plant a symbolic link where another share's source begins, or a manifest where the agent reads its own.

use std::path::Path;

use virtiofs_contract::preflight::{Finding, Reason};

/// A source as far as overlapping is concerned.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Ground<'a> {
    /// Name of the share.
    pub(crate) share: &'a str,
    /// Canonical path.
    pub(crate) path: &'a Path,
    /// May a guest change what is below it?
    pub(crate) writable: bool,
}

/// Why `ground` must not be served beside `others`, if so. `manifests` is where shares are declared, where that is
/// a directory: writing there is having any directory served.
pub(crate) fn conflict(ground: Ground<'_>, others: &[Ground<'_>], manifests: Option<&Path>) -> Option<Finding> {
    if let Some(manifests) = manifests.filter(|manifests| ground.writable && overlap(ground.path, manifests)) {
        let why = format!("is writable and overlaps {}, where shares are declared", manifests.display());
        return Some(forbidden(ground, &why));
    }
    let outer = others.iter().find(|other| {
        other.share != ground.share
            && other.writable
            && other.path != ground.path
            && ground.path.starts_with(other.path)
    })?;
    Some(forbidden(ground, &format!("lies inside the writable share {} ({})", outer.share, outer.path.display())))
}

fn overlap(a: &Path, b: &Path) -> bool {
    a.starts_with(b) || b.starts_with(a)
}

fn forbidden(ground: Ground<'_>, why: &str) -> Finding {
    Finding {
        reason: Reason::SourceForbidden,
        message: format!("{} {why}", ground.path.display()),
        remedy: "share a directory apart from it, or make the outer share ReadOnly".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ground<'a>(share: &'a str, path: &'a str, writable: bool) -> Ground<'a> {
        Ground { share, path: Path::new(path), writable }
    }

    #[test]
    fn what_may_be_served_beside_what() {
        let rw_data = ground("data", "/srv/data", true);
        let ro_data = ground("data", "/srv/data", false);
        for (inner, outer, refused) in [
            (ground("x", "/srv/data/x", false), rw_data, true),
            (ground("x", "/srv/data/x", true), rw_data, true),
            (ground("x", "/srv/data/x", true), ro_data, false),
            (ground("x", "/srv/data", false), rw_data, false),
            (ground("x", "/srv/database", true), rw_data, false),
            (ground("x", "/srv", true), rw_data, false),
        ] {
            let finding = conflict(inner, &[inner, outer], None);
            assert_eq!(finding.is_some(), refused, "{inner:?} beside {outer:?}: {finding:?}");
        }
    }

    #[test]
    fn no_guest_may_write_where_shares_are_declared() {
        let manifests = Path::new("/etc/virtiofs/shares");
        for (path, writable, refused) in [
            ("/etc", true, true),
            ("/etc", false, false),
            ("/etc/virtiofs/shares", true, true),
            ("/etc/virtiofs/shares/below", true, true),
            ("/etc/virtiofs/shares-too", true, false),
        ] {
            assert_eq!(conflict(ground("x", path, writable), &[], Some(manifests)).is_some(), refused, "{path}");
        }
    }
}
