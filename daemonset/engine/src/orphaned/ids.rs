//! User and group ids, between guest and host.

use std::io;

use virtiofsd::fuse::Attr;
use virtiofsd::passthrough::Config;
use virtiofsd::soft_idmap::{GuestGid, GuestUid, HostGid, HostUid, Id, IdMap};

/// The library's id maps, built from its own rules.
pub(super) struct Ids {
    uids: IdMap<GuestUid, HostUid>,
    gids: IdMap<GuestGid, HostGid>,
}

impl Ids {
    /// # Errors
    /// If rules overlap.
    pub(super) fn new(library: &Config) -> io::Result<Self> {
        Ok(Ids {
            uids: library.uid_map.clone().unwrap_or_default().try_into()?,
            gids: library.gid_map.clone().unwrap_or_default().try_into()?,
        })
    }

    /// The host's id of a guest's user.
    pub(super) fn host_uid(&self, uid: GuestUid) -> io::Result<u32> {
        Ok(self.uids.map_guest(uid)?.into_inner())
    }

    /// The host's id of a guest's group.
    pub(super) fn host_gid(&self, gid: GuestGid) -> io::Result<u32> {
        Ok(self.gids.map_guest(gid)?.into_inner())
    }

    /// Attributes with the guest's ids.
    pub(super) fn attributes(&self, stat: libc::stat64) -> io::Result<Attr> {
        Attr::try_from_stat64(stat, |uid| Ok(self.uids.map_host(uid)?), |gid| Ok(self.gids.map_host(gid)?))
    }
}
