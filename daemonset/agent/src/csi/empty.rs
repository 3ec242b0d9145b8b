//! A directory emptied of whatever somebody has put there, however much and deep. No symbolic link is followed, and no
//! mount point entered. What lies in a directory is brought up before that is removed: two are open at most.

use std::ffi::{CStr, CString};
use std::io;
use std::os::fd::{AsFd, OwnedFd};

use rustix::fs::{AtFlags, Dir, Mode, OFlags, StatxAttributes, StatxFlags, openat, renameat, statx, unlinkat};
use rustix::io::Errno;
use rustix::path::Arg;

/// So many names are kept at a time.
const NAMES_MOST: usize = 1024;

/// Opens the directory of this name.
///
/// # Errors
/// It cannot be opened, or something is mounted there, which is nobody's to empty.
pub(super) fn open(at: impl AsFd, name: impl Arg) -> io::Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let directory = openat(at, name, flags, Mode::empty())?;
    let found = statx(&directory, c"", AtFlags::EMPTY_PATH, StatxFlags::BASIC_STATS)?;
    if found.stx_attributes.contains(StatxAttributes::MOUNT_ROOT) {
        return Err(io::Error::other("a file system is mounted there"));
    }
    Ok(directory)
}

/// Removes all that lies in a directory.
///
/// # Errors
/// Something cannot be removed.
pub(super) fn empty(directory: &OwnedFd) -> io::Result<()> {
    let mut fresh = 0;
    for_all_in(directory, |name| {
        if removed(directory, name)? {
            return Ok(());
        }
        let below = open(directory, name)?;
        for_all_in(&below, |name| match removed(&below, name)? {
            true => Ok(()),
            false => bring_up(&below, name, directory, &mut fresh),
        })
    })
}

/// Does something with each name until there are none.
fn for_all_in(directory: &OwnedFd, mut act: impl FnMut(&CStr) -> io::Result<()>) -> io::Result<()> {
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
    Ok(names.take(NAMES_MOST).collect::<Result<_, _>>()?)
}

/// Is it gone now? Only a directory that is not empty stays.
fn removed(directory: &OwnedFd, name: &CStr) -> io::Result<bool> {
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

/// Moves a directory into another, under the first name that nothing else has.
fn bring_up(from: &OwnedFd, name: &CStr, to: &OwnedFd, fresh: &mut u64) -> io::Result<()> {
    loop {
        *fresh += 1;
        match renameat(from, name, to, format!(".up-{fresh}")) {
            Err(Errno::EXIST | Errno::NOTEMPTY | Errno::NOTDIR) => {}
            other => return Ok(other?),
        }
    }
}
