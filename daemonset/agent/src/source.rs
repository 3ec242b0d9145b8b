//! Where a share's source really is, and whether it is there.
//!
//! A path is resolved once, when a share is first seen; from then on the place that was found is the source.
//! Resolving it anew each time would let whoever can write to a parent directory, a guest of another share
//! perhaps, put a symbolic link in the way and have any directory of the host served.

use std::fs;
use std::io::{self, ErrorKind};
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{
    AtFlags, CWD, FileType, Mode, OFlags, ResolveFlags, StatxAttributes, StatxFlags, fstat, fstatvfs, openat, openat2,
    stat, statx,
};
use rustix::io::Errno;
use virtiofs_contract::preflight::{Finding, Reason};

/// A directory that was found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Source {
    /// Its path without symbolic links.
    pub(crate) path: PathBuf,
    /// Device and inode number: another pair means that something else is there now.
    pub(crate) identity: (u64, u64),
}

/// How much room a file system has, and how much of it is left.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Space {
    /// Bytes: all, and those that may be written yet.
    pub(crate) bytes: (u64, u64),
    /// Inodes: all, and those that are free.
    pub(crate) inodes: (u64, u64),
}

/// Where sources are looked for. Paths are named as the host has them, wherever that is.
#[derive(Clone, Debug)]
pub(crate) struct Sources {
    /// The directory below which they lead: `/`, or where the host's are in a container.
    pub(crate) root: PathBuf,
    /// Directories in which a source may be; none: anywhere, or nowhere below another root, where nothing else is.
    pub(crate) allowed: Vec<PathBuf>,
}

impl Default for Sources {
    fn default() -> Self {
        Sources { root: "/".into(), allowed: Vec::new() }
    }
}

impl Sources {
    /// Where a path of the host is found by this process.
    pub(crate) fn seen(&self, path: &Path) -> PathBuf {
        self.root.join(path.strip_prefix("/").unwrap_or(path))
    }

    /// Follows a path, symbolic links as the host would, and never out of the root: where it leads, and what is there.
    fn resolve(&self, path: &Path) -> io::Result<(PathBuf, OwnedFd)> {
        let root = openat(CWD, &self.root, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
        let below = path.strip_prefix("/").unwrap_or(path);
        let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
        // The kernel gives up when somebody renames directories on a way that has `..` in it.
        let open = || openat2(&root, below, OFlags::PATH | OFlags::CLOEXEC, Mode::empty(), resolve);
        let found = (0..AGAIN).map(|_| open()).find(|found| !matches!(found, Err(Errno::AGAIN)));
        let found = found.unwrap_or(Err(Errno::AGAIN))?;
        let named = |fd: &OwnedFd| fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd()));
        let (root, place) = (named(&root)?, named(&found)?);
        // What has been removed meanwhile has a name no more, only one that says so.
        let (there, opened) = (stat(&place)?, fstat(&found)?);
        match place.strip_prefix(&root) {
            Ok(below) if (there.st_dev, there.st_ino) == (opened.st_dev, opened.st_ino) => {
                Ok((Path::new("/").join(below), found))
            }
            _ => Err(ErrorKind::NotFound.into()),
        }
    }

    /// Says so if a path lies outside of what may be shared.
    fn check(&self, path: &Path) -> Result<(), Finding> {
        let anywhere = self.allowed.is_empty() && self.root == Path::new("/");
        if anywhere || self.allowed.iter().any(|allowed| path.starts_with(allowed)) {
            return Ok(());
        }
        let allowed: Vec<_> = self.allowed.iter().map(|path| path.display().to_string()).collect();
        let allowed = if allowed.is_empty() { "none as yet".to_owned() } else { allowed.join(", ") };
        Err(Finding {
            reason: Reason::SourceForbidden,
            message: format!("{} lies in none of the directories that may be shared here", path.display()),
            remedy: format!(
                "have an admin add it, or a directory above it, to the chart's value allowedSources (--allowed-source); \
                 these are in it: {allowed}"
            ),
        })
    }
}

/// How often a path is followed anew when others rename directories on the way.
const AGAIN: usize = 16;

