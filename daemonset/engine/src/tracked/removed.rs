//! Files that another process removed from the host while the guest's kernel still has a name for them.
//!
//! Such a file can often still be opened: by the library's `O_PATH` descriptor (`inodeFileHandles: Never`), or by its
//! file handle while any process of the host has it open. What the guest then writes is lost when the file is closed.
//! `ESTALE` makes the guest's kernel look the name up again and repeat the call on what it finds: `do_filp_open`
//! retries an open with `LOOKUP_REVAL`, and `retry_estale` does the same for truncate, chmod, chown, utimensat,
//! setxattr, removexattr and link.
//!
//! | operation | checked | reason |
//! |---|---|---|
//! | OPEN | yes, for reading too | content is consistent from close to open, and a lost write must not succeed |
//! | SETATTR without a handle, SETXATTR, REMOVEXATTR, LINK | yes | the change would be lost with the file |
//! | GETATTR, READLINK, GETXATTR, LISTXATTR, ACCESS | no | nothing is lost, and a guest may hold the node without an open handle (`O_PATH`, working directory) |
//! | operations on a handle | no | the guest has the file open |
//! | CREATE, UNLINK, RENAME | no | they act on the name as it is on the host now |
//!
//! Only regular files are checked: a removed directory stays usable as a working directory, and the guest's kernel
//! opens FIFOs, sockets and devices without the file server.

use std::io;

use rustix::fs::{AtFlags, StatxFlags, statx};
use virtiofsd::filesystem::FileSystem;

use crate::ledger::Slot;

use super::state::{Live, State};
use super::{Tracked, error, ourselves};

/// What was asked of a file that may have been removed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Request {
    /// OPEN, by this process of the guest.
    Open(libc::pid_t),
    /// A change of the file by its node.
    Change,
}

impl<F: FileSystem> Tracked<F> {
    /// Refuses to change a file by its node if another process removed it.
    ///
    /// # Errors
    /// `ESTALE` if the file has no link left, and the guest neither removed it itself nor has it open; else what the
    /// library answers when it cannot reach the file.
    pub(super) fn require_linked(&self, state: &mut State, node: Slot, inode: u64) -> io::Result<()> {
        self.require(state, node, inode, Request::Change)
    }

    /// Refuses to open a file that another process removed, before an open with `O_TRUNC` empties it.
    ///
    /// # Errors
    /// As [`Tracked::require_linked`]; also `ESTALE` the first time a process asks although the guest has it open.
    pub(super) fn require_linked_to_open(
        &self,
        state: &mut State,
        node: Slot,
        inode: u64,
        pid: libc::pid_t,
    ) -> io::Result<()> {
        self.require(state, node, inode, Request::Open(pid))
    }

    /// The same, for a file that the library has just opened.
    pub(super) fn require_opened_linked(
        &self,
        state: &mut State,
        node: Slot,
        opened: &Live,
        pid: libc::pid_t,
    ) -> io::Result<()> {
        let (links, mode) = self.with_file(opened, |file| {
            let found = statx(file, c"", AtFlags::EMPTY_PATH, StatxFlags::NLINK | StatxFlags::TYPE)?;
            Ok((found.stx_nlink, found.stx_mode.into()))
        })?;
        self.refuse_removed(state, node, (links, mode), Request::Open(pid))
    }

    fn require(&self, state: &mut State, node: Slot, inode: u64, request: Request) -> io::Result<()> {
        let found = self.inner.getattr(ourselves(), inode.into(), None);
        let (attr, _) = found.inspect_err(|error| self.node_refused(state, node, error))?;
        self.refuse_removed(state, node, (attr.nlink, attr.mode), request)
    }

    fn refuse_removed(
        &self,
        state: &mut State,
        node: Slot,
        (links, mode): (u32, u32),
        request: Request,
    ) -> io::Result<()> {
        if links > 0 || mode & libc::S_IFMT != libc::S_IFREG || self.may_use_without_link(state, node, request) {
            return Ok(());
        }
        // Some file systems do not count links.
        if self.has_name(state, node) {
            return Ok(());
        }
        self.park_removed(state, node);
        Err(error(libc::ESTALE))
    }

    /// True if the guest may use a file without links: it removed the last name itself, or has it open.
    ///
    /// An open file can be opened again without a name (`/proc/self/fd`), but a guest process may also come by a
    /// cached name, and its write would be lost. Which one it is shows after `ESTALE`: by a name the kernel sends
    /// LOOKUP and then opens another node; without one the same process asks for this node again.
    fn may_use_without_link(&self, state: &mut State, node: Slot, request: Request) -> bool {
        let removed_by_guest = state.bindings.is_unlinked(node) && state.ledger.names(node).is_empty();
        if removed_by_guest {
            return true;
        }
        let open = !state.ledger.handles_of(node).is_empty();
        match request {
            Request::Change => open,
            Request::Open(pid) => open && state.bindings.refuse_once(node, pid),
        }
    }
}
