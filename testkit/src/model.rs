//! Model of a file tree in memory: names, links, contents, attributes.
//!
//! It is pure: a request is first *planned* (its changes, or the errno that Linux returns) and *committed* only when
//! the guest has received its success.

use std::collections::{BTreeMap, BTreeSet};

use nix::errno::Errno;

/// A component of a path.
pub type Name = Vec<u8>;

/// Identifies a node of the model. Never reused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Id(u64);

/// The root of the tree.
pub const TOP: Id = Id(0);

/// Type and content of a node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Body {
    /// Names and their nodes.
    Directory(BTreeMap<Name, Id>),
    /// Content.
    File(Vec<u8>),
    /// Target.
    Symlink(Vec<u8>),
    /// A FIFO.
    Fifo,
}

/// A file, directory, symlink or FIFO.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Node {
    /// Type and content.
    pub body: Body,
    /// Permission bits.
    pub mode: u32,
    /// Owner and group.
    pub owner: (u32, u32),
    /// Modification time, if it was set explicitly since the last write.
    pub mtime: Option<(u64, u32)>,
    /// Extended attributes.
    pub xattrs: BTreeMap<Name, Vec<u8>>,
    /// Parent and name of each link.
    pub names: BTreeSet<(Id, Name)>,
    /// Number of open files and directory streams.
    pub opens: u32,
}

impl Node {
    fn new(body: Body, mode: u32) -> Self {
        Self { body, mode, owner: (0, 0), mtime: None, xattrs: BTreeMap::new(), names: BTreeSet::new(), opens: 0 }
    }

    /// The file type bits of `st_mode`.
    pub fn file_type(&self) -> u32 {
        match self.body {
            Body::Directory(_) => libc::S_IFDIR,
            Body::File(_) => libc::S_IFREG,
            Body::Symlink(_) => libc::S_IFLNK,
            Body::Fifo => libc::S_IFIFO,
        }
    }

    /// Size as in `stat`; `None` for a directory, whose size depends on the file system.
    pub fn size(&self) -> Option<u64> {
        match &self.body {
            Body::Directory(_) => None,
            Body::File(data) => Some(data.len() as u64),
            Body::Symlink(target) => Some(target.len() as u64),
            Body::Fifo => Some(0),
        }
    }

    /// True if it is a directory.
    pub fn is_directory(&self) -> bool {
        matches!(self.body, Body::Directory(_))
    }

    /// True if it is a regular file.
    pub fn is_file(&self) -> bool {
        matches!(self.body, Body::File(_))
    }

    /// Names and their nodes; empty if it is not a directory.
    pub fn children(&self) -> impl Iterator<Item = (&Name, Id)> {
        let names = match &self.body {
            Body::Directory(names) => Some(names),
            _ => None,
        };
        names.into_iter().flatten().map(|(name, id)| (name, *id))
    }
}

/// How a rename treats an existing target.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RenameHow {
    /// Replaces it.
    Replace,
    /// RENAME_NOREPLACE.
    NoReplace,
    /// RENAME_EXCHANGE.
    Exchange,
}

/// How an extended attribute is set.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum XattrHow {
    /// Creates or replaces it.
    Set,
    /// XATTR_CREATE.
    Create,
    /// XATTR_REPLACE.
    Replace,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Edit {
    Make(Id, Node),
    Add(Id, Name, Id),
    Remove(Id, Name),
}

/// Changes of a request. Commit them if the request succeeds.
#[derive(Debug, Clone, PartialEq, Eq)]
#[must_use]
pub struct Change {
    edits: Vec<Edit>,
    /// The node of a new name, if the request creates one.
    pub node: Option<Id>,
}

impl Change {
    /// Directories, and names that are added or removed in them.
    pub fn touched(&self) -> impl Iterator<Item = (Id, &Name)> {
        self.edits.iter().filter_map(|edit| match edit {
            Edit::Make(..) => None,
            Edit::Add(parent, name, _) | Edit::Remove(parent, name) => Some((*parent, name)),
        })
    }
}

/// A tree of nodes.
#[derive(Debug, Clone)]
pub struct Tree {
    nodes: BTreeMap<Id, Node>,
    next: u64,
}

impl Default for Tree {
    fn default() -> Self {
        Self::new()
    }
}

impl Tree {
    /// An empty directory.
    pub fn new() -> Self {
        let top = Node::new(Body::Directory(BTreeMap::new()), 0o755);
        Self { nodes: BTreeMap::from([(TOP, top)]), next: 1 }
    }

    /// A node. Also finds open nodes without a name.
    pub fn get(&self, id: Id) -> Option<&Node> {
        self.nodes.get(&id)
    }