/// Looks for the source of a share: at `pinned`, if it was found before, else where `declared` leads. Also says how much
/// room is there.
pub(crate) fn look(
    sources: &Sources,
    declared: &Path,
    pinned: Option<&Path>,
) -> Result<(Source, Option<Space>), Finding> {
    let path = pinned.unwrap_or(declared);
    sources.check(path)?;
    let (canonical, found) = sources.resolve(path).map_err(|error| not_found(sources, path, &error))?;
    if pinned.is_some_and(|pinned| pinned != canonical) {
        return Err(diverted(path, &canonical));
    }
    sources.check(&canonical)?;
    let stat = fstat(&found).map_err(|errno| not_found(sources, &canonical, &errno.into()))?;
    if FileType::from_raw_mode(stat.st_mode) != FileType::Directory {
        return Err(Finding {
            reason: Reason::SourceNotDirectory,
            message: format!("{} is not a directory", canonical.display()),
            remedy: "name the directory that holds the files".to_owned(),
        });
    }
    let space = fstatvfs(&found).ok().map(|found| Space {
        bytes: (found.f_blocks.saturating_mul(found.f_frsize), found.f_bavail.saturating_mul(found.f_frsize)),
        inodes: (found.f_files, found.f_favail),
    });
    Ok((Source { path: canonical, identity: (stat.st_dev, stat.st_ino) }, space))
}

/// Is that an empty directory and no mount point? Where a file system has been unmounted, one is left.
pub(crate) fn is_bare(path: &Path) -> bool {
    let empty = fs::read_dir(path).is_ok_and(|mut entries| entries.next().is_none());
    empty && !is_mount_point(path)
}

fn is_mount_point(path: &Path) -> bool {
    let found = statx(CWD, path, AtFlags::empty(), StatxFlags::BASIC_STATS);
    found.is_ok_and(|found| found.stx_attributes.contains(StatxAttributes::MOUNT_ROOT))
}

fn not_found(sources: &Sources, path: &Path, error: &io::Error) -> Finding {
    let (reason, remedy) = match error.kind() {
        ErrorKind::NotFound => {
            (Reason::SourceMissing, "create the directory, or mount what belongs there; the share heals by itself")
        }
        ErrorKind::NotADirectory => {
            (Reason::SourceNotDirectory, "a part of the path is a file; correct spec.source.hostPath.path")
        }
        ErrorKind::PermissionDenied => (
            Reason::SourceUnreadable,
            "let the agent's user enter every directory on the way, or run the agent as root",
        ),
        // systemd answers openat2 so, as a filter cannot see the mode that it would create a file with.
        _ if error.raw_os_error() == Some(Errno::NOSYS.raw_os_error()) => (
            Reason::SourceUnreadable,
            "remove the seccomp filter that denies openat2 to the agent: RestrictSUIDSGID=yes in a systemd unit, or a \
             container's seccomp profile (it is in Linux 5.6 and newer)",
        ),
        _ => (Reason::SourceUnreadable, "see to the file system at that path; the share heals by itself"),
    };
    Finding {
        reason,
        message: format!("{}: {}", path.display(), describe(sources, path, error)),
        remedy: remedy.to_owned(),
    }
}

/// The error, and where on the way it happens.
fn describe(sources: &Sources, path: &Path, error: &io::Error) -> String {
    if error.kind() != ErrorKind::NotFound {
        return error.to_string();
    }
    match path.ancestors().skip(1).find(|ancestor| sources.seen(ancestor).exists()) {
        Some(there) if Some(there) != path.parent() => {
            format!("does not exist; nothing is there below {}", there.display())
        }
        _ => "does not exist".to_owned(),
    }
}

fn diverted(pinned: &Path, now: &Path) -> Finding {
    Finding {
        reason: Reason::SourceForbidden,
        message: format!("{} has come to lead to {} while the share was declared", pinned.display(), now.display()),
        remedy: "undo that; to serve the other directory instead, remove the share and declare it anew".to_owned(),
    }
}

