//! Chooses the next step of a random workload from the lane's seed and its model only.

use rand::Rng;
use rand::seq::{IndexedRandom, IteratorRandom};

use super::lane::Lane;
use super::op::{Access, Allocate, Fill, Op, Path, Slot, Text};
use crate::model::{Body, Id, Name, Node, RenameHow, XattrHow};

/// Maximum number of open files and streams of a lane.
const SLOTS: Slot = 12;
/// Unit of COLLAPSE_RANGE and INSERT_RANGE.
const BLOCK: u64 = 4096;
/// Maximum depth of directories. Deeper trees take time and find nothing new.
const DEEPEST: usize = 6;

/// Names that have been confused with something else.
const ODD_NAMES: [&[u8]; 8] =
    [b"x (deleted)", b"\xff\xfe", b"new\nline", b" ", b"-rf", b"..a", "\u{e4}\u{1f427}".as_bytes(), &[b'l'; 255]];

#[derive(Debug, Clone, Copy)]
enum Kind {
    Lookup,
    Stat,
    Create,
    Open,
    Close,
    Read,
    Write,
    Resize,
    Allocate,
    Seek,
    Copy,
    Sync,
    MakeDirectory,
    MakeOther,
    Link,
    Unlink,
    RemoveDirectory,
    Rename,
    Attributes,
    Xattr,
    List,
    Stream,
    Forget,
    Shared,
}

/// Relative frequency of each kind.
const WEIGHTS: [(Kind, u32); 24] = [
    (Kind::Lookup, 8),
    (Kind::Stat, 8),
    (Kind::Create, 9),
    (Kind::Open, 8),
    (Kind::Close, 8),
    (Kind::Read, 14),
    (Kind::Write, 16),
    (Kind::Resize, 3),
    (Kind::Allocate, 3),
    (Kind::Seek, 2),
    (Kind::Copy, 3),
    (Kind::Sync, 1),
    (Kind::MakeDirectory, 4),
    (Kind::MakeOther, 4),
    (Kind::Link, 3),
    (Kind::Unlink, 6),
    (Kind::RemoveDirectory, 3),
    (Kind::Rename, 7),
    (Kind::Attributes, 4),
    (Kind::Xattr, 5),
    (Kind::List, 3),
    (Kind::Stream, 5),
    (Kind::Forget, 4),
    (Kind::Shared, 3),
];

impl Lane {
    pub(super) fn next_op(&mut self) -> Op {
        // Not every kind is possible in every state, but at least one is.
        for _ in 0..50 {
            let chosen = WEIGHTS.choose_weighted(&mut self.random, |kind| kind.1).map(|kind| kind.0);
            if let Some(op) = chosen.ok().and_then(|kind| self.plan(kind)) {
                return op;
            }
        }
        Op::Statfs
    }

    fn plan(&mut self, kind: Kind) -> Option<Op> {
        match kind {
            Kind::Lookup => Some(Op::Lookup { path: self.some_name()? }),
            Kind::Stat => self.plan_stat(),
            Kind::Create => self.plan_create(),
            Kind::Open => self.plan_open(),
            Kind::Close => Some(Op::Close { file: self.some_file(|_| true)? }),
            Kind::Read => self.plan_read(),
            Kind::Write => self.plan_write(),
            Kind::Resize => self.plan_resize(),
            Kind::Allocate => self.plan_allocate(),
            Kind::Seek => self.plan_seek(),
            Kind::Copy => self.plan_copy(),
            Kind::Sync => match self.random.random_bool(0.5) {
                true => Some(Op::Statfs),
                false => Some(Op::Fsync { file: self.some_file(|_| true)? }),
            },
            Kind::MakeDirectory => {
                let path = self.name_to_make()?;
                Some(Op::Mkdir { path, mode: 0o700 | self.random.random_range(0..0o100) })
            }
            Kind::MakeOther => self.plan_other(),
            Kind::Link => {
                let from = self.some_path(Node::is_file)?;
                Some(Op::Link { from, to: self.name_to_make()? })
            }
            Kind::Unlink => Some(Op::Unlink { path: self.some_name()? }),
            Kind::RemoveDirectory => self.plan_rmdir(),
            Kind::Rename => self.plan_rename(),
            Kind::Attributes => self.plan_attributes(),
            Kind::Xattr => self.plan_xattr(),
            Kind::List => {
                let path = self.some_path(Node::is_directory)?;
                Some(Op::List { path, plus: self.random.random_bool(0.5) })
            }
            Kind::Stream => self.plan_stream(),
            Kind::Forget => self.plan_forget(),
            Kind::Shared => self.plan_shared(),
        }
    }

