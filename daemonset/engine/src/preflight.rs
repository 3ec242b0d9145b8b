//! Preflight: tries what the configuration needs, inside the sandbox and with the remaining capabilities.
//!
//! A capability bit proves nothing: in a user namespace the bit is set and directories open by file handle, but regular
//! files do not. So a regular file of every file system is opened by file handle, with the code that the library uses.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;

use nix::sys::statvfs::{FsFlags, statvfs};
use virtiofs_config::{EngineConfig, InodeFileHandles};
use virtiofs_contract::preflight::{Finding, HandleOutcome, MountPreflight, Reason};
use virtiofsd::passthrough::file_handle::FileHandle;
use virtiofsd::passthrough::mount_fd::MountFds;
use virtiofsd::passthrough::util::reopen_fd_through_proc;

use crate::kernel_mounts;
use crate::limits::MAX_MOUNTS;
use crate::mountinfo::{Mount, mounts_below};
use crate::regular_file::Search;
use crate::sandbox::Jail;

/// The results.
pub(crate) struct Tried {
    /// How inodes can be held here.
    pub(crate) inode_file_handles: InodeFileHandles,
    /// One entry for each file system of the share.
    pub(crate) mounts: Vec<MountPreflight>,
}

/// Tries the share's root and its submounts.
pub(crate) fn try_features(config: &EngineConfig, jail: &Jail, findings: &mut Vec<Finding>) -> Result<Tried, Finding> {
    let root = Path::new(&jail.root_dir);
    fs::read_dir(root).map_err(|error| unreadable(&error))?;
    let mounts = mounts_below(&jail.mountinfo, jail.mountinfo_prefix.as_deref(), &jail.root_dir);
    let mounts = mounts.map_err(|error| unreadable(&error))?;
    check_writable(config, root)?;
    check_kernel_mounts(config, jail, &mounts, findings)?;
    let mut search = Search::new(jail.initial_user_namespace);
    let mounts: Vec<_> =
        mounts.into_iter().take(MAX_MOUNTS).map(|mount| try_mount(config, jail, mount, &mut search)).collect();
    findings.extend(mounts.iter().find(|mount| !keeps_positions(&mount.fs_type, kernel())).map(unstable_positions));
    let inode_file_handles = decide(config.inode_file_handles, &mounts, jail.initial_user_namespace, findings)?;
    Ok(Tried { inode_file_handles, mounts })
}

/// The roots of the file systems on which files can be opened by file handle.
pub(crate) fn openable_mounts(jail: &Jail, tried: &Tried) -> Vec<File> {
    if tried.inode_file_handles == InodeFileHandles::Never {
        return Vec::new();
    }
    let root = Path::new(&jail.root_dir);
    let works =
        |mount: &&MountPreflight| matches!(mount.file_handles, HandleOutcome::Works | HandleOutcome::DirectoryOnly);
    tried.mounts.iter().filter(works).filter_map(|mount| File::open(root.join(&mount.path)).ok()).collect()
}

/// This kernel's version, major and minor.
fn kernel() -> (u32, u32) {
    let name = rustix::system::uname();
    let mut numbers = name.release().to_str().unwrap_or("").split('.').map_while(|number| number.parse().ok());
    (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0))
}

/// True if a directory position means the same to another open file of that directory. Measured on ext4, xfs, btrfs and
/// tmpfs (which has stable positions since Linux 6.6); known not to be so on those named here.
fn keeps_positions(fs_type: &str, kernel: (u32, u32)) -> bool {
    match fs_type {
        "tmpfs" | "ramfs" => kernel >= (6, 6),
        "overlay" | "9p" | "nfs" | "nfs4" | "cifs" | "smb3" => false,
        other => !other.starts_with("fuse"),
    }
}

fn unstable_positions(mount: &MountPreflight) -> Finding {
    Finding {
        reason: Reason::DirectoryPositionsUnstable,
        message: format!(
            "{} on {} does not keep directory positions: a listing that was begun before the engine is replaced may miss \
             or repeat entries",
            mount.fs_type, mount.path
        ),
        remedy: "share a directory of ext4, xfs, btrfs, or tmpfs of Linux 6.6 or later".into(),
    }
}

