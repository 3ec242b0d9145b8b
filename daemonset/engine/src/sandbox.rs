//! The sandbox: the share becomes the root directory, and nothing else can be reached.
//!
//! The library's own sandbox forks, so that the process that the broker started is not the one that serves, and takes a
//! path, which a guest with write access above the share could have replaced. This one does neither: it works on the
//! descriptor that the broker opened, in this process.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::PathBuf;

use nix::fcntl::{OFlag, open, openat, readlink};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};
use nix::sys::stat::{Mode, fstat};
use nix::unistd::{Gid, chdir, chroot, fchdir, getegid, geteuid, getgroups, pivot_root, setgroups};
use rustix::fs::CWD;
use rustix::mount::{MoveMountFlags, OpenTreeFlags, move_mount, open_tree};
use virtiofs_config::{EngineConfig, Sandbox};
use virtiofs_contract::preflight::{Finding, Reason};

use crate::kernel_mounts;
use crate::mountinfo::mount_points;

/// What the library needs inside the sandbox, opened before it was entered.
pub(crate) struct Jail {
    /// The sandbox that was built; never `Auto`.
    pub(crate) mode: Sandbox,
    /// True if the engine has a user namespace of its own.
    pub(crate) user_namespace: bool,
    /// True if the engine is in the initial user namespace.
    pub(crate) initial_user_namespace: bool,
    /// The share's root as this process sees it.
    pub(crate) root_dir: String,
    /// `/proc/self/fd`.
    pub(crate) proc_self_fd: File,
    /// `/proc/self/mountinfo`, open for reading.
    pub(crate) mountinfo: File,
    /// Prefix to strip from mount points in it.
    pub(crate) mountinfo_prefix: Option<String>,
    /// Mount points below the root of kernel file systems that were hidden.
    pub(crate) hidden: Vec<String>,
}

const DROP_GROUPS: &str = "drop supplementary groups";

/// A step of the set-up that failed.
#[derive(Debug, thiserror::Error)]
#[error("{step}: {error}")]
struct StepError {
    step: &'static str,
    error: io::Error,
}

