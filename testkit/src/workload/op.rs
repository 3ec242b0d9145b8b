//! One step of a workload. It is self-contained: it can be printed, written by hand and replayed.

use std::fmt;

use rand::RngCore;
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;

use crate::model::{Name, RenameHow, XattrHow};

/// A path below the lane's directory.
#[derive(Clone, PartialEq, Eq, Default)]
pub struct Path(pub Vec<Name>);

impl From<&str> for Path {
    fn from(path: &str) -> Self {
        let names = path.split('/').filter(|name| !name.is_empty());
        Self(names.map(|name| name.as_bytes().to_vec()).collect())
    }
}

impl fmt::Debug for Path {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names: Vec<String> = self.0.iter().map(|name| name.escape_ascii().to_string()).collect();
        write!(f, "/{}", names.join("/"))
    }
}

/// A name or target that is not a path: of an extended attribute or a symbolic link.
#[derive(Clone, PartialEq, Eq, Default)]
pub struct Text(pub Name);

impl From<&str> for Text {
    fn from(text: &str) -> Self {
        Self(text.as_bytes().to_vec())
    }
}

impl fmt::Debug for Text {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "\"{}\"", self.0.escape_ascii())
    }
}

/// Number of an open file or directory stream of the lane.
pub type Slot = usize;

/// Bytes to write, generated from a seed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Fill {
    /// Seed.
    pub seed: u64,
    /// Number of bytes.
    pub len: usize,
}

impl Fill {
    /// The bytes.
    pub fn bytes(&self) -> Vec<u8> {
        let mut bytes = vec![0; self.len];
        ChaCha8Rng::seed_from_u64(self.seed).fill_bytes(&mut bytes);
        bytes
    }
}

/// Access mode of an open file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// O_RDONLY.
    Read,
    /// O_WRONLY.
    Write,
    /// O_RDWR.
    ReadWrite,
    /// O_RDWR and O_APPEND.
    Append,
}

impl Access {
    /// The flags for open.
    pub fn flags(self) -> i32 {
        match self {
            Self::Read => libc::O_RDONLY,
            Self::Write => libc::O_WRONLY,
            Self::ReadWrite => libc::O_RDWR,
            Self::Append => libc::O_RDWR | libc::O_APPEND,
        }
    }

    /// True if it permits reads.
    pub fn reads(self) -> bool {
        self != Self::Write
    }

    /// True if it permits writes.
    pub fn writes(self) -> bool {
        self != Self::Read
    }
}

/// Operation of FALLOCATE.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Allocate {
    /// Allocates and extends the file.
    Extend,
    /// Only allocates (KEEP_SIZE).
    Keep,
    /// PUNCH_HOLE.
    Punch,
    /// ZERO_RANGE.
    Zero,
    /// COLLAPSE_RANGE: removes a range.
    Collapse,
    /// INSERT_RANGE: inserts a hole.
    Insert,
}

impl Allocate {
    /// The FALLOC_FL_* flags.
    pub fn mode(self) -> i32 {
        match self {
            Self::Extend => 0,
            Self::Keep => libc::FALLOC_FL_KEEP_SIZE,
            Self::Punch => libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE,
            Self::Zero => libc::FALLOC_FL_ZERO_RANGE,
            Self::Collapse => libc::FALLOC_FL_COLLAPSE_RANGE,
            Self::Insert => libc::FALLOC_FL_INSERT_RANGE,
        }
    }
}

