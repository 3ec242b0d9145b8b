//! The end of a lane: compares the whole tree through the guest and on the host, and releases everything that the guest
//! holds.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::MetadataExt;
use std::path;

use super::lane::Lane;
use super::op::{Access, Op, Path, Slot, Text};
use super::report::{Fault, Kind};
use crate::model::{Body, Id, Name, Node, TOP};

/// A slot that random steps do not use.
const SPARE: Slot = Slot::MAX;
/// Bytes per READ.
const CHUNK: u32 = 128 << 10;

impl Lane {
    /// Compares every node as seen by a guest without cached nodes, and all open files.
    pub fn verify_in_guest(&mut self) {
        self.run(&Op::Forget { path: Path::default() });
        let ids: Vec<Id> = self.tree.nodes().map(|(id, _)| id).collect();
        for id in ids {
            for op in self.checks_of(id) {
                if self.is_stopped() {
                    return;
                }
                self.run(&op);
            }
        }
        let open: Vec<(Slot, Access)> = self.files.iter().map(|(slot, file)| (*slot, file.access)).collect();
        for (slot, access) in open {
            self.run(&Op::Fstat { file: slot });
            if access.reads() {
                self.read_all(slot);
            }
        }
    }

    /// Compares every node with the host's directory.
    pub fn verify_on_host(&mut self, share: &path::Path) {
        let top = share.join(&self.name);
        let ids: Vec<Id> = self.tree.nodes().map(|(id, _)| id).collect();
        for id in ids {
            let result = self.compare_with_host(id, &top);
            self.note(("on the host", id), result);
        }
    }

    /// Closes all files and streams, and forgets all nodes.
    pub fn release_all(&mut self) {
        let files: Vec<Slot> = self.files.keys().copied().collect();
        let streams: Vec<Slot> = self.streams.keys().copied().collect();
        for file in files {
            self.run(&Op::Close { file });
        }
        for stream in streams {
            self.run(&Op::CloseStream { stream });
        }
        self.run(&Op::ForgetDeleted { batch: true });
        self.run(&Op::Forget { path: Path::default() });
        let forgotten = self.forget_shared();
        self.note("forgetting the shared part", forgotten);
    }

    fn forget_shared(&mut self) -> Result<(), Fault> {
        let view = std::mem::take(&mut self.shared_view);
        for (node, count) in view.files.into_values().chain(view.directory) {
            self.fuse.forget(node, count)?;
        }
        Ok(())
    }

    fn checks_of(&mut self, id: Id) -> Vec<Op> {
        let Some((node, path)) = self.tree.get(id).zip(self.tree.path(id).map(Path)) else {
            return Vec::new();
        };
        // An open file without a name has no path.
        if id != TOP && node.names.is_empty() {
            return Vec::new();
        }
        let mut ops = vec![Op::Getattr { path: path.clone() }];
        match &node.body {
            Body::Directory(_) => ops.push(Op::List { path: path.clone(), plus: true }),
            Body::File(data) => ops.extend(read_whole(&path, data.len() as u64)),
            Body::Symlink(_) => ops.push(Op::Readlink { path: path.clone() }),
            Body::Fifo => {}
        }
        if self.features.xattrs && (node.is_file() || node.is_directory()) {
            ops.push(Op::ListXattrs { path: path.clone() });
            ops.extend(node.xattrs.keys().map(|name| Op::GetXattr { path: path.clone(), name: Text(name.clone()) }));
        }
        ops
    }

    fn read_all(&mut self, slot: Slot) {
        let Ok(file) = self.file(slot) else { return };
        for offset in chunks(self.tree.data(file.id).len() as u64) {
            self.run(&Op::Read { file: slot, offset, size: CHUNK });
        }
    }

    fn compare_with_host(&self, id: Id, top: &path::Path) -> Result<(), Fault> {
        let Some((node, names)) = self.tree.get(id).zip(self.tree.path(id)) else {
            return Ok(());
        };
        if id != TOP && node.names.is_empty() {
            return Ok(());
        }
        let mut path = top.to_owned();
        path.extend(names.iter().map(|name| std::ffi::OsStr::from_bytes(name)));
        let found = Found::at(&path, self.features.xattrs).map_err(|error| {
            let what = format!("{}: {error}", path.display());
            Fault::new(Kind::HostDiffers, what)
        })?;
        found.compare(node, id).map_err(|mut fault| {
            fault.what = format!("{}: {}", path.display(), fault.what);
            fault
        })
    }
}

