//! Sources that must not be served because of other shares. Paths that no share may use, such as `/proc`, the broker
//! rejects itself.
//!
//! A guest with a writable share could create a symbolic link in place of another share's source below it, or a manifest
//! where the agent reads manifests.

use std::path::Path;

use virtiofs_contract::preflight::{Finding, Reason};

/// A source as far as overlap is concerned.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Extent<'a> {
    /// Name of the share.
    pub(crate) share: &'a str,
    /// Canonical path.
    pub(crate) path: &'a Path,
    /// True if the declaration lets guests write.
    pub(crate) writable: bool,
    /// How it is served, or about to be.
    pub(crate) served: Served,
}

/// How a share is served.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Served {
    Not,
    ReadOnly,
    Writable,
}

impl Extent<'_> {
    /// True if guests can write to it, or will.
    fn is_writable(&self) -> bool {
        self.writable || self.served == Served::Writable
    }

    fn contains(&self, other: &Extent<'_>) -> bool {
        self.share != other.share && self.path != other.path && other.path.starts_with(self.path)
    }
}

/// Why `extent` must not be served next to `others`, if so. Whoever can write to the directory of `manifests` can have
/// any directory served.
pub(crate) fn conflict(extent: Extent<'_>, others: &[Extent<'_>], manifests: Option<&Path>) -> Option<Finding> {
    if let Some(manifests) = manifests.filter(|manifests| extent.writable && overlap(extent.path, manifests)) {
        let why = format!("is writable and overlaps {}, where shares are declared", manifests.display());
        return Some(forbidden(extent, &why));
    }
    let within = |outer: &&Extent<'_>| outer.is_writable() && outer.contains(&extent);
    if let Some(outer) = others.iter().filter(within).find(|outer| comes_after(&extent, outer)) {
        let why = format!("lies inside the writable share {} ({})", outer.share, outer.path.display());
        return Some(forbidden(extent, &why));
    }
    let around = |inner: &&Extent<'_>| extent.writable && extent.contains(inner);
    let inner = others.iter().filter(around).find(|inner| !comes_after(inner, &extent))?;
    let why = format!("is writable and holds share {} ({}), which is served", inner.share, inner.path.display());
    Some(forbidden(extent, &why))
}

/// True if the inner share, not the writable one around it, must not be served. A share that is served already stays; if
/// neither or both are, the inner one is rejected.
fn comes_after(inner: &Extent<'_>, outer: &Extent<'_>) -> bool {
    inner.served == Served::Not || outer.served == Served::Writable
}

fn overlap(a: &Path, b: &Path) -> bool {
    a.starts_with(b) || b.starts_with(a)
}

fn forbidden(extent: Extent<'_>, why: &str) -> Finding {
    Finding {
        reason: Reason::SourceForbidden,
        message: format!("{} {why}", extent.path.display()),
        remedy: "share separate directories, or make the outer share ReadOnly".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn extent<'a>(share: &'a str, path: &'a str, writable: bool) -> Extent<'a> {
        Extent { share, path: Path::new(path), writable, served: Served::Not }
    }

    #[test]
    fn the_share_that_is_served_already_stays() {
        use Served::{Not, ReadOnly, Writable};
        for (inner, outer, declared_writable, inner_refused, outer_refused) in [
            (Not, Not, true, true, false),
            (Not, Writable, true, true, false),
            (ReadOnly, Not, true, false, true),
            (Writable, Not, true, false, true),
            // Edited from ReadOnly to ReadWrite, and back.
            (ReadOnly, ReadOnly, true, false, true),
            (Not, Writable, false, true, false),
            (ReadOnly, Not, false, false, false),
            // As an earlier agent left them.
            (ReadOnly, Writable, true, true, false),
        ] {
            let inner = Extent { served: inner, ..extent("inner", "/srv/data/x", false) };
            let outer = Extent { served: outer, ..extent("outer", "/srv/data", declared_writable) };
            let all = [inner, outer];
            let refused = all.map(|it| conflict(it, &all, None).is_some());
            assert_eq!(refused, [inner_refused, outer_refused], "{all:?}");
        }
    }

    #[test]
    fn a_share_inside_a_writable_one_is_rejected() {
        let rw_data = extent("data", "/srv/data", true);
        let ro_data = extent("data", "/srv/data", false);
        for (inner, outer, refused) in [
            (extent("x", "/srv/data/x", false), rw_data, true),
            (extent("x", "/srv/data/x", true), rw_data, true),
            (extent("x", "/srv/data/x", true), ro_data, false),
            (extent("x", "/srv/data", false), rw_data, false),
            (extent("x", "/srv/database", true), rw_data, false),
            (extent("x", "/srv", true), rw_data, false),
        ] {
            let finding = conflict(inner, &[inner, outer], None);
            assert_eq!(finding.is_some(), refused, "{inner:?} beside {outer:?}: {finding:?}");
        }
    }

    #[test]
    fn no_guest_may_write_to_the_manifests() {
        let manifests = Path::new("/etc/virtiofs/shares");
        for (path, writable, refused) in [
            ("/etc", true, true),
            ("/etc", false, false),
            ("/etc/virtiofs/shares", true, true),
            ("/etc/virtiofs/shares/below", true, true),
            ("/etc/virtiofs/shares-too", true, false),
        ] {
            assert_eq!(conflict(extent("x", path, writable), &[], Some(manifests)).is_some(), refused, "{path}");
        }
    }
}
