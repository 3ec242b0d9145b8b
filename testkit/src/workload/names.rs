//! Steps that create, find, move and remove names, and that change attributes.

use std::collections::{BTreeMap, BTreeSet};

use nix::errno::Errno;

use super::lane::{Lane, masked};
use super::op::{Fill, Path, Text};
use super::report::{Fault, Kind};
use crate::fuse::client::SetAttr;
use crate::fuse::wire::EntryOut;
use crate::model::{Body, Change, Id, Name, Node, RenameHow, TOP, XattrHow};

type Done = Result<(), Fault>;

impl Lane {
    pub(super) fn lookup(&mut self, path: &Path) -> Done {
        let (parent, node, name) = self.parent_node(path)?;
        let due = self.tree.child(parent, name);
        let answer = self.fuse.lookup(node, name);
        // A negative entry is equivalent to ENOENT and allows the guest to cache it.
        if due.is_err() && answer.as_ref().is_ok_and(|entry| entry.nodeid == 0) {
            self.report.refused += 1;
            return Ok(());
        }
        match self.agree(due, answer)? {
            Some((id, entry)) => {
                self.view.enter(parent, name, id);
                self.learn(id, &entry)
            }
            None => Ok(()),
        }
    }

    pub(super) fn getattr(&mut self, path: &Path) -> Done {
        let (id, node) = self.reach(path)?;
        let attr = self.fuse.getattr(node, None)?;
        self.check_attr(id, &attr)
    }

    pub(super) fn mkdir(&mut self, path: &Path, mode: u32) -> Done {
        let (parent, node, name) = self.parent_node(path)?;
        let body = Body::Directory(BTreeMap::new());
        let plan = self.tree.plan_make(parent, name, body, masked(mode));
        let answer = self.fuse.mkdir(node, name, mode);
        let made = self.agree(plan, answer)?;
        self.made(made)
    }

    pub(super) fn mknod(&mut self, path: &Path, fifo: bool, mode: u32) -> Done {
        let (parent, node, name) = self.parent_node(path)?;
        let (body, kind) = match fifo {
            true => (Body::Fifo, libc::S_IFIFO),
            false => (Body::File(Vec::new()), libc::S_IFREG),
        };
        let plan = self.tree.plan_make(parent, name, body, masked(mode));
        let answer = self.fuse.mknod(node, name, kind | mode, 0);
        let made = self.agree(plan, answer)?;
        self.made(made)
    }

    pub(super) fn symlink(&mut self, path: &Path, Text(target): &Text) -> Done {
        let (parent, node, name) = self.parent_node(path)?;
        let plan = self.tree.plan_make(parent, name, Body::Symlink(target.clone()), 0o777);
        let answer = self.fuse.symlink(node, name, target);
        let made = self.agree(plan, answer)?;
        self.made(made)
    }

    pub(super) fn readlink(&mut self, path: &Path) -> Done {
        let (id, node) = self.reach(path)?;
        let target = self.fuse.readlink(node)?;
        match self.tree.get(id).map(|node| &node.body) {
            Some(Body::Symlink(due)) if *due == target => Ok(()),
            _ => Err(Fault::new(Kind::WrongAttributes, format!("target {}", target.escape_ascii()))),
        }
    }

    pub(super) fn link(&mut self, from: &Path, to: &Path) -> Done {
        let (id, node) = self.reach(from)?;
        let (parent, directory, name) = self.parent_node(to)?;
        let plan = self.tree.plan_link(id, parent, name);
        let answer = self.fuse.link(node, directory, name);
        let made = self.agree(plan, answer)?;
        self.made(made)
    }

    pub(super) fn unlink(&mut self, path: &Path) -> Done {
        self.visit(path)?;
        let (parent, node, name) = self.parent_node(path)?;
        let plan = self.tree.plan_unlink(parent, name);
        let answer = self.fuse.unlink(node, name);
        self.changed(plan, answer)
    }

    pub(super) fn rmdir(&mut self, path: &Path) -> Done {
        self.visit(path)?;
        let (parent, node, name) = self.parent_node(path)?;
        let plan = self.tree.plan_rmdir(parent, name);
        let answer = self.fuse.rmdir(node, name);
        self.changed(plan, answer)
    }

    pub(super) fn rename(&mut self, from: &Path, to: &Path, how: RenameHow) -> Done {
        self.visit(from)?;
        self.visit(to)?;
        let (from_id, from_node, from_name) = self.parent_node(from)?;
        let (to_id, to_node, to_name) = self.parent_node(to)?;
        let plan = self.tree.plan_rename((from_id, from_name), (to_id, to_name), how);
        let flags = match how {
            RenameHow::Replace => 0,
            RenameHow::NoReplace => libc::RENAME_NOREPLACE,
            RenameHow::Exchange => libc::RENAME_EXCHANGE,
        };
        let answer = self.fuse.rename(from_node, from_name, to_node, to_name, flags);
        self.changed(plan, answer)
    }

    pub(super) fn chmod(&mut self, path: &Path, mode: u32) -> Done {
        let set = SetAttr { mode: Some(mode), ..SetAttr::default() };
        self.set(path, &set, |node| node.mode = mode)
    }

    pub(super) fn chown(&mut self, path: &Path, uid: u32, gid: u32) -> Done {
        let set = SetAttr { uid: Some(uid), gid: Some(gid), ..SetAttr::default() };
        self.set(path, &set, |node| node.owner = (uid, gid))
    }