/// What to say of a source whose file system has not answered for a while.
pub(crate) fn hangs(declared: &Path, seconds: u64) -> Finding {
    Finding {
        reason: Reason::SourceUnreadable,
        message: format!("{} has not answered for {seconds} s", declared.display()),
        remedy: "see to the file system or its server; the share heals by itself".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    fn look(declared: &Path, pinned: Option<&Path>) -> Result<Source, Finding> {
        super::look(&Sources::default(), declared, pinned).map(|(source, _)| source)
    }

    #[test]
    fn below_another_root_links_lead_where_the_host_would_go() {
        let (_keep, folder) = folder();
        fs::create_dir_all(folder.join("host/var/home/ann")).unwrap();
        symlink("/var/home", folder.join("host/home")).unwrap();
        symlink("../../../..", folder.join("host/var/up")).unwrap();
        let everywhere = Sources { root: folder.join("host"), allowed: vec!["/".into()] };
        let found = |path: &str| super::look(&everywhere, Path::new(path), None).map(|(source, _)| source.path);
        assert_eq!(found("/home/ann").unwrap(), Path::new("/var/home/ann"));
        assert_eq!(found("/var/up/home/ann").unwrap(), Path::new("/var/home/ann"));
        let missing = found("/home/bob").unwrap_err();
        assert!(missing.message.starts_with("/home/bob") && !missing.message.contains("host"), "{missing}");
        let (_, space) = super::look(&everywhere, Path::new("/var"), None).unwrap();
        assert!(space.is_some_and(|space| space.bytes.0 > 0));

        let nowhere = Sources { allowed: Vec::new(), ..everywhere.clone() };
        let refused = super::look(&nowhere, Path::new("/var"), None).unwrap_err();
        assert!(refused.remedy.contains("allowedSources") && refused.remedy.ends_with("none as yet"), "{refused}");
        let some = Sources { allowed: vec!["/var/home".into(), "/home".into()], ..everywhere };
        let reason = |path: &str| super::look(&some, Path::new(path), None).err().map(|finding| finding.reason);
        assert_eq!(reason("/home/ann"), None);
        fs::create_dir(folder.join("host/srv")).unwrap();
        symlink("/srv", folder.join("host/var/home/out")).unwrap();
        for path in ["/var", "/var/homestead", "/var/home/out"] {
            assert_eq!(reason(path), Some(Reason::SourceForbidden), "{path}");
        }
        let refused = super::look(&some, Path::new("/srv"), None).unwrap_err();
        assert!(refused.remedy.contains("allowedSources"), "{refused}");
    }

    fn folder() -> (tempfile::TempDir, PathBuf) {
        let folder = tempfile::tempdir().unwrap();
        let path = fs::canonicalize(folder.path()).unwrap();
        (folder, path)
    }

    #[test]
    fn links_are_resolved() {
        let (_keep, folder) = folder();
        fs::create_dir_all(folder.join("var/home")).unwrap();
        symlink("var/home", folder.join("home")).unwrap();
        assert_eq!(look(&folder.join("home"), None).unwrap().path, folder.join("var/home"));
    }

    #[test]
    fn what_is_not_there_is_said_with_the_place_where_the_way_ends() {
        let (_keep, folder) = folder();
        let finding = look(&folder.join("a/b/c"), None).unwrap_err();
        assert_eq!(finding.reason, Reason::SourceMissing);
        assert!(finding.message.contains(&format!("below {}", folder.display())), "{finding}");
    }

    #[test]
    fn a_filter_that_denies_openat2_is_named() {
        let error = io::Error::from(Errno::NOSYS);
        let finding = not_found(&Sources::default(), Path::new("/srv/data"), &error);
        assert_eq!(finding.reason, Reason::SourceUnreadable);
        assert!(finding.remedy.contains("openat2") && finding.remedy.contains("RestrictSUIDSGID"), "{finding}");
    }

    #[test]
    fn a_file_is_no_directory() {
        let (_keep, folder) = folder();
        fs::write(folder.join("file"), "").unwrap();
        assert_eq!(look(&folder.join("file"), None).unwrap_err().reason, Reason::SourceNotDirectory);
        assert_eq!(look(&folder.join("file/below"), None).unwrap_err().reason, Reason::SourceNotDirectory);
    }

    #[test]
    fn a_source_swapped_for_a_link_is_not_followed() {
        let (_keep, folder) = folder();
        let source = folder.join("source");
        fs::create_dir(&source).unwrap();
        let found = look(&source, None).unwrap();
        fs::remove_dir(&source).unwrap();
        symlink("/etc", &source).unwrap();
        let finding = look(&source, Some(&found.path)).unwrap_err();
        assert_eq!(finding.reason, Reason::SourceForbidden);
    }

    #[test]
    fn a_directory_made_anew_is_another_one() {
        let (_keep, folder) = folder();
        let source = folder.join("source");
        fs::create_dir(&source).unwrap();
        let before = look(&source, None).unwrap();
        fs::rename(&source, folder.join("old")).unwrap();
        fs::create_dir(&source).unwrap();
        let after = look(&source, Some(&before.path)).unwrap();
        assert_ne!(before.identity, after.identity);
    }

    #[test]
    fn an_empty_directory_is_bare_unless_something_is_mounted_there() {
        let (_keep, folder) = folder();
        assert!(is_bare(&folder));
        fs::write(folder.join("file"), "").unwrap();
        assert!(!is_bare(&folder));
        assert!(!is_bare(&folder.join("file")) && !is_bare(&folder.join("nothing")));
        assert!(is_mount_point(Path::new("/proc")) && !is_mount_point(&folder));
    }
}