trait Step<T> {
    fn step(self, step: &'static str) -> Result<T, StepError>;
}

impl<T, E: Into<io::Error>> Step<T> for Result<T, E> {
    fn step(self, step: &'static str) -> Result<T, StepError> {
        self.map_err(|error| StepError { step, error: error.into() })
    }
}

/// Enters the sandbox of the configuration. After an error the process must end.
pub(crate) fn enter(config: &EngineConfig, source: OwnedFd) -> Result<Jail, Finding> {
    let root = geteuid().is_root();
    match config.sandbox {
        Sandbox::Namespace => namespace(config, &source, root).map_err(|e| unavailable("Namespace", &e)),
        Sandbox::Chroot => chroot_only(&source).map_err(|e| unavailable("Chroot", &e)),
        Sandbox::None if root && in_initial_user_namespace() => Err(Finding {
            reason: Reason::SandboxUnavailable,
            message: "spec.engine.sandbox None is refused for root".into(),
            remedy: "use Auto, or run the broker as another user".into(),
        }),
        Sandbox::None => none(&source).map_err(|e| unavailable("None", &e)),
        // Decided before anything is changed: a half-built namespace cannot be left again.
        Sandbox::Auto if root && !may(caps::Capability::CAP_SYS_ADMIN) => {
            chroot_only(&source).map_err(|e| unavailable("Chroot", &e))
        }
        Sandbox::Auto => namespace(config, &source, root).map_err(|e| unavailable("Namespace", &e)),
    }
}

fn may(capability: caps::Capability) -> bool {
    caps::has_cap(None, caps::CapSet::Effective, capability).unwrap_or(false)
}

/// True in the initial user namespace. Only there do capabilities apply to files of all owners.
fn in_initial_user_namespace() -> bool {
    std::fs::read_to_string("/proc/self/uid_map").is_ok_and(|map| is_identity_map(&map))
}

fn is_identity_map(map: &str) -> bool {
    map.split_whitespace().eq(["0", "0", "4294967295"])
}

fn unavailable(mode: &str, error: &StepError) -> Finding {
    let remedy = match mode {
        _ if error.step == DROP_GROUPS => "give the broker CAP_SETGID, or start it without supplementary groups",
        "Namespace" => {
            "give the broker CAP_SYS_ADMIN and a seccomp and AppArmor profile that allow mount and pivot_root, allow \
             user namespaces to its user, or set spec.engine.sandbox to Chroot"
        }
        "Chroot" => "give the broker CAP_SYS_CHROOT, or CAP_SYS_ADMIN for spec.engine.sandbox Namespace",
        _ => "mount /proc where the broker runs",
    };
    Finding {
        reason: Reason::SandboxUnavailable,
        message: format!("sandbox {mode} cannot be built: {error}"),
        remedy: remedy.into(),
    }
}

/// `Namespace`: namespaces of its own, with the share as the only mount.
fn namespace(config: &EngineConfig, source: &OwnedFd, root: bool) -> Result<Jail, StepError> {
    let initial_user_namespace = root && in_initial_user_namespace();
    let others = CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWIPC | CloneFlags::CLONE_NEWUTS;
    let tree = if root {
        let tree = clone_tree(source.as_fd())?;
        unshare(others | CloneFlags::CLONE_NEWNS).step("new namespaces")?;
        tree
    } else {
        // Cloning a mount needs the user namespace, in which mounts of the old mount namespace are foreign: the source is
        // opened again and must be the same directory.
        enter_user_namespace(others | CloneFlags::CLONE_NEWNS)?;
        clone_tree(reopen_in_namespace(source)?.as_fd())?
    };
    let proc_self = open("/proc/self", OFlag::O_PATH | OFlag::O_CLOEXEC, Mode::empty()).step("open /proc/self")?;
    // A detached mount of its own: `..` of its root is its root.
    let proc_self_fd =
        open_tree(CWD, "/proc/self/fd", OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC)
            .step("clone /proc/self/fd")?;
    restrict(&tree, config.writable())?;
    drop_groups(root)?;
    make_root(&tree)?;
    let mountinfo =
        openat(&proc_self, "mountinfo", OFlag::O_RDONLY | OFlag::O_CLOEXEC, Mode::empty()).step("open mountinfo")?;
    let mountinfo = File::from(mountinfo);
    let hidden = kernel_mounts::hide(|| mount_points(&mountinfo)).step("read mountinfo")?;
    Ok(Jail {
        mode: Sandbox::Namespace,
        user_namespace: !root,
        initial_user_namespace,
        root_dir: "/".into(),
        proc_self_fd: proc_self_fd.into(),
        mountinfo,
        mountinfo_prefix: None,
        hidden,
    })
}

fn clone_tree(source: std::os::fd::BorrowedFd<'_>) -> Result<OwnedFd, StepError> {
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

fn enter_user_namespace(others: CloneFlags) -> Result<(), StepError> {
    let (uid, gid) = (geteuid(), getegid());
    unshare(CloneFlags::CLONE_NEWUSER | others).step("new user namespace")?;
    std::fs::write("/proc/self/setgroups", "deny").step("write setgroups")?;
    std::fs::write("/proc/self/uid_map", format!("{uid} {uid} 1")).step("write uid_map")?;
    std::fs::write("/proc/self/gid_map", format!("{gid} {gid} 1")).step("write gid_map")
}

fn reopen_in_namespace(source: &OwnedFd) -> Result<OwnedFd, StepError> {
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

fn path_of(fd: &OwnedFd) -> Result<PathBuf, StepError> {
    readlink(format!("/proc/self/fd/{}", fd.as_raw_fd()).as_str()).map(PathBuf::from).step("path of the source")
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

/// Drops the broker's supplementary groups, which would give guest users access to files of those groups. Without any, no
/// capability is needed.
fn drop_groups(root: bool) -> Result<(), StepError> {
    if !root || getgroups().step("read supplementary groups")?.is_empty() {
        return Ok(());
    }
    setgroups(&[] as &[Gid]).step(DROP_GROUPS)
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

/// `Chroot`: the share as root directory.
fn chroot_only(source: &OwnedFd) -> Result<Jail, StepError> {
    let (proc_self_fd, mountinfo) = open_proc()?;
    let initial_user_namespace = in_initial_user_namespace();
    let prefix = path_of(source)?;
    drop_groups(true)?;
    fchdir(source).step("enter the source")?;
    chroot(".").step("chroot")?;
    chdir("/").step("enter the new root")?;
    Ok(Jail {
        mode: Sandbox::Chroot,
        user_namespace: false,
        initial_user_namespace,
        root_dir: "/".into(),
        proc_self_fd,
        mountinfo,
        mountinfo_prefix: Some(prefix.to_string_lossy().into_owned()),
        hidden: Vec::new(),
    })
}

fn none(source: &OwnedFd) -> Result<Jail, StepError> {
    let (proc_self_fd, mountinfo) = open_proc()?;
    Ok(Jail {
        mode: Sandbox::None,
        user_namespace: false,
        initial_user_namespace: in_initial_user_namespace(),
        root_dir: path_of(source)?.to_string_lossy().into_owned(),
        proc_self_fd,
        mountinfo,
        mountinfo_prefix: None,
        hidden: Vec::new(),
    })
}

fn open_proc() -> Result<(File, File), StepError> {
    let fds = open("/proc/self/fd", OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC, Mode::empty())
        .step("open /proc/self/fd")?;
    Ok((fds.into(), File::open("/proc/self/mountinfo").step("open mountinfo")?))
}

#[cfg(test)]
mod tests {
    use super::is_identity_map;

    #[test]
    fn the_initial_user_namespace_maps_all_ids() {
        assert!(is_identity_map("         0          0 4294967295\n"));
        assert!(!is_identity_map("         0     100000      65536\n"));
        assert!(!is_identity_map("         0          0 4294967295\n 1 2 3\n"));
        assert!(!is_identity_map(""));
    }
}
