//! The same file twice: served by the library, and as an orphaned file.

use std::ffi::CString;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use nix::sched::{CloneFlags, unshare};
use rustix::fs::{Timespec, Timestamps, fgetxattr, flistxattr, futimens};
use tempfile::TempDir;
use virtiofsd::filesystem::{FileSystem, FsOptions, ROOT_ID};
use virtiofsd::passthrough::read_only::PassthroughFsRo;
use virtiofsd::passthrough::{Config, PassthroughFs};

use super::operation::{CONTEXT, Operation};
use super::reply::{Bytes, described_time};
use crate::orphaned::{OrphanedFile, OrphanedFileServer};

const NAME: &str = "file";
const OTHER: &str = "other";

/// The library's two file systems.
pub(super) trait Share: FileSystem<Inode = u64, Handle = u64> + Sized {
    const WRITABLE: bool;
    fn start(config: Config) -> io::Result<Self>;
}

impl Share for PassthroughFs {
    const WRITABLE: bool = true;
    fn start(config: Config) -> io::Result<Self> {
        PassthroughFs::new(config)
    }
}

impl Share for PassthroughFsRo {
    const WRITABLE: bool = false;
    fn start(config: Config) -> io::Result<Self> {
        PassthroughFsRo::new(config)
    }
}

/// One end of a copy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum End {
    This,
    Other,
}

/// The initial state of the file.
#[derive(Clone, Copy, Debug)]
pub(super) struct Start {
    /// Open flags of the guest.
    pub(super) flags: i32,
    pub(super) mode: u32,
    /// True if its name is removed.
    pub(super) unlinked: bool,
    pub(super) directory: bool,
}

impl Default for Start {
    fn default() -> Self {
        Start { flags: libc::O_RDWR, mode: 0o644, unlinked: true, directory: false }
    }
}

pub(super) struct Pair<F> {
    pub(super) theirs: F,
    pub(super) node: u64,
    pub(super) handle: u64,
    pub(super) their_other: (u64, u64),
    pub(super) ours: OrphanedFileServer,
    pub(super) file: OrphanedFile,
    pub(super) our_other: File,
    /// The two files, as another process sees them.
    witnesses: [File; 2],
    pub(super) since: SystemTime,
    _share: TempDir,
}

impl<F: Share> Pair<F> {
    pub(super) fn new(setting: fn(&mut Config), start: Start) -> Self {
        // The library changes the working directory and the umask of the process.
        unshare(CloneFlags::CLONE_FS).unwrap();
        let share = TempDir::new().unwrap();
        let dirs = [share.path().join("library"), share.path().join("ours")];
        let witnesses = dirs.each_ref().map(|dir| prepare(dir, start));
        let mut config = Config {
            root_dir: dirs[0].to_str().unwrap().into(),
            proc_sfd_rawfd: Some(open("/proc/self/fd".as_ref(), libc::O_PATH | libc::O_DIRECTORY)),
            attr_timeout: std::time::Duration::from_secs(3),
            ..Config::default()
        };
        setting(&mut config);
        let ours = OrphanedFileServer::new(&config, F::WRITABLE).unwrap();
        let library = F::start(config).unwrap();
        ours.negotiated(library.init(FsOptions::all()).unwrap());

        let (node, handle) = open_in(&library, NAME, start.flags, start.directory);
        let file = open(&dirs[1].join(NAME), ours.open_flags(start.flags).unwrap());
        let other_flags = if F::WRITABLE { libc::O_RDWR } else { libc::O_RDONLY };
        let their_other = open_in(&library, OTHER, other_flags, false);
        let our_other = open(&dirs[1].join(OTHER), other_flags);
        if start.unlinked {
            dirs.iter().for_each(|dir| remove(&dir.join(NAME)));
        }
        let file = OrphanedFile::new(file).unwrap();
        let since = SystemTime::now();
        Pair { theirs: library, node, handle, their_other, ours, file, our_other, witnesses, since, _share: share }
    }

