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
    /// May a guest change what is below it, as it is declared?
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

impl Ground<'_> {
    /// Can a guest change what is below it, or will it?
    fn is_writable(&self) -> bool {
        self.writable || self.served == Served::Writable
    }

    fn holds(&self, other: &Ground<'_>) -> bool {
        self.share != other.share && self.path != other.path && other.path.starts_with(self.path)
    }
}

/// Why `ground` must not be served beside `others`, if so. `manifests` is where shares are declared, where that is
/// a directory: writing there is having any directory served.
pub(crate) fn conflict(ground: Ground<'_>, others: &[Ground<'_>], manifests: Option<&Path>) -> Option<Finding> {
    if let Some(manifests) = manifests.filter(|manifests| ground.writable && overlap(ground.path, manifests)) {
        let why = format!("is writable and overlaps {}, where shares are declared", manifests.display());
        return Some(forbidden(ground, &why));
    }
    let within = |outer: &&Ground<'_>| outer.is_writable() && outer.holds(&ground);
    if let Some(outer) = others.iter().filter(within).find(|outer| comes_after(&ground, outer)) {
        let why = format!("lies inside the writable share {} ({})", outer.share, outer.path.display());
        return Some(forbidden(ground, &why));
    }
    let around = |inner: &&Ground<'_>| ground.writable && ground.holds(inner);
    let inner = others.iter().filter(around).find(|inner| !comes_after(inner, &ground))?;
    let why = format!("is writable and holds share {} ({}), which is served", inner.share, inner.path.display());
    Some(forbidden(ground, &why))
}

/// Of a share and a writable one around it, is it the inner one that must not be? That which is served already stays;
/// where neither is, or both are, the inner one is at fault.
fn comes_after(inner: &Ground<'_>, outer: &Ground<'_>) -> bool {
    inner.served == Served::Not || outer.served == Served::Writable
}

fn overlap(a: &Path, b: &Path) -> bool {
    a.starts_with(b) || b.starts_with(a)
}

fn forbidden(ground: Ground<'_>, why: &str) -> Finding {
    Finding {
        reason: Reason::SourceForbidden,
        message: format!("{} {why}", ground.path.display()),
        remedy: "share directories apart from each other, or make the outer share ReadOnly".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ground<'a>(share: &'a str, path: &'a str, writable: bool) -> Ground<'a> {
        Ground { share, path: Path::new(path), writable, served: Served::Not }
    }

    #[test]
    fn of_an_inner_and_a_writable_outer_share_the_one_that_is_served_stays() {
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
            let inner = Ground { served: inner, ..ground("inner", "/srv/data/x", false) };
            let outer = Ground { served: outer, ..ground("outer", "/srv/data", declared_writable) };
            let all = [inner, outer];
            let refused = all.map(|it| conflict(it, &all, None).is_some());
            assert_eq!(refused, [inner_refused, outer_refused], "{all:?}");
        }
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
