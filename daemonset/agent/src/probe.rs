//! Probes sources: where a share's source is, and whether it is there.
//!
//! A path is resolved once, when a share is first probed; from then on the directory that was found is the source. If each
//! probe resolved it again, whoever can write to a parent directory, such as a guest of another share, could replace it
//! with a symbolic link and have any directory of the host served.

use std::fs;
use std::io::{self, ErrorKind};
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, FileType, Mode, OFlags, ResolveFlags, fstat, fstatvfs, openat, openat2, stat};
use rustix::io::Errno;
use virtiofs_contract::preflight::{Finding, Reason};

use crate::model::source::{Source, Space};

/// Where sources are probed. Paths are those of the host.
#[derive(Clone, Debug)]
pub(crate) struct Sources {
    /// The host's root: `/`, or where it is mounted in a container.
    pub(crate) root: PathBuf,
    /// Directories that sources may be in. If empty: anywhere below `/`, nowhere below another root.
    pub(crate) allowed: Vec<PathBuf>,
}

impl Default for Sources {
    fn default() -> Self {
        Sources { root: "/".into(), allowed: Vec::new() }
    }
}

impl Sources {
    /// The path by which this process reaches a path of the host.
    pub(crate) fn local_path(&self, path: &Path) -> PathBuf {
        self.root.join(path.strip_prefix("/").unwrap_or(path))
    }

    /// Opens a path of the host, following symbolic links as the host does and never out of the root. Returns its canonical
    /// path and descriptor.
    fn resolve(&self, path: &Path) -> io::Result<(PathBuf, OwnedFd)> {
        let root = openat(CWD, &self.root, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
        let below = path.strip_prefix("/").unwrap_or(path);
        let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
        // EAGAIN: a directory was renamed while a path with `..` was resolved (openat2(2)).
        let open = || openat2(&root, below, OFlags::PATH | OFlags::CLOEXEC, Mode::empty(), resolve);
        let found = (0..ATTEMPTS).map(|_| open()).find(|found| !matches!(found, Err(Errno::AGAIN)));
        let found = found.unwrap_or(Err(Errno::AGAIN))?;
        let named = |fd: &OwnedFd| fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd()));
        let (root, path) = (named(&root)?, named(&found)?);
        // A directory that was removed meanwhile has no path any more.
        let (there, opened) = (stat(&path)?, fstat(&found)?);
        match path.strip_prefix(&root) {
            Ok(below) if (there.st_dev, there.st_ino) == (opened.st_dev, opened.st_ino) => {
                Ok((Path::new("/").join(below), found))
            }
            _ => Err(ErrorKind::NotFound.into()),
        }
    }

    /// An error if a path is outside of the allowed directories.
    fn check(&self, path: &Path) -> Result<(), Finding> {
        let anywhere = self.allowed.is_empty() && self.root == Path::new("/");
        if anywhere || self.allowed.iter().any(|allowed| path.starts_with(allowed)) {
            return Ok(());
        }
        let allowed: Vec<_> = self.allowed.iter().map(|path| path.display().to_string()).collect();
        let allowed = if allowed.is_empty() { "none".to_owned() } else { allowed.join(", ") };
        Err(Finding {
            reason: Reason::SourceForbidden,
            message: format!("{} is not in a directory that may be shared here", path.display()),
            remedy: format!(
                "add it, or a directory above it, to the chart's value allowedSources (--allowed-source); present values: \
                 {allowed}"
            ),
        })
    }
}

/// How often opening a path is attempted while directories on it are renamed.
const ATTEMPTS: usize = 16;

/// Probes the source of a share: `pinned` if it was found before, else `declared`. Also returns the space of its file
/// system.
///
/// # Errors
/// Why it cannot be served.
pub(crate) fn probe(
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
            remedy: "name the directory that contains the files".to_owned(),
        });
    }
    let space = fstatvfs(&found).ok().map(|found| Space {
        bytes: (found.f_blocks.saturating_mul(found.f_frsize), found.f_bavail.saturating_mul(found.f_frsize)),
        inodes: (found.f_files, found.f_favail),
    });
    Ok((Source { path: canonical, identity: (stat.st_dev, stat.st_ino) }, space))
}

fn not_found(sources: &Sources, path: &Path, error: &io::Error) -> Finding {
    let (reason, remedy) = match error.kind() {
        ErrorKind::NotFound => {
            (Reason::SourceMissing, "create the directory, or mount its file system; the share recovers by itself")
        }
        ErrorKind::NotADirectory => {
            (Reason::SourceNotDirectory, "a part of the path is a file; correct spec.source.hostPath.path")
        }
        ErrorKind::PermissionDenied => (
            Reason::SourceUnreadable,
            "let the agent's user enter every directory of the path, or run the agent as root",
        ),
        // systemd answers openat2 so, as a filter cannot see the mode that it would create a file with.
        _ if error.raw_os_error() == Some(Errno::NOSYS.raw_os_error()) => (
            Reason::SourceUnreadable,
            "remove the seccomp filter that denies openat2 to the agent: RestrictSUIDSGID=yes in a systemd unit, or a \
             container's seccomp profile (it is in Linux 5.6 and newer)",
        ),
        _ => (Reason::SourceUnreadable, "check the file system at that path; the share recovers by itself"),
    };
    Finding {
        reason,
        message: format!("{}: {}", path.display(), describe(sources, path, error)),
        remedy: remedy.to_owned(),
    }
}