fn unreadable(error: &io::Error) -> Finding {
    Finding {
        reason: Reason::SourceUnreadable,
        message: format!("the source cannot be read inside the sandbox: {error}"),
        remedy: "let the broker's user read the directory, or give the broker CAP_DAC_READ_SEARCH".into(),
    }
}

fn check_writable(config: &EngineConfig, root: &Path) -> Result<(), Finding> {
    let read_only = statvfs(root).is_ok_and(|fs| fs.flags().contains(FsFlags::ST_RDONLY));
    if config.writable() && read_only {
        return Err(Finding {
            reason: Reason::SourceReadOnly,
            message: "spec.access is ReadWrite, but the source is mounted read-only".into(),
            remedy: "set spec.access to ReadOnly, or mount the source read-write".into(),
        });
    }
    Ok(())
}

/// Refuses a writable share if kernel file systems below the source cannot be hidden from the guest.
fn check_kernel_mounts(
    config: &EngineConfig,
    jail: &Jail,
    mounts: &[Mount],
    findings: &mut Vec<Finding>,
) -> Result<(), Finding> {
    let below = mounts.iter().filter(|mount| mount.relative != "." && kernel_mounts::is_kernel(&mount.fs_type));
    let in_view: Vec<String> = below.map(|mount| mount.relative.clone()).collect();
    match kernel_mounts::in_view(&in_view) {
        Some(finding) if config.writable() => return Err(finding),
        finding => findings.extend(finding),
    }
    findings.extend(kernel_mounts::hidden(&jail.hidden));
    Ok(())
}

fn try_mount(config: &EngineConfig, jail: &Jail, mount: Mount, search: &mut Search) -> MountPreflight {
    let file_handles = if config.inode_file_handles == InodeFileHandles::Never {
        HandleOutcome::NotTried
    } else {
        try_handles(jail, &mount.path, search)
    };
    MountPreflight { path: mount.relative, fs_type: mount.fs_type, file_handles }
}

fn try_handles(jail: &Jail, mount: &Path, search: &mut Search) -> HandleOutcome {
    match open_by_handle(jail, mount) {
        HandleOutcome::Works => match search.regular_file(mount) {
            Some(file) => open_by_handle(jail, &file),
            None => HandleOutcome::DirectoryOnly,
        },
        other => other,
    }
}

fn open_by_handle(jail: &Jail, path: &Path) -> HandleOutcome {
    match handle_round_trip(jail, path) {
        Ok(true) => HandleOutcome::Works,
        Ok(false) => HandleOutcome::Unsupported,
        Err(error) => {
            tracing::debug!(path = %path.display(), "file handle: {error}");
            HandleOutcome::NotPermitted
        }
    }
}

/// Makes a file handle of `path`, opens it and reads a byte. `false`: the file system has no file handles.
fn handle_round_trip(jail: &Jail, path: &Path) -> io::Result<bool> {
    let file = fs::OpenOptions::new().read(true).custom_flags(libc::O_PATH | libc::O_NOFOLLOW).open(path)?;
    let Some(handle) = FileHandle::from_fd(&file)? else { return Ok(false) };
    let mounts = MountFds::new(jail.mountinfo.try_clone()?, jail.mountinfo_prefix.clone());
    let openable = handle
        .to_openable(&mounts, |fd, flags| reopen_fd_through_proc(&fd, flags, &jail.proc_self_fd))
        .map_err(|error| error.into_inner())?;
    // Someone may hold a lease on the file: an open that waits for its end would delay the start.
    let opened: File = match openable.open(libc::O_RDONLY | libc::O_NONBLOCK | libc::O_CLOEXEC) {
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(true),
        opened => opened?,
    };
    if opened.metadata()?.is_file() {
        opened.read_at(&mut [0], 0)?;
    }
    Ok(true)
}