    /// All nodes, oldest first.
    pub fn nodes(&self) -> impl Iterator<Item = (Id, &Node)> {
        self.nodes.iter().map(|(id, node)| (*id, node))
    }

    /// Number of nodes.
    pub fn len(&self) -> usize {
        self.nodes.len()
    }

    /// True if there is only the root.
    pub fn is_empty(&self) -> bool {
        self.len() == 1
    }

    /// The node of a name.
    pub fn child(&self, parent: Id, name: &[u8]) -> Result<Id, Errno> {
        self.directory(parent)?.get(name).copied().ok_or(Errno::ENOENT)
    }

    /// The node at a path.
    pub fn resolve(&self, path: &[Name]) -> Result<Id, Errno> {
        path.iter().try_fold(TOP, |at, name| self.child(at, name))
    }

    /// A path of a node, if it has one.
    pub fn path(&self, id: Id) -> Option<Vec<Name>> {
        let mut path = Vec::new();
        let mut at = id;
        while at != TOP {
            let (parent, name) = self.get(at)?.names.first()?;
            path.push(name.clone());
            at = *parent;
        }
        path.reverse();
        Some(path)
    }

    /// True if `id` is `ancestor` or a descendant of it.
    pub fn is_below(&self, id: Id, ancestor: Id) -> bool {
        let mut at = id;
        loop {
            if at == ancestor {
                return true;
            }
            match self.get(at).and_then(|node| node.names.first()) {
                Some((parent, _)) => at = *parent,
                None => return false,
            }
        }
    }

    /// Plans a new node with a new name.
    pub fn plan_make(&self, parent: Id, name: &[u8], body: Body, mode: u32) -> Result<Change, Errno> {
        self.must_be_free(parent, name)?;
        let id = Id(self.next);
        let edits = vec![Edit::Make(id, Node::new(body, mode)), Edit::Add(parent, name.to_vec(), id)];
        Ok(Change { edits, node: Some(id) })
    }

    /// Plans another name for a file.
    pub fn plan_link(&self, id: Id, parent: Id, name: &[u8]) -> Result<Change, Errno> {
        self.must_be_free(parent, name)?;
        let edits = vec![Edit::Add(parent, name.to_vec(), id)];
        Ok(Change { edits, node: Some(id) })
    }

    /// Plans the removal of a name (`may_delete`: EISDIR for a directory).
    pub fn plan_unlink(&self, parent: Id, name: &[u8]) -> Result<Change, Errno> {
        let id = self.child(parent, name)?;
        if self.node(id)?.is_directory() {
            return Err(Errno::EISDIR);
        }
        Ok(removal(parent, name))
    }

    /// Plans the removal of an empty directory.
    pub fn plan_rmdir(&self, parent: Id, name: &[u8]) -> Result<Change, Errno> {
        let id = self.child(parent, name)?;
        if !self.directory(id)?.is_empty() {
            return Err(Errno::ENOTEMPTY);
        }
        Ok(removal(parent, name))
    }

    /// Plans a rename, with the errors of Linux in the order of Linux (`do_renameat2`, `vfs_rename`).
    pub fn plan_rename(&self, from: (Id, &[u8]), to: (Id, &[u8]), how: RenameHow) -> Result<Change, Errno> {
        let source = self.child(from.0, from.1)?;
        let target = self.child(to.0, to.1).ok();
        match (how, target) {
            (RenameHow::NoReplace, Some(_)) => return Err(Errno::EEXIST),
            (RenameHow::Exchange, None) => return Err(Errno::ENOENT),
            _ => {}
        }
        if self.is_below(to.0, source) {
            return Err(Errno::EINVAL);
        }
        if target.is_some_and(|target| self.is_below(from.0, target)) {
            return Err(match how {
                RenameHow::Exchange => Errno::EINVAL,
                _ => Errno::ENOTEMPTY,
            });
        }
        // Both names are of the same file: rename(2) succeeds without doing anything.
        if target == Some(source) {
            return Ok(Change { edits: Vec::new(), node: None });
        }
        if how == RenameHow::Exchange {
            return Ok(exchange(from, to, source, target));
        }
        if let Some(target) = target {
            self.may_replace(source, target)?;
        }
        let mut edits = vec![Edit::Remove(from.0, from.1.to_vec())];
        edits.extend(target.map(|_| Edit::Remove(to.0, to.1.to_vec())));
        edits.push(Edit::Add(to.0, to.1.to_vec(), source));
        Ok(Change { edits, node: None })
    }

