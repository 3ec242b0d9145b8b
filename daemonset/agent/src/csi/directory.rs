//! The directory of a volume: a plain directory in which the broker binds the socket. Nothing is mounted on it.

use std::fs::{self, DirBuilder};
use std::io::{self, ErrorKind};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use rustix::fs::{XattrFlags, setxattr};

use super::empty::{empty, open};

/// SELinux label that containers may use.
const LABEL: &str = "system_u:object_r:container_file_t:s0";

/// Creates the directory if it is missing. The kubelet has created its parents.
///
/// # Errors
/// It cannot be created, or something else is at that path.
pub(super) fn make(target_path: &Path) -> io::Result<()> {
    match DirBuilder::new().create(target_path) {
        Err(error) if error.kind() != ErrorKind::AlreadyExists => return Err(error),
        _ => {}
    }
    if !fs::symlink_metadata(target_path)?.is_dir() {
        return Err(io::Error::other("not a directory"));
    }
    // Whatever the umask: the pod's user reaches the socket through it, and the socket's mode says who may connect.
    fs::set_permissions(target_path, fs::Permissions::from_mode(0o755))?;
    label(target_path);
    Ok(())
}

/// The kubelet does not label read-only volumes. Files in the directory inherit its type.
fn label(target_path: &Path) {
    if !fs::read_to_string("/proc/filesystems").is_ok_and(|known| has_selinux(&known)) {
        return;
    }
    if let Err(errno) = setxattr(target_path, "security.selinux", LABEL.as_bytes(), XattrFlags::empty()) {
        tracing::warn!(error = %io::Error::from(errno), path = %target_path.display(), "volume not labelled");
    }
}

/// True if SELinux is in the kernel's list of file systems. selinuxfs itself is mounted on the host, not in this container.
fn has_selinux(filesystems: &str) -> bool {
    filesystems.lines().any(|line| line.split_whitespace().last() == Some("selinuxfs"))
}

/// Removes the directory with everything in it: for a read-only PersistentVolume the kubelet makes the directory writable if
/// the pod does not set `readOnly` itself. Idempotent.
///
/// # Errors
/// Something cannot be removed, or is a mount point.
pub(super) fn remove(target_path: &Path) -> io::Result<()> {
    let directory = match open(rustix::fs::CWD, target_path) {
        Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => return Ok(()),
        other => other?,
    };
    empty(&directory)?;
    match fs::remove_dir(target_path) {
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;
    use std::os::unix::net::UnixListener;

    use super::*;
    use crate::model::volume::SOCKET;

    #[test]
    fn selinux_is_detected_by_its_file_system() {
        assert!(has_selinux("nodev\tsysfs\nnodev\tselinuxfs\n\text4\n"));
        assert!(!has_selinux("nodev\tsysfs\nnodev\tsecurityfs\n\text4\n"));
    }

    #[test]
    fn a_directory_is_removed_with_its_content() {
        let scratch = tempfile::tempdir().unwrap();
        let (target, elsewhere) = (scratch.path().join("mount"), scratch.path().join("elsewhere"));
        make(&target).unwrap();
        make(&target).unwrap();
        assert_eq!(fs::metadata(&target).unwrap().permissions().mode() & 0o777, 0o755);
        for name in [SOCKET, ".virtiofs-7-1"] {
            drop(UnixListener::bind(target.join(name)).unwrap());
        }
        fs::create_dir(&elsewhere).unwrap();
        fs::write(elsewhere.join("file"), "").unwrap();
        symlink(&elsewhere, target.join("link")).unwrap();
        fs::write(target.join(".up-1"), "").unwrap();
        fs::create_dir_all(target.join("a/b/c/d")).unwrap();
        for place in ["foreign", "a/file", "a/b/c/d/file", "a/b/file"] {
            fs::write(target.join(place), "").unwrap();
        }
        symlink(&elsewhere, target.join("a/b/link")).unwrap();
        remove(&target).unwrap();
        remove(&target).unwrap();
        assert!(!target.exists() && elsewhere.join("file").exists());
        fs::write(&target, "").unwrap();
        assert!(make(&target).is_err());
        remove(&target).unwrap();
        assert!(target.exists(), "a file is not a volume");
        fs::remove_file(&target).unwrap();
        symlink(&elsewhere, &target).unwrap();
        remove(&target).unwrap();
        assert!(elsewhere.join("file").exists(), "the target of a link is not a volume");
    }

    #[test]
    fn a_mount_point_is_not_removed() {
        assert!(remove(Path::new("/proc")).is_err());
    }
}
