//! Empties a directory of any size and depth. Follows no symbolic link and enters no mount point. Subdirectories are moved up
//! before their parent is removed, so at most two directories are open.

use std::ffi::{CStr, CString};
use std::io;
use std::os::fd::{AsFd, OwnedFd};

use rustix::fs::{AtFlags, Dir, Mode, OFlags, StatxAttributes, StatxFlags, openat, renameat, statx, unlinkat};
use rustix::io::Errno;
use rustix::path::Arg;

/// Number of names read at a time.
const NAMES_MAX: usize = 1024;

/// Opens a directory.
///
/// # Errors
/// It cannot be opened, or is a mount point.
pub(super) fn open(at: impl AsFd, name: impl Arg) -> io::Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let directory = openat(at, name, flags, Mode::empty())?;
    let found = statx(&directory, c"", AtFlags::EMPTY_PATH, StatxFlags::BASIC_STATS)?;
    if found.stx_attributes.contains(StatxAttributes::MOUNT_ROOT) {
        return Err(io::Error::other("a file system is mounted there"));
    }
    Ok(directory)
}

/// Removes everything in a directory.
///
/// # Errors
/// Something cannot be removed.
pub(super) fn empty(directory: &OwnedFd) -> io::Result<()> {
    let mut fresh = 0;
    for_each_name(directory, |name| {
        if try_remove(directory, name)? {
            return Ok(());
        }
        let below = open(directory, name)?;
        for_each_name(&below, |name| match try_remove(&below, name)? {
            true => Ok(()),
            false => move_up(&below, name, directory, &mut fresh),
        })
    })
}

/// Calls `act` for each name until the directory is empty.
fn for_each_name(directory: &OwnedFd, mut act: impl FnMut(&CStr) -> io::Result<()>) -> io::Result<()> {
    loop {
        let names = names(directory)?;
        if names.is_empty() {
            return Ok(());
        }
        for name in names {
            act(&name)?;
        }
    }
}

fn names(directory: &OwnedFd) -> io::Result<Vec<CString>> {
    let names = Dir::read_from(directory)?.map(|entry| entry.map(|entry| entry.file_name().to_owned()));
    let names = names.filter(|name| !name.as_ref().is_ok_and(|name| [c".", c".."].contains(&name.as_c_str())));
    Ok(names.take(NAMES_MAX).collect::<Result<_, _>>()?)
}

/// Removes an entry. False if it is a directory that is not empty.
fn try_remove(directory: &OwnedFd, name: &CStr) -> io::Result<bool> {
    let result = match unlinkat(directory, name, AtFlags::empty()) {
        Err(Errno::ISDIR) => unlinkat(directory, name, AtFlags::REMOVEDIR),
        other => other,
    };
    match result {
        Ok(()) | Err(Errno::NOENT) => Ok(true),
        Err(Errno::NOTEMPTY) => Ok(false),
        Err(errno) => Err(errno.into()),
    }
}

/// Moves a directory into another, under an unused name.
fn move_up(from: &OwnedFd, name: &CStr, to: &OwnedFd, fresh: &mut u64) -> io::Result<()> {
    loop {
        *fresh += 1;
        match renameat(from, name, to, format!(".up-{fresh}")) {
            Err(Errno::EXIST | Errno::NOTEMPTY | Errno::NOTDIR) => {}
            other => return Ok(other?),
        }
    }
}
