//! The shared directory.
//!
//! The broker opens it at each engine start and never follows a symbolic link: a guest that can write above another
//! share's source could otherwise redirect it. The engine receives the descriptor.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, FileType, Mode, OFlags, ResolveFlags, Stat, fstat, fstatfs, openat, openat2, stat};
use rustix::io::Errno;
use virtiofs_contract::preflight::{Finding, Reason};

use super::finding;

/// Kernel file systems by `f_type`: proc, sysfs, cgroup, cgroup2, devpts, debugfs, tracefs, securityfs, bpf.
const KERNEL_FILE_SYSTEMS: [u64; 9] =
    [0x9fa0, 0x6265_6572, 0x0027_e0eb, 0x6367_7270, 0x1cd1, 0x6462_6720, 0x7472_6163, 0x7363_6673, 0xcafe_4a11];

const KERNEL_DIRECTORIES: [&str; 3] = ["/proc", "/sys", "/dev"];

/// Where sources are, and which are forbidden.
#[derive(Clone, Debug)]
pub(crate) struct Sources {
    /// The directory below which source paths are resolved: `/`, or the mount of the host's root in a container.
    pub(crate) root: PathBuf,
    /// Directories that sources must be in. Empty: any directory, or none if the root is not `/`.
    pub(crate) allowed: Vec<PathBuf>,
    /// Directories that no source may overlap, with their description.
    pub(crate) reserved: Vec<(&'static str, PathBuf)>,
}

impl Sources {
    /// Opens a path below the root without following symbolic links.
    pub(crate) fn open(&self, path: &Path) -> Result<OwnedFd, Errno> {
        let root = openat(CWD, &self.root, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
        let below = path.strip_prefix("/").unwrap_or(path);
        let below = if below.as_os_str().is_empty() { Path::new(".") } else { below };
        openat2(root, below, OFlags::PATH | OFlags::CLOEXEC, Mode::empty(), NO_LINKS | ResolveFlags::IN_ROOT)
    }

    /// Returns a finding if a path must not be shared.
    fn forbids(&self, path: &Path) -> Option<Finding> {
        if let Some(kernel) = KERNEL_DIRECTORIES.iter().find(|kernel| path.starts_with(kernel)) {
            let why = format!("lies below {kernel}");
            return Some(forbidden(path, &why, "share a directory of an ordinary file system"));
        }
        let overlaps = |location: &Path| location.starts_with(path) || path.starts_with(location);
        if let Some((what, location)) = self.reserved.iter().find(|(_, location)| overlaps(location)) {
            let why = format!("overlaps {what} {}", location.display());
            return Some(forbidden(path, &why, "share a directory beside it, or move it out of the share"));
        }
        let anywhere = self.allowed.is_empty() && self.root == Path::new("/");
        let inside = anywhere || self.allowed.iter().any(|allowed| path.starts_with(allowed));
        (!inside).then(|| {
            forbidden(
                path,
                "lies in none of the directories that the broker was allowed to share",
                "allow it with --allowed-source; in a cluster with the chart's value allowedSources, and replace the node's broker pod",
            )
        })
    }
}

const NO_LINKS: ResolveFlags = ResolveFlags::NO_SYMLINKS.union(ResolveFlags::NO_MAGICLINKS);

/// The directory that engines of an endpoint serve.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct SourceLocation {
    /// Canonical path.
    pub(crate) source: PathBuf,
    /// A directory below it that is served instead.
    pub(crate) sub_path: Option<PathBuf>,
}

impl SourceLocation {
    pub(crate) fn path(&self) -> PathBuf {
        self.sub_path.as_ref().map_or_else(|| self.source.clone(), |sub_path| self.source.join(sub_path))
    }
}

/// Opens the directory (`O_PATH`), or returns a finding.
pub(crate) fn open_source(location: &SourceLocation, sources: &Sources) -> Result<OwnedFd, Finding> {
    let path = &location.path();
    if let Some(finding) = sources.forbids(path) {
        return Err(finding);
    }
    let mut fd = sources.open(&location.source).map_err(|errno| not_opened(&location.source, errno))?;
    if let Some(sub_path) = &location.sub_path {
        // Guests that have the whole source can replace any component of the path.
        let flags = OFlags::PATH | OFlags::CLOEXEC;
        fd = openat2(&fd, sub_path, flags, Mode::empty(), NO_LINKS | ResolveFlags::BENEATH)
            .map_err(|errno| not_opened(path, errno))?;
    }
    let stat = fstat(&fd).map_err(|errno| not_opened(path, errno))?;
    if FileType::from_raw_mode(stat.st_mode) != FileType::Directory {
        return Err(not_a_directory(path));
    }
    check_location(path, fd.as_fd(), &stat)?;
    // An O_PATH open does not check read permission, so open it again as the engine will.
    openat(&fd, ".", OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
        .map_err(|errno| not_opened(path, errno))?;
    Ok(fd)
}

/// Detects forbidden directories under other names (bind mounts).
fn check_location(path: &Path, fd: BorrowedFd<'_>, found: &Stat) -> Result<(), Finding> {
    let magic = fstatfs(fd).map_err(|errno| not_opened(path, errno))?.f_type as u64;
    let is_dev = stat("/dev").is_ok_and(|dev| (dev.st_dev, dev.st_ino) == (found.st_dev, found.st_ino));
    if KERNEL_FILE_SYSTEMS.contains(&magic) || is_dev {
        return Err(forbidden(path, "is a kernel file system", "share a directory of an ordinary file system"));
    }
    Ok(())
}

fn not_opened(path: &Path, errno: Errno) -> Finding {
    let shown = path.display();
    match errno {
        Errno::NOENT => finding(
            Reason::SourceMissing,
            format!("source {shown} does not exist"),
            "create the directory, or mount what belongs there",
        ),
        Errno::NOTDIR => not_a_directory(path),
        Errno::LOOP => forbidden(
            path,
            "leads through a symbolic link, which could be changed under the share",
            "name the directory by its canonical path (realpath)",
        ),
        Errno::XDEV => forbidden(path, "leads out of the source", "name a directory below the source, without `..`"),
        Errno::ACCESS | Errno::PERM => finding(
            Reason::SourceUnreadable,
            format!("source {shown} cannot be searched or read by the broker"),
            "give the broker's user read and search permission on the path, or the broker CAP_DAC_READ_SEARCH",
        ),
        // systemd answers openat2 so, as a filter cannot see the mode that it would create a file with.
        Errno::NOSYS => finding(
            Reason::SourceUnreadable,
            format!("source {shown} cannot be opened: openat2: {errno}"),
            "remove the seccomp filter that denies openat2 to the broker: RestrictSUIDSGID=yes in a systemd unit, or a \
             container's seccomp profile (it is in Linux 5.6 and newer)",
        ),
        other => finding(
            Reason::SourceUnreadable,
            format!("source {shown} cannot be opened: {other}"),
            "see that the file system of the source is mounted and healthy",
        ),
    }
}

fn not_a_directory(path: &Path) -> Finding {
    finding(
        Reason::SourceNotDirectory,
        format!("source {} is not a directory", path.display()),
        "share the directory that holds it",
    )
}

fn forbidden(path: &Path, why: &str, remedy: &str) -> Finding {
    finding(Reason::SourceForbidden, format!("source {} {why}", path.display()), remedy)
}

/// The finding for a source that is released.
pub(super) fn released(source: &Path) -> Finding {
    finding(
        Reason::SourceReleased,
        format!("source {} is released, so that the host can unmount it", source.display()),
        "resume it, or wait until its release time ends",
    )
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    fn reason_of(path: &Path, runtime_dir: &Path) -> Option<Reason> {
        reason_below(path, None, runtime_dir)
    }

    fn reason_below(path: &Path, sub_path: Option<&str>, runtime_dir: &Path) -> Option<Reason> {
        let location = SourceLocation { source: path.into(), sub_path: sub_path.map(PathBuf::from) };
        open_source(&location, &sources(runtime_dir)).err().map(|finding| finding.reason)
    }

    fn sources(runtime_dir: &Path) -> Sources {
        let reserved = vec![("the runtime directory", runtime_dir.into())];
        Sources { root: "/".into(), allowed: Vec::new(), reserved }
    }

    #[test]
    fn sources_are_below_the_root_and_named_without_it() {
        let scratch = tempfile::tempdir().unwrap();
        let root = scratch.path().canonicalize().unwrap();
        std::fs::create_dir_all(root.join("host/srv/data/below")).unwrap();
        std::fs::create_dir_all(root.join("host/var/lib/kubelet/pods")).unwrap();
        symlink("/srv", root.join("host/link")).unwrap();
        let sources = Sources {
            root: root.join("host"),
            allowed: vec!["/srv/data".into(), "/var".into()],
            reserved: vec![("the kubelet's directory", "/var/lib/kubelet".into())],
        };
        for (path, reason) in [
            ("/srv/data", None),
            ("/srv/data/below", None),
            ("/srv/database", Some(Reason::SourceForbidden)),
            ("/srv", Some(Reason::SourceForbidden)),
            ("/link/data", Some(Reason::SourceForbidden)),
            ("/var/lib/kubelet/pods", Some(Reason::SourceForbidden)),
            ("/var/lib", Some(Reason::SourceForbidden)),
            ("/var/nothing", Some(Reason::SourceMissing)),
        ] {
            let location = SourceLocation { source: path.into(), sub_path: None };
            let found = open_source(&location, &sources);
            assert_eq!(found.as_ref().err().map(|finding| finding.reason), reason, "{path}");
            if let Err(finding) = found {
                assert!(!finding.message.contains("host"), "{finding}");
            }
        }
    }

    #[test]
    fn each_invalid_source_has_its_reason() {
        let scratch = tempfile::tempdir().unwrap();
        let root = scratch.path().canonicalize().unwrap();
        for directory in ["share/sub", "run"] {
            std::fs::create_dir_all(root.join(directory)).unwrap();
        }
        std::fs::write(root.join("file"), "").unwrap();
        symlink("share", root.join("link")).unwrap();
        let run = root.join("run");
        let table = [
            (root.join("share"), None),
            (root.join("nowhere"), Some(Reason::SourceMissing)),
            (root.join("file"), Some(Reason::SourceNotDirectory)),
            (root.join("file/below"), Some(Reason::SourceNotDirectory)),
            (root.join("link"), Some(Reason::SourceForbidden)),
            (root.join("link/sub"), Some(Reason::SourceForbidden)),
            (root.clone(), Some(Reason::SourceForbidden)),
            (run.clone(), Some(Reason::SourceForbidden)),
            (run.join("engines"), Some(Reason::SourceForbidden)),
            ("/".into(), Some(Reason::SourceForbidden)),
            ("/proc/self".into(), Some(Reason::SourceForbidden)),
            ("/sys".into(), Some(Reason::SourceForbidden)),
            ("/dev/shm".into(), Some(Reason::SourceForbidden)),
        ];
        for (path, reason) in table {
            assert_eq!(reason_of(&path, &run), reason, "{}", path.display());
        }
    }

    #[test]
    fn denied_openat2_is_reported() {
        let finding = not_opened(Path::new("/srv/data"), Errno::NOSYS);
        assert_eq!(finding.reason, Reason::SourceUnreadable);
        assert!(finding.message.contains("openat2") && finding.remedy.contains("RestrictSUIDSGID"), "{finding}");
    }

    #[test]
    fn sub_path_never_leaves_the_source() {
        let scratch = tempfile::tempdir().unwrap();
        let root = scratch.path().canonicalize().unwrap();
        std::fs::create_dir_all(root.join("share/a/b")).unwrap();
        std::fs::create_dir_all(root.join("secret")).unwrap();
        std::fs::write(root.join("share/file"), "").unwrap();
        symlink("../secret", root.join("share/out")).unwrap();
        symlink("a", root.join("share/in")).unwrap();
        symlink("/", root.join("share/root")).unwrap();
        let run = root.join("run");
        for (sub_path, reason) in [
            ("a/b", None),
            ("missing", Some(Reason::SourceMissing)),
            ("file", Some(Reason::SourceNotDirectory)),
            ("out", Some(Reason::SourceForbidden)),
            ("in/b", Some(Reason::SourceForbidden)),
            ("root", Some(Reason::SourceForbidden)),
            ("../secret", Some(Reason::SourceForbidden)),
            ("a/../../secret", Some(Reason::SourceForbidden)),
        ] {
            assert_eq!(reason_below(&root.join("share"), Some(sub_path), &run), reason, "{sub_path}");
        }
    }

    #[test]
    fn overlap_compares_whole_components() {
        let scratch = tempfile::tempdir().unwrap();
        let root = scratch.path().canonicalize().unwrap();
        std::fs::create_dir(root.join("runner")).unwrap();
        assert_eq!(reason_of(&root.join("runner"), &root.join("run")), None);
    }
}