    /// Applies a planned change. Returns the nodes that no longer exist.
    pub fn commit(&mut self, change: Change) -> Vec<Id> {
        let mut nameless = Vec::new();
        for edit in change.edits {
            match edit {
                Edit::Make(id, node) => {
                    self.next = id.0 + 1;
                    self.nodes.insert(id, node);
                }
                Edit::Add(parent, name, id) => self.add(parent, name, id),
                Edit::Remove(parent, name) => nameless.extend(self.remove(parent, &name)),
            }
        }
        nameless.into_iter().filter(|id| self.drop_if_unused(*id)).collect()
    }

    /// Records that a file was opened.
    pub fn open(&mut self, id: Id) {
        if let Some(node) = self.nodes.get_mut(&id) {
            node.opens += 1;
        }
    }

    /// Records that a file was closed. True if it no longer exists.
    pub fn close(&mut self, id: Id) -> bool {
        if let Some(node) = self.nodes.get_mut(&id) {
            node.opens = node.opens.saturating_sub(1);
        }
        self.drop_if_unused(id)
    }

    /// Content of a file; empty for other nodes.
    pub fn data(&self, id: Id) -> &[u8] {
        match self.get(id).map(|node| &node.body) {
            Some(Body::File(data)) => data,
            _ => &[],
        }
    }

    /// Changes the content of a file. Its modification time is then no longer known.
    pub fn edit(&mut self, id: Id, change: impl FnOnce(&mut Vec<u8>)) {
        if let Some(node) = self.nodes.get_mut(&id)
            && let Body::File(data) = &mut node.body
        {
            change(data);
            node.mtime = None;
        }
    }

    /// Changes anything but names and content.
    pub fn adjust(&mut self, id: Id, change: impl FnOnce(&mut Node)) {
        if let Some(node) = self.nodes.get_mut(&id) {
            change(node);
        }
    }

    /// Checks if an extended attribute may be set in this way.
    pub fn plan_xattr(&self, id: Id, name: &[u8], how: XattrHow) -> Result<(), Errno> {
        match (how, self.node(id)?.xattrs.contains_key(name)) {
            (XattrHow::Create, true) => Err(Errno::EEXIST),
            (XattrHow::Replace, false) => Err(Errno::ENODATA),
            _ => Ok(()),
        }
    }

    /// The value of an extended attribute.
    pub fn xattr(&self, id: Id, name: &[u8]) -> Result<&[u8], Errno> {
        let value = self.node(id)?.xattrs.get(name);
        value.map(Vec::as_slice).ok_or(Errno::ENODATA)
    }

    fn node(&self, id: Id) -> Result<&Node, Errno> {
        self.get(id).ok_or(Errno::ENOENT)
    }

    fn directory(&self, id: Id) -> Result<&BTreeMap<Name, Id>, Errno> {
        match &self.node(id)?.body {
            Body::Directory(names) => Ok(names),
            _ => Err(Errno::ENOTDIR),
        }
    }

    fn must_be_free(&self, parent: Id, name: &[u8]) -> Result<(), Errno> {
        match self.child(parent, name) {
            Ok(_) => Err(Errno::EEXIST),
            Err(Errno::ENOENT) => Ok(()),
            Err(other) => Err(other),
        }
    }

    fn may_replace(&self, source: Id, target: Id) -> Result<(), Errno> {
        let directories = (self.node(source)?.is_directory(), self.node(target)?.is_directory());
        match directories {
            (true, false) => Err(Errno::ENOTDIR),
            (false, true) => Err(Errno::EISDIR),
            (true, true) if !self.directory(target)?.is_empty() => Err(Errno::ENOTEMPTY),
            _ => Ok(()),
        }
    }

    fn add(&mut self, parent: Id, name: Name, id: Id) {
        if let Some(Body::Directory(names)) = self.nodes.get_mut(&parent).map(|node| &mut node.body) {
            names.insert(name.clone(), id);
        }
        self.adjust(id, |node| {
            node.names.insert((parent, name));
        });
    }

    fn remove(&mut self, parent: Id, name: &[u8]) -> Option<Id> {
        let Some(Body::Directory(names)) = self.nodes.get_mut(&parent).map(|node| &mut node.body) else {
            return None;
        };
        let id = names.remove(name)?;
        self.adjust(id, |node| {
            node.names.remove(&(parent, name.to_vec()));
        });
        Some(id)
    }

    fn drop_if_unused(&mut self, id: Id) -> bool {
        let unused = id != TOP && self.get(id).is_some_and(|node| node.names.is_empty() && node.opens == 0);
        if unused {
            self.nodes.remove(&id);
        }
        unused
    }
}

fn removal(parent: Id, name: &[u8]) -> Change {
    Change { edits: vec![Edit::Remove(parent, name.to_vec())], node: None }
}

