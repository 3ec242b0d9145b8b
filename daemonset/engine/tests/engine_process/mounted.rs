//! File systems that a test mounts.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use nix::mount::{MntFlags, MsFlags, mount, umount2};

/// A mount, removed when dropped.
pub(crate) struct Mounted(pub(crate) PathBuf);

impl Mounted {
    pub(crate) fn tmpfs(at: &Path) -> Self {
        fs::create_dir_all(at).unwrap();
        mount(Some("tmpfs"), at, Some("tmpfs"), MsFlags::empty(), None::<&str>).unwrap();
        Mounted(at.to_owned())
    }

    /// Mounts the file or directory `what` over `at`.
    pub(crate) fn bind(what: &Path, at: &Path) -> Self {
        mount(Some(what), at, None::<&str>, MsFlags::MS_BIND, None::<&str>).unwrap();
        Mounted(at.to_owned())
    }

    /// Mounts an overlayfs of two layers, with `work` as its work directory.
    pub(crate) fn overlay(lower: &Path, upper: &Path, work: &Path, at: &Path) -> Self {
        [upper, work, at].iter().for_each(|directory| fs::create_dir_all(directory).unwrap());
        let [lower, upper, work] = [lower, upper, work].map(Path::display);
        let options = format!("lowerdir={lower},upperdir={upper},workdir={work},xino=off");
        mount(Some("overlay"), at, Some("overlay"), MsFlags::empty(), Some(options.as_str())).unwrap();
        Mounted(at.to_owned())
    }

    /// Mounts a new file system of this type out of an image beside the mount; none if that is not possible here.
    pub(crate) fn image(fs_type: &str, at: &Path) -> Option<Self> {
        let image = at.with_extension("image");
        // The smallest that xfs and btrfs accept, sparse.
        fs::File::create(&image).unwrap().set_len(512 << 20).unwrap();
        fs::create_dir_all(at).unwrap();
        let make = Command::new(format!("mkfs.{fs_type}")).arg("-q").arg(&image).output().ok()?;
        let mount = Command::new("mount").args(["-o", "loop"]).args([&image, at]).output().ok()?;
        (make.status.success() && mount.status.success()).then(|| Mounted(at.to_owned()))
    }

    /// Has mounts below this one appear in other mount namespaces, as systemd does.
    pub(crate) fn shared(self) -> Self {
        mount(None::<&str>, &self.0, None::<&str>, MsFlags::MS_SHARED, None::<&str>).unwrap();
        self
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = umount2(&self.0, MntFlags::MNT_DETACH);
    }
}
