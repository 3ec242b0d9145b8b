//! The shared directory.
//!
//! Opened by the broker at each engine start, and never through a symbolic link: a guest that can write
//! above another share's source could otherwise point it anywhere. The engine gets the descriptor.

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

/// Places that must not be shared because the broker itself lives there.
#[derive(Clone, Debug)]
pub(crate) struct Reserved {
    runtime_dir: PathBuf,
}

impl Reserved {
    /// `runtime_dir` is canonical.
    pub(crate) fn new(runtime_dir: PathBuf) -> Self {
        Reserved { runtime_dir }
    }

    fn overlaps(&self, source: &Path) -> bool {
        self.runtime_dir.starts_with(source) || source.starts_with(&self.runtime_dir)
    }
}

/// The directory that engines of an endpoint serve.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Place {
    /// Canonical path.
    pub(crate) source: PathBuf,
    /// A directory below it that is served instead.
    pub(crate) sub_path: Option<PathBuf>,
}

impl Place {
    pub(crate) fn path(&self) -> PathBuf {
        self.sub_path.as_ref().map_or_else(|| self.source.clone(), |sub_path| self.source.join(sub_path))
    }
}

/// Opens the directory (`O_PATH`), or says what is wrong with it.
pub(crate) fn open_source(place: &Place, reserved: &Reserved) -> Result<OwnedFd, Finding> {
    let path = &place.path();
    if let Some(kernel) = KERNEL_DIRECTORIES.iter().find(|kernel| path.starts_with(kernel)) {
        return Err(forbidden(path, &format!("lies below {kernel}"), "share a directory of an ordinary file system"));
    }
    if reserved.overlaps(path) {
        let why = format!("overlaps the runtime directory {}", reserved.runtime_dir.display());
        return Err(forbidden(
            path,
            &why,
            "move the runtime directory out of the share, or share a directory beside it",
        ));
    }
    let no_links = ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
    let flags = OFlags::PATH | OFlags::CLOEXEC;
    let mut fd = openat2(CWD, &place.source, flags, Mode::empty(), no_links)
        .map_err(|errno| not_opened(&place.source, errno))?;
    if let Some(sub_path) = &place.sub_path {
        // Guests that have the whole source can rename and replace whatever lies on the way.
        fd = openat2(&fd, sub_path, flags, Mode::empty(), no_links | ResolveFlags::BENEATH)
            .map_err(|errno| not_opened(path, errno))?;
    }
    let stat = fstat(&fd).map_err(|errno| not_opened(path, errno))?;
    if FileType::from_raw_mode(stat.st_mode) != FileType::Directory {
        return Err(not_a_directory(path));
    }
    check_place(path, fd.as_fd(), &stat)?;
    // An O_PATH descriptor says nothing about the right to read; what the engine will do, does.
    openat(&fd, ".", OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
        .map_err(|errno| not_opened(path, errno))?;
    Ok(fd)
}

/// The same places under other names (bind mounts).
fn check_place(path: &Path, fd: BorrowedFd<'_>, found: &Stat) -> Result<(), Finding> {
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
            format!("source {shown} may not be entered or read by the broker"),
            "give the broker's user read and search permission on the path, or the broker CAP_DAC_READ_SEARCH",
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

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    fn reason_of(path: &Path, runtime_dir: &Path) -> Option<Reason> {
        reason_below(path, None, runtime_dir)
    }

    fn reason_below(path: &Path, sub_path: Option<&str>, runtime_dir: &Path) -> Option<Reason> {
        let place = Place { source: path.into(), sub_path: sub_path.map(PathBuf::from) };
        open_source(&place, &Reserved::new(runtime_dir.into())).err().map(|finding| finding.reason)
    }

    #[test]
    fn each_kind_of_wrong_source_has_its_reason() {
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
    fn a_directory_below_the_source_is_never_outside_of_it() {
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
    fn a_name_that_only_begins_like_the_runtime_directory_is_another_one() {
        let scratch = tempfile::tempdir().unwrap();
        let root = scratch.path().canonicalize().unwrap();
        std::fs::create_dir(root.join("runner")).unwrap();
        assert_eq!(reason_of(&root.join("runner"), &root.join("run")), None);
    }
}