    fn plan_stat(&mut self) -> Option<Op> {
        if self.random.random_bool(0.3) {
            return Some(Op::Fstat { file: self.some_file(|_| true)? });
        }
        let path = self.some_path(|_| true)?;
        let id = self.tree.resolve(&path.0).ok()?;
        match self.tree.get(id)?.body {
            Body::Symlink(_) if self.random.random_bool(0.7) => Some(Op::Readlink { path }),
            _ => Some(Op::Getattr { path }),
        }
    }

    fn plan_create(&mut self) -> Option<Op> {
        let file = self.free_slot()?;
        let path = self.name_to_make()?;
        let taken = self.tree.resolve(&path.0).is_ok();
        let access = *[Access::ReadWrite, Access::Write, Access::Append].choose(&mut self.random)?;
        let mode = 0o600 | self.random.random_range(0..0o200);
        // Without O_EXCL, CREATE opens an existing file; OPEN covers that.
        let exclusive = taken || self.random.random_bool(0.7);
        Some(Op::Create { path, file, access, mode, exclusive })
    }

    fn plan_open(&mut self) -> Option<Op> {
        let file = self.free_slot()?;
        let path = self.some_path(Node::is_file)?;
        let all = [Access::Read, Access::Write, Access::ReadWrite, Access::Append];
        let access = *all.choose(&mut self.random)?;
        let truncate = access.writes() && self.random.random_bool(0.1);
        Some(Op::Open { path, file, access, truncate })
    }

    fn plan_read(&mut self) -> Option<Op> {
        let file = self.some_file(|access| access.reads())?;
        let len = self.len_of(file);
        let offset = self.random.random_range(0..=len + 100);
        let size = 1 << self.random.random_range(0..18);
        Some(Op::Read { file, offset, size })
    }

    fn plan_write(&mut self) -> Option<Op> {
        let file = self.some_file(Access::writes)?;
        let len = self.len_of(file);
        let magnitude = self.random.random_range(0..17);
        let count = self.random.random_range(1..=1 << magnitude);
        let gap = if self.random.random_bool(0.1) { 16384 } else { 0 };
        let offset = self.random.random_range(0..=len + gap);
        if len.max(offset) + count as u64 > self.features.longest_file {
            return Some(Op::Ftruncate { file, size: self.random.random_range(0..=len / 2) });
        }
        let data = Fill { seed: self.random.random(), len: count };
        Some(Op::Write { file, offset, data })
    }

    fn plan_resize(&mut self) -> Option<Op> {
        if self.random.random_bool(0.5) {
            let file = self.some_file(Access::writes)?;
            let size = self.some_size(self.len_of(file));
            return Some(Op::Ftruncate { file, size });
        }
        let path = self.some_path(Node::is_file)?;
        let id = self.tree.resolve(&path.0).ok()?;
        let size = self.some_size(self.tree.data(id).len() as u64);
        Some(Op::Truncate { path, size })
    }

    fn some_size(&mut self, len: u64) -> u64 {
        let most = (len + 8192).min(self.features.longest_file);
        self.random.random_range(0..=most)
    }