/// The error, and which directory of the path exists.
fn describe(sources: &Sources, path: &Path, error: &io::Error) -> String {
    if error.kind() != ErrorKind::NotFound {
        return error.to_string();
    }
    match path.ancestors().skip(1).find(|ancestor| sources.local_path(ancestor).exists()) {
        Some(there) if Some(there) != path.parent() => {
            format!("does not exist; {} is the last directory of the path that exists", there.display())
        }
        _ => "does not exist".to_owned(),
    }
}

fn diverted(pinned: &Path, now: &Path) -> Finding {
    Finding {
        reason: Reason::SourceForbidden,
        message: format!(
            "{} now leads to {}; it led elsewhere when the share was declared",
            pinned.display(),
            now.display()
        ),
        remedy: "undo that; to serve the other directory, remove the share and declare it again".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    fn find(declared: &Path, pinned: Option<&Path>) -> Result<Source, Finding> {
        super::probe(&Sources::default(), declared, pinned).map(|(source, _)| source)
    }

    #[test]
    fn links_are_followed_below_another_root() {
        let (_keep, folder) = folder();
        fs::create_dir_all(folder.join("host/var/home/ann")).unwrap();
        symlink("/var/home", folder.join("host/home")).unwrap();
        symlink("../../../..", folder.join("host/var/up")).unwrap();
        let everywhere = Sources { root: folder.join("host"), allowed: vec!["/".into()] };
        let found = |path: &str| super::probe(&everywhere, Path::new(path), None).map(|(source, _)| source.path);
        assert_eq!(found("/home/ann").unwrap(), Path::new("/var/home/ann"));
        assert_eq!(found("/var/up/home/ann").unwrap(), Path::new("/var/home/ann"));
        let missing = found("/home/bob").unwrap_err();
        assert!(missing.message.starts_with("/home/bob") && !missing.message.contains("host"), "{missing}");
        let (_, space) = super::probe(&everywhere, Path::new("/var"), None).unwrap();
        assert!(space.is_some_and(|space| space.bytes.0 > 0));

        let nowhere = Sources { allowed: Vec::new(), ..everywhere.clone() };
        let refused = super::probe(&nowhere, Path::new("/var"), None).unwrap_err();
        assert!(refused.remedy.contains("allowedSources") && refused.remedy.ends_with("none"), "{refused}");
        let some = Sources { allowed: vec!["/var/home".into(), "/home".into()], ..everywhere };
        let reason = |path: &str| super::probe(&some, Path::new(path), None).err().map(|finding| finding.reason);
        assert_eq!(reason("/home/ann"), None);
        fs::create_dir(folder.join("host/srv")).unwrap();
        symlink("/srv", folder.join("host/var/home/out")).unwrap();
        for path in ["/var", "/var/homestead", "/var/home/out"] {
            assert_eq!(reason(path), Some(Reason::SourceForbidden), "{path}");
        }
        let refused = super::probe(&some, Path::new("/srv"), None).unwrap_err();
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
        assert_eq!(find(&folder.join("home"), None).unwrap().path, folder.join("var/home"));
    }

    #[test]
    fn a_missing_source_names_the_last_directory() {
        let (_keep, folder) = folder();
        let finding = find(&folder.join("a/b/c"), None).unwrap_err();
        assert_eq!(finding.reason, Reason::SourceMissing);
        assert!(finding.message.contains(&format!("; {} is the last", folder.display())), "{finding}");
    }

    #[test]
    fn a_filter_that_denies_openat2_is_named() {
        let error = io::Error::from(Errno::NOSYS);
        let finding = not_found(&Sources::default(), Path::new("/srv/data"), &error);
        assert_eq!(finding.reason, Reason::SourceUnreadable);
        assert!(finding.remedy.contains("openat2") && finding.remedy.contains("RestrictSUIDSGID"), "{finding}");
    }

    #[test]
    fn a_file_is_rejected() {
        let (_keep, folder) = folder();
        fs::write(folder.join("file"), "").unwrap();
        assert_eq!(find(&folder.join("file"), None).unwrap_err().reason, Reason::SourceNotDirectory);
        assert_eq!(find(&folder.join("file/below"), None).unwrap_err().reason, Reason::SourceNotDirectory);
    }

    #[test]
    fn a_source_replaced_by_a_link_is_rejected() {
        let (_keep, folder) = folder();
        let source = folder.join("source");
        fs::create_dir(&source).unwrap();
        let found = find(&source, None).unwrap();
        fs::remove_dir(&source).unwrap();
        symlink("/etc", &source).unwrap();
        let finding = find(&source, Some(&found.path)).unwrap_err();
        assert_eq!(finding.reason, Reason::SourceForbidden);
    }

    #[test]
    fn a_recreated_directory_is_another_source() {
        let (_keep, folder) = folder();
        let source = folder.join("source");
        fs::create_dir(&source).unwrap();
        let before = find(&source, None).unwrap();
        fs::rename(&source, folder.join("old")).unwrap();
        fs::create_dir(&source).unwrap();
        let after = find(&source, Some(&before.path)).unwrap();
        assert_ne!(before.identity, after.identity);
    }
}
