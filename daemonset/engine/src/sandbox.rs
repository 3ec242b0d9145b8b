//! The sandbox: the share becomes the root directory, and nothing else can be reached.
//!
//! The library's own sandbox forks, so that the process that the broker started is not the one that serves, and takes a
//! path, which a guest with write access above the share could have replaced. This one does neither: it works on the
//! descriptor that the broker opened, in this process.

mod by_child;
mod own_mounts;

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::PathBuf;

use nix::fcntl::{OFlag, open, readlink};
use nix::sched::{CloneFlags, unshare};
use nix::sys::stat::Mode;
use nix::unistd::{Gid, chdir, chroot, fchdir, geteuid, getgroups, setgroups};
use virtiofs_config::{EngineConfig, Sandbox};
use virtiofs_contract::preflight::{Finding, Reason};

use own_mounts::{OwnMounts, clone_tree, enter_user_namespace, reopen_in_namespace};

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
    /// Why other mounts than the source's are within reach; none: they are not.
    pub(crate) weakness: Option<String>,
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
        Sandbox::Chroot => chroot_only(config, &source).map_err(|e| unavailable("Chroot", &e)),
        Sandbox::None if root && in_initial_user_namespace() => Err(Finding {
            reason: Reason::SandboxUnavailable,
            message: "spec.engine.sandbox None is refused for root".into(),
            remedy: "use Auto, or run the broker as another user".into(),
        }),
        Sandbox::None => none(&source).map_err(|e| unavailable("None", &e)),
        // Decided before anything is changed: a half-built namespace cannot be left again.
        Sandbox::Auto if root && !may(caps::Capability::CAP_SYS_ADMIN) => {
            chroot_only(config, &source).map_err(|e| unavailable("Chroot", &e))
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
    let mounts = OwnMounts::enter(&tree, "/proc/self/fd", config.writable())?;
    drop_groups(root)?;
    let OwnMounts { proc_self_fd, mountinfo, hidden } = mounts;
    Ok(Jail {
        mode: Sandbox::Namespace,
        user_namespace: !root,
        initial_user_namespace,
        root_dir: "/".into(),
        proc_self_fd,
        mountinfo,
        mountinfo_prefix: None,
        hidden,
        weakness: None,
    })
}

fn path_of(fd: &OwnedFd) -> Result<PathBuf, StepError> {
    readlink(format!("/proc/self/fd/{}", fd.as_raw_fd()).as_str()).map(PathBuf::from).step("path of the source")
}

/// Drops the broker's supplementary groups, which would give guest users access to files of those groups. Without any, no
/// capability is needed.
fn drop_groups(root: bool) -> Result<(), StepError> {
    if !root || getgroups().step("read supplementary groups")?.is_empty() {
        return Ok(());
    }
    setgroups(&[] as &[Gid]).step(DROP_GROUPS)
}

/// `Chroot`: the share as root directory, in a mount namespace of which a child of this process makes it the only mount.
/// Where no child can, the root directory is all that hides the rest.
fn chroot_only(config: &EngineConfig, source: &OwnedFd) -> Result<Jail, StepError> {
    let initial_user_namespace = in_initial_user_namespace();
    drop_groups(true)?;
    let mut jail = match by_child::build(source, config.writable()) {
        Ok(built) => {
            fchdir(&built.root).step("enter the source")?;
            let OwnMounts { proc_self_fd, mountinfo, hidden } = built.mounts;
            by_child::keep_alive(&mountinfo)?;
            Jail { proc_self_fd, mountinfo, hidden, weakness: None, ..none(source)? }
        }
        Err(error) => {
            let jail = none(source)?;
            fchdir(source).step("enter the source")?;
            Jail { mountinfo_prefix: Some(jail.root_dir.clone()), weakness: Some(error.to_string()), ..jail }
        }
    };
    chroot(".").step("chroot")?;
    chdir("/").step("enter the new root")?;
    (jail.mode, jail.root_dir, jail.initial_user_namespace) = (Sandbox::Chroot, "/".into(), initial_user_namespace);
    Ok(jail)
}

/// `None`: nothing but what [`crate::confinement`] adds.
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
        weakness: Some("it changes nothing".into()),
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