/// One step. Nodes are reached as a guest's kernel reaches them: through names that it holds, and with LOOKUPs for
/// others.
#[derive(Debug, Clone, PartialEq, Eq)]
#[allow(missing_docs)] // The fields are those of the request of the same name.
pub enum Op {
    /// LOOKUP of a name that may be missing. A held node must keep its id.
    Lookup { path: Path },
    /// GETATTR by node.
    Getattr { path: Path },
    /// GETATTR through an open file.
    Fstat { file: Slot },
    /// CREATE; `exclusive` is O_EXCL.
    Create { path: Path, file: Slot, access: Access, mode: u32, exclusive: bool },
    /// OPEN; `truncate` is O_TRUNC.
    Open { path: Path, file: Slot, access: Access, truncate: bool },
    /// FLUSH and RELEASE.
    Close { file: Slot },
    /// FSYNC.
    Fsync { file: Slot },
    /// READ.
    Read { file: Slot, offset: u64, size: u32 },
    /// WRITE.
    Write { file: Slot, offset: u64, data: Fill },
    /// SETATTR of the size, by node.
    Truncate { path: Path, size: u64 },
    /// SETATTR of the size, through an open file.
    Ftruncate { file: Slot, size: u64 },
    /// FALLOCATE.
    Allocate { file: Slot, how: Allocate, offset: u64, len: u64 },
    /// LSEEK with SEEK_HOLE or SEEK_DATA.
    Seek { file: Slot, offset: u64, hole: bool },
    /// COPY_FILE_RANGE.
    Copy { from: (Slot, u64), to: (Slot, u64), len: u64 },
    /// MKDIR.
    Mkdir { path: Path, mode: u32 },
    /// MKNOD of a regular file or FIFO.
    Mknod { path: Path, fifo: bool, mode: u32 },
    /// SYMLINK.
    Symlink { path: Path, target: Text },
    /// READLINK.
    Readlink { path: Path },
    /// LINK.
    Link { from: Path, to: Path },
    /// UNLINK.
    Unlink { path: Path },
    /// RMDIR.
    Rmdir { path: Path },
    /// RENAME or RENAME2.
    Rename { from: Path, to: Path, how: RenameHow },
    /// SETATTR of the mode.
    Chmod { path: Path, mode: u32 },
    /// SETATTR of the owner.
    Chown { path: Path, uid: u32, gid: u32 },
    /// SETATTR of the modification time.
    Touch { path: Path, mtime: (u64, u32) },
    /// SETXATTR.
    SetXattr { path: Path, name: Text, value: Fill, how: XattrHow },
    /// GETXATTR.
    GetXattr { path: Path, name: Text },
    /// LISTXATTR.
    ListXattrs { path: Path },
    /// REMOVEXATTR.
    RemoveXattr { path: Path, name: Text },
    /// STATFS.
    Statfs,
    /// OPENDIR, READDIR or READDIRPLUS to the end, RELEASEDIR.
    List { path: Path, plus: bool },
    /// OPENDIR.
    OpenStream { path: Path, stream: Slot },
    /// One READDIR or READDIRPLUS at the stream's position.
    ReadStream { stream: Slot, size: u32, plus: bool },
    /// RELEASEDIR.
    CloseStream { stream: Slot },
    /// FORGET of a node and its descendants, unless one of them is open.
    Forget { path: Path },
    /// FORGET of deleted nodes, in one BATCH_FORGET or individually.
    ForgetDeleted { batch: bool },
    /// LOOKUP, OPEN, READ, RELEASE of a shared file, and optionally FORGET.
    ReadShared { file: usize, offset: u64, size: u32, forget: bool },
}

impl Op {
    /// The operation's name, for counting.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Lookup { .. } => "Lookup",
            Self::Getattr { .. } => "Getattr",
            Self::Fstat { .. } => "Fstat",
            Self::Create { .. } => "Create",
            Self::Open { .. } => "Open",
            Self::Close { .. } => "Close",
            Self::Fsync { .. } => "Fsync",
            Self::Read { .. } => "Read",
            Self::Write { .. } => "Write",
            Self::Truncate { .. } => "Truncate",
            Self::Ftruncate { .. } => "Ftruncate",
            Self::Allocate { .. } => "Allocate",
            Self::Seek { .. } => "Seek",
            Self::Copy { .. } => "Copy",
            Self::Mkdir { .. } => "Mkdir",
            Self::Mknod { .. } => "Mknod",
            Self::Symlink { .. } => "Symlink",
            Self::Readlink { .. } => "Readlink",
            Self::Link { .. } => "Link",
            Self::Unlink { .. } => "Unlink",
            Self::Rmdir { .. } => "Rmdir",
            Self::Rename { .. } => "Rename",
            Self::Chmod { .. } => "Chmod",
            Self::Chown { .. } => "Chown",
            Self::Touch { .. } => "Touch",
            Self::SetXattr { .. } => "SetXattr",
            Self::GetXattr { .. } => "GetXattr",
            Self::ListXattrs { .. } => "ListXattrs",
            Self::RemoveXattr { .. } => "RemoveXattr",
            Self::Statfs => "Statfs",
            Self::List { .. } => "List",
            Self::OpenStream { .. } => "OpenStream",
            Self::ReadStream { .. } => "ReadStream",
            Self::CloseStream { .. } => "CloseStream",
            Self::Forget { .. } => "Forget",
            Self::ForgetDeleted { .. } => "ForgetDeleted",
            Self::ReadShared { .. } => "ReadShared",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn operations_print_their_path() {
        let op = Op::Unlink { path: "a/b".into() };
        assert_eq!(op.name(), "Unlink");
        assert_eq!(format!("{op:?}"), "Unlink { path: /a/b }");
        assert_eq!(Op::Statfs.name(), "Statfs");
        let op = Op::GetXattr { path: "a".into(), name: "user.x".into() };
        assert_eq!(format!("{op:?}"), "GetXattr { path: /a, name: \"user.x\" }");
    }

    #[test]
    fn the_same_seed_generates_the_same_bytes() {
        let fill = Fill { seed: 7, len: 100 };
        assert_eq!(fill.bytes(), fill.bytes());
        assert_ne!(fill.bytes(), Fill { seed: 8, len: 100 }.bytes());
    }
}
