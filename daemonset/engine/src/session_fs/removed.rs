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
//! An OPEN or a change that follows the LOOKUP of the same path walk is not refused: the name led to the file when it was
//! looked up, which is all that a local file system promises, and where files are replaced at a high rate a second
//! `ESTALE` would reach the program ([`super::recent_lookups`]).
//!
//! The same holds in an engine that has taken over: a file that only the fd stash or its file handle leads to is opened for
//! a thread that asks twice.
//!
//! Only regular files are checked: a removed directory stays usable as a working directory, and the guest's kernel
//! opens FIFOs, sockets and devices without the file server.

use std::io;

use rustix::fs::{AtFlags, StatxFlags, statx};
use virtiofsd::filesystem::FileSystem;

use crate::ledger::Slot;

use super::SessionFs;
use super::errors::{engine_context, error};
use super::handles::OpenFile;
use super::nodes::SAME_WALK;
use super::request::RequestContext;
use super::state::State;

/// What a request wants of a file that may have been removed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Use {
    /// To open it, for this thread of the guest, which has not just looked it up.
    Open(libc::pid_t),
    /// To change it by its node, for this thread of the guest.
    Change(libc::pid_t),
}

impl<F: FileSystem> SessionFs<F> {
    /// Refuses to change a file by its node if another process removed it.
    ///
    /// # Errors
    /// `ESTALE` if the file has no link left, and the guest neither removed it itself, nor has it open, nor has just looked
    /// it up; else the error of the library if it cannot reach the file.
    pub(super) fn require_linked(
        &self,
        state: &mut State,
        request: RequestContext,
        (node, inode): (Slot, u64),
        pid: libc::pid_t,
    ) -> io::Result<()> {
        self.require(state, request, (node, inode), Use::Change(pid))
    }

    /// Refuses to open a file that another process removed, before an open with `O_TRUNC` empties it. Not for an OPEN that
    /// follows the LOOKUP of the same path walk, which is never refused.
    ///
    /// # Errors
    /// As [`SessionFs::require_linked`]; also `ESTALE` for the first OPEN of a thread although the guest has the file open.
    pub(super) fn require_linked_to_open(
        &self,
        state: &mut State,
        request: RequestContext,
        (node, inode): (Slot, u64),
        pid: libc::pid_t,
    ) -> io::Result<()> {
        self.require(state, request, (node, inode), Use::Open(pid))
    }

    /// The same, for a file that the library has just opened.
    pub(super) fn require_opened_linked(
        &self,
        state: &mut State,
        request: RequestContext,
        node: Slot,
        opened: &OpenFile,
        pid: libc::pid_t,
    ) -> io::Result<()> {
        let (links, mode) = self.with_file(opened, |file| {
            let found = statx(file, c"", AtFlags::EMPTY_PATH, StatxFlags::NLINK | StatxFlags::TYPE)?;
            Ok((found.stx_nlink, found.stx_mode.into()))
        })?;
        self.refuse_removed(state, request, node, (links, mode), Use::Open(pid))
    }

    /// Refuses to open a file that no name leads to, for a thread that may come by a cached name. The engine that saw the
    /// guest remove the file, if it did, may have been another one.
    ///
    /// # Errors
    /// `ESTALE` for the first OPEN of a thread.
    pub(super) fn require_no_name(&self, state: &mut State, node: Slot, pid: libc::pid_t) -> io::Result<()> {
        self.may_use_without_link(state, node, Use::Open(pid)).then_some(()).ok_or_else(|| error(libc::ESTALE))
    }

    fn require(
        &self,
        state: &mut State,
        request: RequestContext,
        (node, inode): (Slot, u64),
        wanted: Use,
    ) -> io::Result<()> {
        let found = self.library.getattr(engine_context(), inode.into(), None);
        let (attr, _) = found.inspect_err(|error| self.node_failed(state, request, node, error))?;
        self.refuse_removed(state, request, node, (attr.nlink, attr.mode), wanted)
    }

    fn refuse_removed(
        &self,
        state: &mut State,
        request: RequestContext,
        node: Slot,
        (links, mode): (u32, u32),
        wanted: Use,
    ) -> io::Result<()> {
        if links > 0 || mode & libc::S_IFMT != libc::S_IFREG || self.may_use_without_link(state, node, wanted) {
            return Ok(());
        }
        // Some file systems do not count links.
        if self.has_name(state, request, node) {
            return Ok(());
        }
        self.stash_if_removed(state, node);
        state.recent.node_is_stale();
        Err(error(libc::ESTALE))
    }

    /// True if the guest may use a file without links: it removed the last name itself, has just looked the file up, or
    /// has it open.
    ///
    /// An open file can be opened again without a name (`/proc/self/fd`), but a guest thread may also come by a cached
    /// name, and its write would be lost. Which one it is shows after `ESTALE`: by a name the kernel sends LOOKUP and then
    /// opens another node; without one the same thread opens this node again.
    fn may_use_without_link(&self, state: &mut State, node: Slot, wanted: Use) -> bool {
        if state.nodes.is_unlinked(node) && state.ledger.names(node).is_empty() {
            return true;
        }
        let open = !state.ledger.handles_of(node).is_empty();
        match wanted {
            Use::Change(pid) => open || state.nodes.is_same_walk(node, pid, SAME_WALK),
            Use::Open(pid) => open && state.nodes.refuse_once(node, pid),
        }
    }
}
