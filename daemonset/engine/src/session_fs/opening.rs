//! OPEN, OPENDIR and CREATE.

use std::ffi::CStr;
use std::io;

use virtiofs_contract::staleness::Cause;
use virtiofsd::filesystem::{Context, Entry, Extensions, FileSystem, OpenOptions, SecContext};

use crate::ledger::{OpenKind, PriorState, ROOT};

use super::SessionFs;
use super::errors::{engine_context, errno, error, ledger_full};
use super::handles::OpenFile;
use super::names::NameRef;
use super::nodes::Target;
use super::request::RequestContext;
use super::state::State;

/// The arguments of a CREATE beside its name.
pub(super) struct Create {
    pub(super) mode: u32,
    pub(super) kill_priv: bool,
    pub(super) flags: u32,
    pub(super) umask: u32,
    pub(super) extensions: Extensions,
}

/// An entry, library handle and options as the library's CREATE returns them.
struct Created {
    entry: Entry,
    handle: u64,
    options: OpenOptions,
}

impl<F: FileSystem> SessionFs<F> {
    /// OPEN and OPENDIR.
    pub(super) fn open_node(
        &self,
        ctx: Context,
        id: u64,
        kind: OpenKind,
        kill_priv: bool,
        flags: u32,
    ) -> io::Result<(Option<u64>, OpenOptions)> {
        let (request, mut state) = self.operation();
        let opened = self.open_in(&mut state, request, ctx, id, (kind, kill_priv, flags));
        opened.inspect_err(|failed| {
            if errno(failed) == libc::ESTALE {
                state.recent.open_refused(ctx.pid);
            }
        })
    }

    fn open_in(
        &self,
        state: &mut State,
        request: RequestContext,
        ctx: Context,
        id: u64,
        (kind, kill_priv, flags): (OpenKind, bool, u32),
    ) -> io::Result<(Option<u64>, OpenOptions)> {
        let node = self.slot(state, id)?;
        let inode = match self.target(state, request, node)? {
            Target::Library(inode) => inode,
            Target::RemovedDirectory(_) => return self.open_removed_directory(state, request, node, kind, flags),
            Target::Orphaned(file) => {
                self.require_no_name(state, node, ctx.pid)?;
                let (fh, options) = self.open_orphan(state, request, node, &file, flags, kill_priv)?;
                return Ok((Some(fh), options));
            }
        };
        let walk = state.recent.longest_walk(ctx.pid);
        let same_walk = state.nodes.is_same_walk(node, ctx.pid, walk);
        if !same_walk && flags & libc::O_TRUNC as u32 != 0 {
            self.require_linked_to_open(state, request, (node, inode), ctx.pid)?;
        }
        let opened = match kind {
            OpenKind::File => self.library.open(ctx, inode.into(), kill_priv, flags),
            OpenKind::Directory => self.library.opendir(ctx, inode.into(), flags),
        };
        let (handle, mut options) = opened.inspect_err(|error| self.node_failed(state, request, node, error))?;
        let handle = handle.ok_or_else(|| error(libc::EBADF))?.into();
        if !same_walk && kind == OpenKind::File {
            let file = OpenFile::Library { inode, handle };
            let linked = self.require_opened_linked(state, request, node, &file, ctx.pid);
            linked.inspect_err(|_| self.close_unused(kind, inode, handle))?;
        }
        let fh = self.add_handle(state, request, node, kind, flags, (inode, handle))?;
        self.queue_check(state, node);
        if node == ROOT && state.takeover.root_changed() {
            // The root's id stays the same when the source changes. A listing that the guest has cached must not be used.
            options.remove(OpenOptions::KEEP_CACHE | OpenOptions::CACHE_DIR);
        }
        Ok((Some(fh), options))
    }

    /// CREATE.
    pub(super) fn create_file(
        &self,
        ctx: Context,
        (parent, name): (u64, &CStr),
        mut create: Create,
    ) -> io::Result<(Entry, Option<u64>, OpenOptions)> {
        let (request, mut state) = self.operation();
        let at = self.name_ref(&mut state, request, parent, name)?;
        let (prior, repeated) = self.prepare_make(&mut state, request, at)?;
        if !repeated {
            state.ledger.room_for_handle().map_err(ledger_full)?;
        }
        state.name_changes.count();
        // The library does this for OPEN alone.
        create.flags = self.orphaned.without_refused_direct_io(create.flags);
        let (flags, label) = (create.flags, create.extensions.secctx.clone().filter(|_| repeated));
        let created = self.create_or_reopen(&mut state, request, ctx, at, create, &prior, repeated)?;
        self.reply_created(&mut state, request, at, flags, created, &prior, label)
    }

    /// Creates the file, or opens the one that the first run of the request created.
    #[expect(clippy::too_many_arguments, reason = "a CREATE and what was true before it")]
    fn create_or_reopen(
        &self,
        state: &mut State,
        request: RequestContext,
        ctx: Context,
        at: NameRef<'_>,
        create: Create,
        prior: &PriorState,
        repeated: bool,
    ) -> io::Result<Created> {
        let Create { mode, kill_priv, flags, umask, extensions } = create;
        let created =
            self.library.create(ctx, at.parent_inode.into(), at.name, mode, kill_priv, flags, umask, extensions);
        let created = created.map_err(|failed| self.creation_failed(ctx, failed));
        let (entry, handle, options) = match created {
            Err(error) if repeated => {
                let entry = self.entry_made_before(at, prior, error)?;
                let flags = flags & !((libc::O_CREAT | libc::O_EXCL) as u32);
                let opened = self.library.open(ctx, entry.inode.into(), kill_priv, flags);
                let (handle, options) =
                    opened.inspect_err(|_| self.library.forget(engine_context(), entry.inode.into(), 1))?;
                (entry, handle, options)
            }
            other => other.inspect_err(|error| self.lookup_failed(state, request, at, error))?,
        };
        let handle = handle.ok_or_else(|| error(libc::EBADF))?.into();
        Ok(Created { entry, handle, options })
    }

    /// Records the entry and the handle for the guest. On error neither stays.
    #[expect(clippy::too_many_arguments, reason = "a CREATE's result and what was true before it")]
    fn reply_created(
        &self,
        state: &mut State,
        request: RequestContext,
        at: NameRef<'_>,
        flags: u32,
        created: Created,
        prior: &PriorState,
        label: Option<SecContext>,
    ) -> io::Result<(Entry, Option<u64>, OpenOptions)> {
        let Created { entry, handle, options } = created;
        let inode = entry.inode;
        let close = |_: &io::Error| self.close_unused(OpenKind::File, inode, handle);
        self.restore_label(prior, label, inode).inspect_err(close)?;
        let held = state.ledger.find(at.parent, at.name.to_bytes());
        let entry = self.reply_entry(state, request, (at, held), entry, Cause::SourceReplaced).inspect_err(close)?;
        let node = self.slot(state, entry.inode)?;
        let added = self.add_handle(state, request, node, OpenKind::File, flags, (inode, handle));
        let fh = added.inspect_err(|_| {
            // The guest does not receive the entry, so it will not forget it.
            state.ledger.undo_lookup(request.ring, node);
            self.release_ended(state);
        })?;
        Ok((entry, Some(fh), options))
    }
}