    fn plan_allocate(&mut self) -> Option<Op> {
        use Allocate::{Collapse, Extend, Insert, Keep, Punch, Zero};
        let file = self.some_file(Access::writes)?;
        let how = *[Extend, Keep, Punch, Zero, Collapse, Insert].choose(&mut self.random)?;
        if self.unsupported.contains(&how.mode()) {
            return None;
        }
        let len = self.len_of(file);
        let blocks = len / BLOCK;
        let (offset, count) = match how {
            // A range up to the end would be EINVAL.
            Collapse if blocks >= 2 => (self.random.random_range(0..blocks - 1) * BLOCK, BLOCK),
            Insert if blocks >= 1 && len + 4 * BLOCK <= self.features.longest_file => {
                let at = self.random.random_range(0..blocks) * BLOCK;
                (at, self.random.random_range(1..=4) * BLOCK)
            }
            Collapse | Insert => return None,
            _ => (self.random.random_range(0..=len), self.random.random_range(1..=20_000)),
        };
        if matches!(how, Extend | Zero) && offset + count > self.features.longest_file {
            return None;
        }
        // COLLAPSE_RANGE must end before the end of the file.
        if how == Collapse && offset + count >= len {
            return None;
        }
        Some(Op::Allocate { file, how, offset, len: count })
    }

    fn plan_seek(&mut self) -> Option<Op> {
        let file = self.some_file(|_| true)?;
        let offset = self.random.random_range(0..=self.len_of(file));
        Some(Op::Seek { file, offset, hole: self.random.random_bool(0.5) })
    }

    fn plan_copy(&mut self) -> Option<Op> {
        let from = self.some_file(Access::reads)?;
        // O_APPEND would be EBADF.
        let to = self.some_file(|access| access.writes() && access != Access::Append)?;
        if self.files.get(&from)?.id == self.files.get(&to)?.id {
            return None;
        }
        let from_offset = self.random.random_range(0..=self.len_of(from));
        let to_offset = self.random.random_range(0..=self.len_of(to));
        let len = self.random.random_range(1..=65536);
        if to_offset + len > self.features.longest_file {
            return None;
        }
        Some(Op::Copy { from: (from, from_offset), to: (to, to_offset), len })
    }

    fn plan_other(&mut self) -> Option<Op> {
        let path = self.name_to_make()?;
        let mode = 0o600 | self.random.random_range(0..0o200);
        Some(match self.random.random_range(0..3) {
            0 => Op::Mknod { path, fifo: true, mode },
            1 => Op::Mknod { path, fifo: false, mode },
            _ => {
                let target = format!("../target-{}", self.random.random_range(0..1000));
                Op::Symlink { path, target: Text(target.into_bytes()) }
            }
        })
    }

    fn plan_rmdir(&mut self) -> Option<Op> {
        let path = self.some_path(Node::is_directory)?;
        // The lane's own directory is not removed.
        (!path.0.is_empty()).then_some(Op::Rmdir { path })
    }

    fn plan_rename(&mut self) -> Option<Op> {
        let from = self.some_name()?;
        let to = match self.random.random_bool(0.5) {
            true => self.some_name()?,
            false => self.name_to_make()?,
        };
        let how = *[RenameHow::Replace, RenameHow::Replace, RenameHow::NoReplace, RenameHow::Exchange]
            .choose(&mut self.random)?;
        Some(Op::Rename { from, to, how })
    }

    fn plan_attributes(&mut self) -> Option<Op> {
        let path = self.some_path(|node| node.is_file() || node.is_directory())?;
        // The lane's own directory is not in the model.
        if path.0.is_empty() {
            return None;
        }
        let directory = self.tree.resolve(&path.0).ok().and_then(|id| self.tree.get(id))?.is_directory();
        Some(match self.random.random_range(0..3) {
            0 => Op::Chmod { path, mode: 0o700 | self.random.random_range(0..0o100) },
            1 if self.features.chown => {
                let uid = self.random.random_range(0..3) * 1000;
                Op::Chown { path, uid, gid: self.random.random_range(0..3) * 1000 }
            }
            // The modification time of a directory changes with each of its names.
            _ if directory => return None,
            _ => Op::Touch {
                path,
                mtime: (self.random.random_range(1..4_000_000_000), self.random.random_range(0..1_000_000_000)),
            },
        })
    }

    fn plan_xattr(&mut self) -> Option<Op> {
        if !self.features.xattrs {
            return None;
        }
        let path = self.some_path(|node| node.is_file() || node.is_directory())?;
        let name = Text(format!("user.x{}", self.random.random_range(0..3)).into_bytes());
        Some(match self.random.random_range(0..6) {
            0 => Op::GetXattr { path, name },
            1 => Op::ListXattrs { path },
            2 => Op::RemoveXattr { path, name },
            _ => {
                let value = Fill { seed: self.random.random(), len: self.random.random_range(0..300) };
                let how = *[XattrHow::Set, XattrHow::Create, XattrHow::Replace].choose(&mut self.random)?;
                Op::SetXattr { path, name, value, how }
            }
        })
    }

