//! The library's own way to replace an engine, for comparison with a hand-over: its state is saved and loaded, source
//! and destination in one process, while a guest would be stopped.

use std::ffi::CString;
use std::fs::File;
use std::io::{self, Seek};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use nix::sys::memfd::{MFdFlags, memfd_create};
use virtiofsd::filesystem::{Context, FileSystem, FsOptions, SerializableFileSystem};
use virtiofsd::fuse::ROOT_ID;
use virtiofsd::passthrough::{Config, InodeFileHandlesMode, MigrationMode, PassthroughFs};
use virtiofsd::soft_idmap::{GuestGid, GuestUid};

use crate::tree::{Tree, directory_name, place};

/// Duration of each step.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Transfer {
    /// While the guest is still served.
    pub(crate) prepare: Duration,
    /// While the guest is stopped.
    pub(crate) save: Duration,
    /// While the guest is stopped.
    pub(crate) load: Duration,
}

impl Transfer {
    /// How long the guest is stopped.
    pub(crate) fn pause(&self) -> Duration {
        self.save + self.load
    }
}

/// Transfers the state of a server whose guest holds `held` files. Returns the median of several runs if they are fast.
pub(crate) fn measure(tree: &Tree, held: usize) -> anyhow::Result<Transfer> {
    let mode = if permitted(tree) { MigrationMode::FileHandles } else { MigrationMode::FindPaths };
    let repeats = (300_000 / held.max(1)).clamp(1, 5);
    let mut transfers = (0..repeats).map(|_| once(tree, held, mode)).collect::<anyhow::Result<Vec<_>>>()?;
    transfers.sort_by_key(Transfer::pause);
    Ok(transfers[repeats / 2])
}

fn once(tree: &Tree, held: usize, mode: MigrationMode) -> anyhow::Result<Transfer> {
    let source = start(&tree.root, mode).context("starting the source")?;
    hold(&source, held).context("looking up files")?;
    let destination = start(&tree.root, mode).context("starting the destination")?;
    let mut pipe = File::from(memfd_create("bench-transfer", MFdFlags::MFD_CLOEXEC)?);
    let prepare = timed(|| {
        source.prepare_serialization(Arc::default());
        Ok(())
    })?;
    let save = timed(|| source.serialize(pipe.try_clone()?)).context("saving")?;
    pipe.rewind()?;
    let load = timed(|| destination.deserialize_and_apply(pipe)).context("loading")?;
    Ok(Transfer { prepare, save, load })
}

/// True if file handles, the faster way, can be opened. Otherwise the library walks paths.
fn permitted(tree: &Tree) -> bool {
    start(&tree.root, MigrationMode::FileHandles).is_ok_and(|fs| {
        let name = CString::new(directory_name(0)).unwrap_or_default();
        fs.lookup(caller(), ROOT_ID, &name).is_ok()
    })
}

fn start(root: &Path, mode: MigrationMode) -> io::Result<PassthroughFs> {
    let fs = PassthroughFs::new(Config {
        root_dir: root.to_string_lossy().into_owned(),
        inode_file_handles: InodeFileHandlesMode::Prefer,
        migration_mode: mode,
        ..Config::default()
    })?;
    fs.init(FsOptions::empty())?;
    Ok(fs)
}

fn hold(fs: &PassthroughFs, held: usize) -> io::Result<()> {
    let mut parent = (usize::MAX, ROOT_ID);
    for index in 0..held {
        let (directory, name) = place(index);
        if parent.0 != directory {
            let entry = fs.lookup(caller(), ROOT_ID, &CString::new(directory_name(directory))?)?;
            parent = (directory, entry.inode);
        }
        fs.lookup(caller(), parent.1, &CString::new(name)?)?;
    }
    Ok(())
}

fn caller() -> Context {
    Context { uid: GuestUid::from(0), gid: GuestGid::from(0), pid: 1 }
}

fn timed(work: impl FnOnce() -> io::Result<()>) -> io::Result<Duration> {
    let begin = Instant::now();
    work()?;
    Ok(begin.elapsed())
}