/// How inodes are held, given the results. The library falls back by itself only if a file system has no file handles; if
/// it has them and they do not open, every access would fail.
fn decide(
    wanted: InodeFileHandles,
    mounts: &[MountPreflight],
    initial_user_namespace: bool,
    findings: &mut Vec<Finding>,
) -> Result<InodeFileHandles, Finding> {
    let unusable = |mount: &&MountPreflight| match mount.file_handles {
        HandleOutcome::NotPermitted => true,
        HandleOutcome::DirectoryOnly => !initial_user_namespace,
        _ => false,
    };
    let unsupported = |mount: &&MountPreflight| mount.file_handles == HandleOutcome::Unsupported;
    let worst = mounts.iter().find(unusable).or_else(|| mounts.iter().find(unsupported));
    match (wanted, worst) {
        (InodeFileHandles::Never, _) | (_, None) => Ok(wanted),
        (InodeFileHandles::Mandatory, Some(mount)) => Err(handles_finding(Reason::FileHandlesRequired, mount)),
        (InodeFileHandles::Prefer, Some(mount)) => {
            findings.push(handles_finding(Reason::FileHandlesUnavailable, mount));
            let others_work = !unusable(&mount) && mount.path != ".";
            Ok(if others_work { InodeFileHandles::Prefer } else { InodeFileHandles::Never })
        }
    }
}

fn handles_finding(reason: Reason, mount: &MountPreflight) -> Finding {
    let (what, remedy) = if mount.file_handles == HandleOutcome::Unsupported {
        (
            "has no file handles",
            "share a directory of ext4, xfs, btrfs or tmpfs (overlayfs: with nfs_export=on), or raise the limit of \
             open files and leave spec.engine.inodeFileHandles at Prefer",
        )
    } else {
        (
            "has file handles, but opening them is not permitted",
            "give the broker CAP_DAC_READ_SEARCH in the initial user namespace (a rootless container cannot have it), \
             and no seccomp profile that forbids name_to_handle_at or open_by_handle_at, or raise the limit of open \
             files and leave spec.engine.inodeFileHandles at Prefer",
        )
    };
    Finding {
        reason,
        message: format!(
            "{} on {} {what}; each inode that the guest holds takes a descriptor",
            mount.fs_type, mount.path
        ),
        remedy: remedy.into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mount(path: &str, file_handles: HandleOutcome) -> MountPreflight {
        MountPreflight { path: path.into(), fs_type: "ext4".into(), file_handles }
    }

    #[test]
    fn the_results_decide() {
        use HandleOutcome::*;
        use InodeFileHandles::*;
        type Case<'a> = (InodeFileHandles, &'a [(&'a str, HandleOutcome)], bool, Option<InodeFileHandles>);
        let cases: &[Case<'_>] = &[
            (Prefer, &[(".", Works)], true, Some(Prefer)),
            (Prefer, &[(".", DirectoryOnly)], true, Some(Prefer)),
            (Prefer, &[(".", DirectoryOnly)], false, Some(Never)),
            (Prefer, &[(".", NotPermitted)], true, Some(Never)),
            (Prefer, &[(".", Unsupported)], true, Some(Never)),
            (Prefer, &[(".", Works), ("sub", Unsupported)], true, Some(Prefer)),
            (Prefer, &[(".", Works), ("a", Unsupported), ("b", NotPermitted)], true, Some(Never)),
            (Mandatory, &[(".", Works), ("sub", Unsupported)], true, None),
            (Mandatory, &[(".", Works)], true, Some(Mandatory)),
            (Never, &[(".", NotTried)], false, Some(Never)),
        ];
        for (wanted, mounts, initial, expected) in cases {
            let mounts: Vec<_> = mounts.iter().map(|(path, outcome)| mount(path, *outcome)).collect();
            let mut findings = Vec::new();
            let decided = decide(*wanted, &mounts, *initial, &mut findings).ok();
            assert_eq!(decided, *expected, "{wanted:?} {mounts:?} {initial}");
        }
    }

    #[test]
    fn positions_are_stable_on_known_file_systems() {
        for (fs_type, kernel, stable) in [
            ("ext4", (5, 4), true),
            ("xfs", (6, 12), true),
            ("tmpfs", (6, 5), false),
            ("tmpfs", (6, 6), true),
            ("overlay", (6, 18), false),
            ("nfs4", (6, 18), false),
            ("fuse.sshfs", (6, 18), false),
        ] {
            assert_eq!(keeps_positions(fs_type, kernel), stable, "{fs_type} {kernel:?}");
        }
        assert!(kernel() > (4, 0));
    }
}