    /// Applies `operation` to both and compares replies and states.
    pub(super) fn compare(&mut self, operation: &Operation) -> Result<(), String> {
        let (theirs, ours) = (self.through_library(operation), self.through_ours(operation));
        if theirs != ours {
            return Err(format!("{operation:?}: the library returns {theirs:?}, the orphaned file {ours:?}"));
        }
        let [theirs, ours] = self.witnesses.each_ref().map(|file| state(file, self.since));
        if theirs != ours {
            return Err(format!("{operation:?}: the library leaves {theirs:?}, we leave {ours:?}"));
        }
        Ok(())
    }
}

fn prepare(dir: &Path, start: Start) -> File {
    fs::create_dir(dir).unwrap();
    for name in [NAME, OTHER] {
        fs::write(dir.join(name), contents(name)).unwrap();
    }
    let path = dir.join(NAME);
    if start.directory {
        remove(&path);
        fs::create_dir(&path).unwrap();
    }
    fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(start.mode)).unwrap();
    let access = if start.directory { libc::O_RDONLY } else { libc::O_RDWR };
    let witness = open(&path, access | libc::O_NOATIME);
    let long_ago = Timespec { tv_sec: 1_000_000_000, tv_nsec: 5 };
    futimens(&witness, &Timestamps { last_access: long_ago, last_modification: long_ago }).unwrap();
    witness
}

/// Bytes that distinguish the files.
fn contents(name: &str) -> Vec<u8> {
    name.bytes().cycle().take(10_000).collect()
}

fn open(path: &Path, flags: i32) -> File {
    let access = flags & libc::O_ACCMODE;
    fs::OpenOptions::new()
        .read(access != libc::O_WRONLY)
        .write(access != libc::O_RDONLY)
        .custom_flags(flags & !libc::O_ACCMODE)
        .open(path)
        .unwrap()
}

fn open_in(fs: &impl Share, name: &str, flags: i32, directory: bool) -> (u64, u64) {
    let node = fs.lookup(CONTEXT(), ROOT_ID, &CString::new(name).unwrap()).unwrap().inode;
    let opened = if directory {
        fs.opendir(CONTEXT(), node, flags as u32)
    } else {
        fs.open(CONTEXT(), node, false, flags as u32)
    };
    (node, opened.unwrap().0.unwrap())
}

fn remove(path: &PathBuf) {
    if path.is_dir() { fs::remove_dir(path) } else { fs::remove_file(path) }.unwrap();
}

/// Everything about a file that an operation may change, except its inode number and blocks.
fn state(file: &File, since: SystemTime) -> (String, Bytes) {
    let meta = file.metadata().unwrap();
    let time = |seconds: i64, nanoseconds: i64| described_time(seconds as u64, nanoseconds as u32, since);
    let mut bytes = vec![0; meta.len().min(1 << 18) as usize];
    if meta.is_file() {
        file.read_exact_at(&mut bytes, 0).unwrap();
    }
    let attributes = format!(
        "mode {:o} owner {}:{} size {} atime {} mtime {} xattrs {:?}",
        meta.mode(),
        meta.uid(),
        meta.gid(),
        meta.len(),
        time(meta.atime(), meta.atime_nsec()),
        time(meta.mtime(), meta.mtime_nsec()),
        xattrs(file),
    );
    (attributes, Bytes(bytes))
}

fn xattrs(file: &File) -> Vec<(String, Vec<u8>)> {
    let mut list = vec![0; 4096];
    let length = flistxattr(file, &mut list[..]).unwrap_or(0);
    let names = list[..length].split(|byte| *byte == 0).filter(|name| !name.is_empty());
    let mut all: Vec<_> = names
        .map(|name| {
            let mut value = vec![0; 4096];
            let length = fgetxattr(file, name, &mut value[..]).unwrap_or(0);
            (String::from_utf8_lossy(name).into_owned(), value[..length].to_vec())
        })
        .collect();
    all.sort();
    all
}