    fn plan_stream(&mut self) -> Option<Op> {
        if !self.features.streams {
            return None;
        }
        let stream = self.random.random_range(0..3);
        let Some(open) = self.streams.get(&stream) else {
            let path = self.some_path(Node::is_directory)?;
            return Some(Op::OpenStream { path, stream });
        };
        let deleted = open.id != crate::model::TOP && self.tree.get(open.id).is_none_or(|node| node.names.is_empty());
        if open.ended || deleted {
            return Some(Op::CloseStream { stream });
        }
        let size = self.random.random_range(512..2048);
        Some(Op::ReadStream { stream, size, plus: self.random.random_bool(0.5) })
    }

    fn plan_forget(&mut self) -> Option<Op> {
        if self.view.deleted() > 0 && self.random.random_bool(0.5) {
            return Some(Op::ForgetDeleted { batch: self.random.random_bool(0.5) });
        }
        Some(Op::Forget { path: self.some_path(|_| true)? })
    }

    fn plan_shared(&mut self) -> Option<Op> {
        let part = self.shared.clone()?;
        let file = self.random.random_range(0..part.len().max(1));
        let offset = self.random.random_range(0..=part.data(file).len() as u64);
        let size = self.random.random_range(1..=65536);
        (!part.is_empty()).then(|| Op::ReadShared { file, offset, size, forget: self.random.random_bool(0.3) })
    }

    /// A path of a random node that has one.
    fn some_path(&mut self, wanted: impl Fn(&Node) -> bool) -> Option<Path> {
        let nodes =
            self.tree.nodes().filter(|(id, node)| wanted(node) && (*id == crate::model::TOP || !node.names.is_empty()));
        let id = nodes.map(|(id, _)| id).choose(&mut self.random)?;
        self.tree.path(id).map(Path)
    }

    /// A random directory that is not too deep.
    fn some_directory(&mut self) -> Option<(Id, Path)> {
        let path = self.some_path(Node::is_directory)?;
        let id = self.tree.resolve(&path.0).ok()?;
        (path.0.len() < DEEPEST).then_some((id, path))
    }

    /// A name that usually exists.
    fn some_name(&mut self) -> Option<Path> {
        let (id, mut path) = self.some_directory()?;
        let names: Vec<Name> = self.tree.get(id)?.children().map(|(name, _)| name.clone()).collect();
        let existing = names.choose(&mut self.random).cloned();
        let name = match existing {
            Some(name) if self.random.random_bool(0.85) => name,
            _ => self.fresh_name(),
        };
        path.0.push(name);
        Some(path)
    }

    /// A name that usually does not exist; rarely any, when the tree is large enough.
    fn name_to_make(&mut self) -> Option<Path> {
        if self.tree.len() > self.features.nodes && self.random.random_bool(0.9) {
            return None;
        }
        let (_, mut path) = self.some_directory()?;
        path.0.push(self.fresh_name());
        Some(path)
    }

    fn fresh_name(&mut self) -> Name {
        if self.random.random_bool(0.1) {
            let odd = ODD_NAMES.choose(&mut self.random).copied().unwrap_or(b"odd");
            return odd.to_vec();
        }
        format!("n{}", self.random.random_range(0..24)).into_bytes()
    }

    fn some_file(&mut self, wanted: impl Fn(Access) -> bool) -> Option<Slot> {
        let files = self.files.iter().filter(|(_, file)| wanted(file.access));
        files.map(|(slot, _)| *slot).choose(&mut self.random)
    }

    fn free_slot(&mut self) -> Option<Slot> {
        (0..SLOTS).find(|slot| !self.files.contains_key(slot))
    }

    fn len_of(&self, file: Slot) -> u64 {
        self.files.get(&file).map_or(0, |file| self.tree.data(file.id).len() as u64)
    }
}