    pub(super) fn touch(&mut self, path: &Path, mtime: (u64, u32)) -> Done {
        let set = SetAttr { mtime: Some(mtime), ..SetAttr::default() };
        self.set(path, &set, |node| node.mtime = Some(mtime))
    }

    pub(super) fn set_xattr(&mut self, path: &Path, Text(name): &Text, value: Fill, how: XattrHow) -> Done {
        let (id, node) = self.reach(path)?;
        let plan = self.tree.plan_xattr(id, name, how);
        let flags = match how {
            XattrHow::Set => 0,
            XattrHow::Create => libc::XATTR_CREATE,
            XattrHow::Replace => libc::XATTR_REPLACE,
        };
        let answer = self.fuse.setxattr(node, name, &value.bytes(), flags);
        if self.agree(plan, answer)?.is_some() {
            self.tree.adjust(id, |node| drop(node.xattrs.insert(name.clone(), value.bytes())));
        }
        Ok(())
    }

    pub(super) fn get_xattr(&mut self, path: &Path, Text(name): &Text) -> Done {
        let (id, node) = self.reach(path)?;
        let due = self.tree.xattr(id, name).map(<[u8]>::to_vec);
        let answer = self.fuse.getxattr(node, name);
        match self.agree(due, answer)? {
            Some((due, value)) if due != value => {
                let what = format!("{} has {} bytes or other bytes", name.escape_ascii(), value.len());
                Err(Fault::new(Kind::WrongAttributes, what))
            }
            _ => Ok(()),
        }
    }

    pub(super) fn list_xattrs(&mut self, path: &Path) -> Done {
        let (id, node) = self.reach(path)?;
        let mut names = self.fuse.listxattr(node)?;
        // The host may add others, for example `security.*`.
        names.retain(|name| name.starts_with(b"user."));
        names.sort();
        let due: Vec<Name> = match self.tree.get(id) {
            Some(node) => node.xattrs.keys().cloned().collect(),
            None => Vec::new(),
        };
        if names == due {
            return Ok(());
        }
        Err(Fault::new(Kind::WrongAttributes, format!("{} extended attributes instead of {}", names.len(), due.len())))
    }

    pub(super) fn remove_xattr(&mut self, path: &Path, Text(name): &Text) -> Done {
        let (id, node) = self.reach(path)?;
        let due = self.tree.xattr(id, name).map(drop);
        let answer = self.fuse.removexattr(node, name);
        if self.agree(due, answer)?.is_some() {
            self.tree.adjust(id, |node| drop(node.xattrs.remove(name)));
        }
        Ok(())
    }

    /// Drops the names at and below a path from the cache, unless an open file pins them, and forgets nodes without
    /// names, leaves first.
    pub(super) fn forget(&mut self, path: &Path) -> Done {
        let top = self.resolve(path)?;
        let pinned = self.pinned();
        let dropped: Vec<(Id, Name, Id)> = self
            .view
            .names()
            .filter(|(parent, _, id)| (*id == top || self.tree.is_below(*parent, top)) && !pinned.contains(id))
            .map(|(parent, name, id)| (parent, name.clone(), id))
            .collect();
        let mut gone: Vec<Id> = Vec::new();
        for (parent, name, id) in dropped {
            self.view.leave(parent, &name);
            if !self.view.has_name(id) && !gone.contains(&id) {
                gone.push(id);
            }
        }
        if top == TOP && !pinned.contains(&TOP) {
            gone.push(TOP);
        }
        gone.sort_by_key(|id| std::cmp::Reverse(self.tree.path(*id).map_or(0, |path| path.len())));
        let forgets: Vec<_> = gone.into_iter().filter_map(|id| self.view.forget(id)).collect();
        self.send_forgets(&forgets, false)
    }

    /// Open nodes and their ancestor directories: a dentry pins its parent.
    fn pinned(&self) -> BTreeSet<Id> {
        let mut pinned: BTreeSet<Id> = self.tree.nodes().filter(|(_, node)| node.opens > 0).map(|(id, _)| id).collect();
        loop {
            let before = pinned.len();
            let above = self.view.names().filter(|(_, _, id)| pinned.contains(id)).map(|(parent, _, _)| parent);
            let above: Vec<Id> = above.collect();
            pinned.extend(above);
            if pinned.len() == before {
                return pinned;
            }
        }
    }

    fn set(&mut self, path: &Path, set: &SetAttr, change: impl FnOnce(&mut Node)) -> Done {
        let (id, node) = self.reach(path)?;
        let attr = self.fuse.setattr(node, set)?;
        self.tree.adjust(id, change);
        self.check_attr(id, &attr)
    }

    /// A name was created, or rejected as expected.
    pub(super) fn made(&mut self, made: Option<(Change, EntryOut)>) -> Done {
        let Some((change, entry)) = made else {
            return Ok(());
        };
        let id = change.node;
        self.commit(change);
        match id {
            Some(id) => self.learn(id, &entry),
            None => Ok(()),
        }
    }

    fn changed(&mut self, plan: Result<Change, Errno>, answer: Result<(), crate::fuse::call::CallError>) -> Done {
        if let Some((change, ())) = self.agree(plan, answer)? {
            self.commit(change);
        }
        Ok(())
    }
}