fn exchange(from: (Id, &[u8]), to: (Id, &[u8]), source: Id, target: Option<Id>) -> Change {
    let mut edits = vec![
        Edit::Remove(from.0, from.1.to_vec()),
        Edit::Remove(to.0, to.1.to_vec()),
        Edit::Add(to.0, to.1.to_vec(), source),
    ];
    edits.extend(target.map(|target| Edit::Add(from.0, from.1.to_vec(), target)));
    Change { edits, node: None }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn make(tree: &mut Tree, parent: Id, name: &str, body: Body) -> Id {
        let change = tree.plan_make(parent, name.as_bytes(), body, 0o644).unwrap();
        let id = change.node.unwrap();
        tree.commit(change);
        id
    }

    fn directory() -> Body {
        Body::Directory(BTreeMap::new())
    }

    #[test]
    fn an_unlinked_open_file_exists_until_close() {
        let mut tree = Tree::new();
        let file = make(&mut tree, TOP, "f", Body::File(b"x".to_vec()));
        tree.open(file);
        let gone = tree.plan_unlink(TOP, b"f").unwrap();
        assert_eq!(tree.commit(gone), []);
        assert_eq!(tree.data(file), b"x");
        assert!(tree.close(file));
        assert!(tree.get(file).is_none());
    }

    #[test]
    fn renames_fail_as_on_linux() {
        let mut tree = Tree::new();
        let a = make(&mut tree, TOP, "a", directory());
        let b = make(&mut tree, a, "b", directory());
        make(&mut tree, TOP, "f", Body::File(Vec::new()));
        let rename = |tree: &Tree, from: (Id, &str), to: (Id, &str), how| {
            let from = (from.0, from.1.as_bytes());
            tree.plan_rename(from, (to.0, to.1.as_bytes()), how).map(drop)
        };
        use RenameHow::{Exchange, NoReplace, Replace};
        for (from, to, how, errno) in [
            ((TOP, "x"), (TOP, "y"), Replace, Errno::ENOENT),
            ((TOP, "f"), (TOP, "a"), NoReplace, Errno::EEXIST),
            ((TOP, "f"), (TOP, "y"), Exchange, Errno::ENOENT),
            ((TOP, "a"), (b, "c"), Replace, Errno::EINVAL),
            ((a, "b"), (TOP, "a"), Replace, Errno::ENOTEMPTY),
            ((TOP, "a"), (TOP, "f"), Replace, Errno::ENOTDIR),
            ((TOP, "f"), (a, "b"), Replace, Errno::EISDIR),
        ] {
            assert_eq!(rename(&tree, from, to, how), Err(errno), "{from:?} {to:?}");
        }
        rename(&tree, (TOP, "f"), (a, "b"), Exchange).unwrap();
    }

    #[test]
    fn rename_between_two_names_of_one_file_does_nothing() {
        let mut tree = Tree::new();
        let file = make(&mut tree, TOP, "f", Body::File(Vec::new()));
        let link = tree.plan_link(file, TOP, b"g").unwrap();
        tree.commit(link);
        let change = tree.plan_rename((TOP, b"f"), (TOP, b"g"), RenameHow::Replace);
        tree.commit(change.unwrap());
        assert_eq!(tree.get(file).unwrap().names.len(), 2);
    }

    proptest! {
        /// Names and links are consistent after any sequence of steps.
        #[test]
        fn names_and_links_agree(steps in prop::collection::vec((0_u8..6, 0_u8..4, 0_u8..4, 0_u8..4, 0_u8..4), 0..80)) {
            let mut tree = Tree::new();
            for (what, p, n, q, m) in steps {
                let dirs: Vec<Id> = tree.nodes().filter(|(_, n)| n.is_directory()).map(|(id, _)| id).collect();
                let (from, to) = (dirs[p as usize % dirs.len()], dirs[q as usize % dirs.len()]);
                let (old, new) = ([b'a' + n], [b'a' + m]);
                let plan = match what {
                    0 => tree.plan_make(from, &old, directory(), 0o755),
                    1 => tree.plan_make(from, &old, Body::File(Vec::new()), 0o644),
                    2 => tree.plan_unlink(from, &old),
                    3 => tree.plan_rmdir(from, &old),
                    4 => tree.plan_rename((from, &old), (to, &new), RenameHow::Replace),
                    _ => tree.plan_rename((from, &old), (to, &new), RenameHow::Exchange),
                };
                if let Ok(change) = plan {
                    tree.commit(change);
                }
                for (id, node) in tree.nodes() {
                    for (name, child) in node.children() {
                        prop_assert!(tree.get(child).unwrap().names.contains(&(id, name.clone())));
                    }
                    for (parent, name) in &node.names {
                        prop_assert_eq!(tree.child(*parent, name), Ok(id));
                    }
                    prop_assert!(tree.is_below(id, TOP), "a cycle or an orphan");
                }
            }
        }
    }
}
