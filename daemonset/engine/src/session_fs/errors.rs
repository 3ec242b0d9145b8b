//! Error numbers, and the identity under which the engine makes requests of its own.

use std::io;

use virtiofsd::filesystem::Context;
use virtiofsd::soft_idmap::{GuestGid, GuestUid};

use crate::ledger::Full;

/// The caller of lookups that the engine makes for itself.
pub(super) fn engine_context() -> Context {
    Context { uid: GuestUid::from(0), gid: GuestGid::from(0), pid: 0 }
}

/// `ENFILE`: the ledger has no room, or the guest holds as much as it may.
pub(super) fn ledger_full(_: Full) -> io::Error {
    error(libc::ENFILE)
}

/// The error with this number.
pub(super) fn error(errno: i32) -> io::Error {
    io::Error::from_raw_os_error(errno)
}

/// The number of an error; `EIO` where it has none.
pub(super) fn errno(error: &io::Error) -> i32 {
    error.raw_os_error().unwrap_or(libc::EIO)
}

/// True for errors that say that a name does not lead to the node any more. Others say nothing about the node.
pub(super) fn is_missing(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ENOTDIR | libc::ESTALE | libc::ELOOP))
}
