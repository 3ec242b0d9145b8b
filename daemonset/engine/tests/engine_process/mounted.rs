//! File systems that a test mounts.

use std::fs;
use std::path::{Path, PathBuf};

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