fn chunks(len: u64) -> impl Iterator<Item = u64> {
    // One more than necessary, to detect data after the end.
    (0..=len).step_by(CHUNK as usize)
}

fn read_whole(path: &Path, len: u64) -> Vec<Op> {
    let open = Op::Open { path: path.clone(), file: SPARE, access: Access::Read, truncate: false };
    let reads = chunks(len).map(|offset| Op::Read { file: SPARE, offset, size: CHUNK });
    [open].into_iter().chain(reads).chain([Op::Close { file: SPARE }]).collect()
}

/// A file on the host.
struct Found {
    meta: fs::Metadata,
    names: BTreeSet<Name>,
    data: Vec<u8>,
    xattrs: Vec<(Name, Vec<u8>)>,
}

impl Found {
    fn at(path: &path::Path, with_xattrs: bool) -> std::io::Result<Self> {
        let meta = fs::symlink_metadata(path)?;
        let mut found = Self { names: BTreeSet::new(), data: Vec::new(), xattrs: Vec::new(), meta };
        let kind = found.meta.file_type();
        if kind.is_dir() {
            for entry in fs::read_dir(path)? {
                found.names.insert(entry?.file_name().into_vec());
            }
        } else if kind.is_file() {
            found.data = fs::read(path)?;
        } else if kind.is_symlink() {
            found.data = fs::read_link(path)?.into_os_string().into_vec();
        }
        if with_xattrs && (kind.is_dir() || kind.is_file()) {
            found.xattrs = user_xattrs(path)?;
        }
        Ok(found)
    }

    fn compare(&self, node: &Node, id: Id) -> Result<(), Fault> {
        let differs = |what: String| Err(Fault::new(Kind::HostDiffers, what));
        if self.meta.mode() & libc::S_IFMT != node.file_type() {
            return differs(format!("mode {:o}", self.meta.mode()));
        }
        let names: BTreeSet<Name> = node.children().map(|(name, _)| name.clone()).collect();
        if node.is_directory() && self.names != names {
            return differs(format!("{} names, {} due", self.names.len(), names.len()));
        }
        if !node.is_directory() && self.meta.nlink() != node.names.len() as u64 {
            return differs(format!("{} links, {} due", self.meta.nlink(), node.names.len()));
        }
        let symlink = matches!(node.body, Body::Symlink(_));
        if id != TOP && !symlink && self.meta.mode() & 0o7777 != node.mode {
            return differs(format!("mode {:o} instead of {:o}", self.meta.mode() & 0o7777, node.mode));
        }
        if id != TOP && (self.meta.uid(), self.meta.gid()) != node.owner {
            return differs(format!("owner {}:{}", self.meta.uid(), self.meta.gid()));
        }
        if !self.xattrs.iter().map(|(name, value)| (name, value)).eq(&node.xattrs) {
            return differs(format!("{} extended attributes instead of {}", self.xattrs.len(), node.xattrs.len()));
        }
        self.compare_data(node)
    }

    fn compare_data(&self, node: &Node) -> Result<(), Fault> {
        let (Body::File(due) | Body::Symlink(due)) = &node.body else {
            return Ok(());
        };
        let differing = due.iter().zip(&self.data).filter(|(a, b)| a != b).count();
        let wrong = differing + due.len().abs_diff(self.data.len());
        if wrong == 0 {
            return Ok(());
        }
        let mut fault =
            Fault::new(Kind::HostDiffers, format!("{} bytes, {} due, {wrong} wrong", self.data.len(), due.len()));
        fault.wrong_bytes = wrong as u64;
        Err(fault)
    }
}

fn user_xattrs(path: &path::Path) -> std::io::Result<Vec<(Name, Vec<u8>)>> {
    let mut list = vec![0_u8; 65536];
    let len = rustix::fs::listxattr(path, &mut list[..])?;
    let mut found = Vec::new();
    for name in list[..len].split(|byte| *byte == 0).filter(|name| name.starts_with(b"user.")) {
        let mut value = vec![0_u8; 65536];
        let len = rustix::fs::getxattr(path, name, &mut value[..])?;
        value.truncate(len);
        found.push((name.to_vec(), value));
    }
    found.sort();
    Ok(found)
}
