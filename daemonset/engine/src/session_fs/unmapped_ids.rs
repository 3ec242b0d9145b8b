//! Errors of requests that name users and groups that this engine cannot act for.

use std::io;

use virtiofsd::filesystem::{Context, FileSystem, SetattrValid};
use virtiofsd::fuse::SetattrIn;
use virtiofsd::soft_idmap::{GuestGid, GuestUid};

use super::SessionFs;
use super::errors::{errno, error};

impl<F: FileSystem> SessionFs<F> {
    /// The error of an operation that was to create a file as the guest's user.
    pub(super) fn creation_failed(&self, ctx: Context, failed: io::Error) -> io::Error {
        self.ids_failed(Some(ctx.uid), Some(ctx.gid), failed)
    }

    /// The error of a SETATTR.
    pub(super) fn setattr_failed(&self, attr: &SetattrIn, valid: SetattrValid, failed: io::Error) -> io::Error {
        let uid = valid.contains(SetattrValid::UID).then_some(attr.uid);
        let gid = valid.contains(SetattrValid::GID).then_some(attr.gid);
        self.ids_failed(uid, gid, failed)
    }

    fn ids_failed(&self, uid: Option<GuestUid>, gid: Option<GuestGid>, failed: io::Error) -> io::Error {
        let user = uid.and_then(|uid| self.orphaned.host_uid(uid));
        let group = gid.and_then(|gid| self.orphaned.host_gid(gid));
        let unmapped = user.is_some_and(|uid| !self.mapped_ids.has_user(uid))
            || group.is_some_and(|gid| !self.mapped_ids.has_group(gid));
        if unmapped && errno(&failed) == libc::EINVAL { error(libc::EPERM) } else { failed }
    }
}
