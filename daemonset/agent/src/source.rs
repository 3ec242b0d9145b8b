//! Where a share's source really is, and whether it is there.
//!
//! A path is resolved once, when a share is first seen; from then on the place that was found is the source.
//! Resolving it anew each time would let whoever can write to a parent directory, a guest of another share
//! perhaps, put a symbolic link in the way and have any directory of the host served.

use std::fs;
use std::io::{self, ErrorKind};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, StatxAttributes, StatxFlags, statx};
use virtiofs_contract::preflight::{Finding, Reason};

/// A directory that was found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Source {
    /// Its path without symbolic links.
    pub(crate) path: PathBuf,
    /// Device and inode number: another pair means that something else is there now.
    pub(crate) identity: (u64, u64),
}

/// Looks for the source of a share: at `pinned`, if it was found before, else where `declared` leads.
pub(crate) fn look(declared: &Path, pinned: Option<&Path>) -> Result<Source, Finding> {
    let path = pinned.unwrap_or(declared);
    let canonical = fs::canonicalize(path).map_err(|error| not_found(path, &error))?;
    if pinned.is_some_and(|pinned| pinned != canonical) {
        return Err(diverted(path, &canonical));
    }
    let metadata = fs::metadata(&canonical).map_err(|error| not_found(&canonical, &error))?;
    if !metadata.is_dir() {
        return Err(Finding {
            reason: Reason::SourceNotDirectory,
            message: format!("{} is not a directory", canonical.display()),
            remedy: "name the directory that holds the files".to_owned(),
        });
    }
    Ok(Source { path: canonical, identity: (metadata.dev(), metadata.ino()) })
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

fn not_found(path: &Path, error: &io::Error) -> Finding {
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
        _ => (Reason::SourceUnreadable, "see to the file system at that path; the share heals by itself"),
    };
    Finding { reason, message: format!("{}: {}", path.display(), describe(path, error)), remedy: remedy.to_owned() }
}

/// The error, and where on the way it happens.
fn describe(path: &Path, error: &io::Error) -> String {
    if error.kind() != ErrorKind::NotFound {
        return error.to_string();
    }
    match path.ancestors().skip(1).find(|ancestor| ancestor.exists()) {
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
