//! The share as the only mount of a mount namespace.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};

use nix::fcntl::{OFlag, open, openat};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};
use nix::sys::stat::{Mode, fstat};
use nix::unistd::{chdir, fchdir, getegid, geteuid, pivot_root};
use rustix::fs::CWD;
use rustix::mount::{MoveMountFlags, OpenTreeFlags, move_mount, open_tree};

use super::{Step, StepError, path_of};
use crate::kernel_mounts;
use crate::mountinfo::mount_points;

/// What the library needs of it.
pub(super) struct OwnMounts {
    /// A detached mount of an engine's `/proc/self/fd`: `..` of its root is its root.
    pub(super) proc_self_fd: File,
    /// Open for reading.
    pub(super) mountinfo: File,
    /// Mount points of kernel file systems that were hidden.
    pub(super) hidden: Vec<String>,
}

impl OwnMounts {
    /// Makes a clone of the source's mounts the only mount of this process's mount namespace, which must be its own, and
    /// the root directory. `proc_self_fd`: the path of the engine's `/proc/self/fd`.
    pub(super) fn enter(tree: &OwnedFd, proc_self_fd: &str, writable: bool) -> Result<OwnMounts, StepError> {
        let proc_self = open("/proc/self", OFlag::O_PATH | OFlag::O_CLOEXEC, Mode::empty()).step("open /proc/self")?;
        let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
        let proc_self_fd = open_tree(CWD, proc_self_fd, flags).step("clone /proc/self/fd")?;
        restrict(tree, writable)?;
        make_root(tree)?;
        let mountinfo = openat(&proc_self, "mountinfo", OFlag::O_RDONLY | OFlag::O_CLOEXEC, Mode::empty())
            .step("open mountinfo")?;
        let mountinfo = File::from(mountinfo);
        let hidden = kernel_mounts::hide(|| mount_points(&mountinfo)).step("read mountinfo")?;
        Ok(OwnMounts { proc_self_fd: proc_self_fd.into(), mountinfo, hidden })
    }
}

pub(super) fn clone_tree(source: BorrowedFd<'_>) -> Result<OwnedFd, StepError> {
    open_tree(
        source,
        "",
        OpenTreeFlags::OPEN_TREE_CLONE
            | OpenTreeFlags::OPEN_TREE_CLOEXEC
            | OpenTreeFlags::AT_EMPTY_PATH
            | OpenTreeFlags::AT_RECURSIVE,
    )
    .step("clone the source's mounts")
}

pub(super) fn enter_user_namespace(others: CloneFlags) -> Result<(), StepError> {
    let (uid, gid) = (geteuid(), getegid());
    unshare(CloneFlags::CLONE_NEWUSER | others).step("new user namespace")?;
    std::fs::write("/proc/self/setgroups", "deny").step("write setgroups")?;
    std::fs::write("/proc/self/uid_map", format!("{uid} {uid} 1")).step("write uid_map")?;
    std::fs::write("/proc/self/gid_map", format!("{gid} {gid} 1")).step("write gid_map")
}

pub(super) fn reopen_in_namespace(source: &OwnedFd) -> Result<OwnedFd, StepError> {
    let path = path_of(source)?;
    let again = open(&path, OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC, Mode::empty())
        .step("open the source in the namespace")?;
    let (before, after) = (fstat(source).step("stat the source")?, fstat(&again).step("stat the source")?);
    if (before.st_dev, before.st_ino) == (after.st_dev, after.st_ino) {
        Ok(again)
    } else {
        Err(io::Error::other("it has been replaced")).step("open the source in the namespace")
    }
}

/// Sets restrictive attributes on the whole tree, submounts included. The read-only flag of a bind mount alone would leave
/// submounts writable.
///
/// The clone of a shared mount is its peer, and systemd makes all mounts of a host shared. `pivot_root` refuses a shared
/// root, and what is unmounted in a peer is unmounted on the host. A slave receives the host's mounts and unmounts below
/// the source and sends none.
fn restrict(tree: &OwnedFd, writable: bool) -> Result<(), StepError> {
    let mut attributes = libc::MOUNT_ATTR_NOSUID | libc::MOUNT_ATTR_NODEV;
    if !writable {
        attributes |= libc::MOUNT_ATTR_RDONLY;
    }
    let change = libc::mount_attr { attr_set: attributes, attr_clr: 0, propagation: libc::MS_SLAVE, userns_fd: 0 };
    // SAFETY: the descriptor is open, the path is empty and NUL-terminated, and `change` outlives the call and has the
    // size that is passed.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            tree.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH | libc::AT_RECURSIVE,
            &raw const change,
            size_of::<libc::mount_attr>(),
        )
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()).step("mount_setattr") }
}

fn make_root(tree: &OwnedFd) -> Result<(), StepError> {
    // Mounts that the host adds below the source must still appear here; mounts made here must not appear on the host.
    mount(None::<&str>, "/", None::<&str>, MsFlags::MS_REC | MsFlags::MS_SLAVE, None::<&str>)
        .step("detach mount propagation")?;
    // Any existing directory can be the mount point: it is gone two steps later.
    move_mount(tree, "", CWD, "/proc", MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH).step("mount the source")?;
    fchdir(tree).step("enter the source")?;
    pivot_root(".", ".").step("pivot_root")?;
    umount2(".", MntFlags::MNT_DETACH).step("detach the old root")?;
    chdir("/").step("enter the new root")
}
