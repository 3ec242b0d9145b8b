//! A file system in memory of which nothing but the test has a part: its fill level is the memory that the test has freed or
//! not, as the kernel counts it, whatever else runs on the machine.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;

use rustix::fs::{Mode, OFlags, fstatvfs, openat};
use rustix::mount::{FsMountFlags, FsOpenFlags, MountAttrFlags, fsconfig_create, fsconfig_set_string, fsmount, fsopen};

/// A tmpfs that is mounted nowhere.
#[derive(Debug)]
pub struct Tmpfs {
    root: OwnedFd,
}

impl Tmpfs {
    /// Creates one of up to that many bytes.
    ///
    /// # Errors
    /// The kernel's; it requires `CAP_SYS_ADMIN`.
    pub fn new(bytes: u64) -> io::Result<Self> {
        let context = fsopen("tmpfs", FsOpenFlags::FSOPEN_CLOEXEC)?;
        fsconfig_set_string(&context, "size", bytes.to_string())?;
        fsconfig_create(&context)?;
        let root = fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, MountAttrFlags::empty())?;
        Ok(Self { root })
    }

    /// A new file without a name. Its memory is free as soon as nobody has it open or mapped.
    ///
    /// # Errors
    /// The kernel's.
    pub fn file(&self) -> io::Result<File> {
        let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
        Ok(openat(&self.root, ".", flags, Mode::from_raw_mode(0o600))?.into())
    }

    /// Bytes that files have.
    ///
    /// # Errors
    /// The kernel's.
    pub fn used(&self) -> io::Result<u64> {
        let space = fstatvfs(&self.root)?;
        Ok((space.f_blocks - space.f_bfree) * space.f_frsize)
    }
}
