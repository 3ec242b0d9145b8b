//! The published volumes, stored in the kubelet's directory, so that they outlive agents, brokers and reboots. The kubelet
//! publishes a volume again after its own restarts and reboots; it then keeps its attributes.

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::fs::{self, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use anyhow::Context;
use tokio::sync::watch;

use super::socket::make_directory;
use crate::model::volume::{Volume, Volumes};

/// The volumes, one state file each.
pub(crate) struct Registry {
    directory: PathBuf,
    volumes: watch::Sender<Volumes>,
}

impl Registry {
    /// Reads the state files.
    ///
    /// # Errors
    /// The directory cannot be created or read.
    pub(crate) fn open(directory: PathBuf) -> anyhow::Result<Self> {
        let volumes = make_directory(&directory).and_then(|()| read(&directory));
        let volumes = volumes.with_context(|| format!("volumes in {}", directory.display()))?;
        tracing::info!(volumes = volumes.by_endpoint.len(), "volume state files read");
        Ok(Registry { directory, volumes: watch::Sender::new(volumes) })
    }

    /// The volumes, as they change.
    pub(crate) fn follow(&self) -> watch::Receiver<Volumes> {
        self.volumes.subscribe()
    }

    /// The volume in this directory.
    pub(super) fn at(&self, target_path: &Path) -> Option<Volume> {
        self.volumes.borrow().at(target_path).cloned()
    }

    /// All of them.
    pub(super) fn all(&self) -> Vec<Volume> {
        self.volumes.borrow().by_endpoint.values().cloned().collect()
    }

    /// Stores a volume atomically, also if the node loses power, and wakes the reconcile loop.
    ///
    /// # Errors
    /// The state file cannot be written.
    pub(super) fn put(&self, volume: &Volume) -> io::Result<()> {
        self.write(volume)?;
        self.volumes.send_modify(|volumes| {
            volumes.unreadable.remove(&Volume::key(&volume.target_path));
            volumes.by_endpoint.insert(volume.endpoint_name(), volume.clone());
        });
        Ok(())
    }

    fn write(&self, volume: &Volume) -> io::Result<()> {
        let path = self.path(&volume.target_path);
        let new = path.with_extension("new");
        if let Err(error) = write_durably(&new, &serde_json::to_vec(volume)?) {
            // For example on a full disk. The next write truncates a remaining file.
            let _ = fs::remove_file(&new);
            return Err(error);
        }
        fs::rename(new, path)
    }

    /// Notes that a volume has been served. The reconcile loop need not know.
    pub(super) fn note_published(&self, volume: &Volume) -> io::Result<()> {
        let volume = Volume { published: true, ..volume.clone() };
        self.write(&volume)?;
        self.volumes.send_if_modified(|volumes| {
            volumes.by_endpoint.insert(volume.endpoint_name(), volume);
            false
        });
        Ok(())
    }

    /// Wakes the reconcile loop.
    pub(super) fn wake(&self) {
        self.volumes.send_modify(|_| {});
    }

    /// Removes the volume in a directory.
    ///
    /// # Errors
    /// The state file cannot be removed.
    pub(super) fn remove(&self, target_path: &Path) -> io::Result<()> {
        remove_file(&self.path(target_path))?;
        self.volumes.send_modify(|volumes| {
            volumes.unreadable.remove(&Volume::key(target_path));
            volumes.by_endpoint.retain(|_, volume| volume.target_path != target_path);
        });
        Ok(())
    }

    fn path(&self, target_path: &Path) -> PathBuf {
        self.directory.join(format!("{}.json", Volume::key(target_path)))
    }
}

/// Writes and syncs: without the sync, a node that loses power may be left with an empty file under the new name.
fn write_durably(path: &Path, text: &[u8]) -> io::Result<()> {
    let mut options = OpenOptions::new();
    let mut file = options.create(true).write(true).truncate(true).mode(0o600).open(path)?;
    file.write_all(text)?;
    file.sync_all()
}

/// Removes a file. Idempotent.
fn remove_file(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

fn read(directory: &Path) -> io::Result<Volumes> {
    let mut volumes = Volumes { unreadable: BTreeSet::new(), ..Volumes::default() };
    for entry in fs::read_dir(directory)? {
        let path = entry?.path();
        if path.extension() != Some(OsStr::new("json")) {
            continue;
        }
        let key = path.file_stem().and_then(OsStr::to_str).unwrap_or_default();
        let text = fs::read(&path);
        if text.as_ref().is_ok_and(Vec::is_empty) {
            // The node lost power. If the pod still exists, the kubelet publishes the volume again.
            tracing::warn!(path = %path.display(), "removing an empty volume state file");
            remove_file(&path)?;
            continue;
        }
        match text.and_then(|text| Ok(serde_json::from_slice::<Volume>(&text)?)) {
            Ok(volume) if Volume::key(&volume.target_path) == key => {
                volumes.by_endpoint.insert(volume.endpoint_name(), volume);
            }
            other => {
                let error = other.err().map_or("it belongs to another volume".to_owned(), |error| error.to_string());
                tracing::error!(path = %path.display(), error, "invalid volume state file");
                volumes.unreadable.insert(key.to_owned());
            }
        }
    }
    Ok(volumes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixtures::volume;

    #[test]
    fn volumes_are_read_back_and_invalid_files_stay() {
        let scratch = tempfile::tempdir().unwrap();
        let open = || Registry::open(scratch.path().join("volumes")).unwrap();
        let (one, two) = (volume("images", "one"), volume("images", "two"));
        let registry = open();
        registry.put(&one).unwrap();
        registry.put(&two).unwrap();
        registry.note_published(&one).unwrap();
        fs::write(registry.path(&two.target_path), "{").unwrap();
        let empty = registry.path(Path::new("/gone"));
        fs::write(&empty, "").unwrap();
        let registry = open();
        assert_eq!(registry.all(), [Volume { published: true, ..one.clone() }]);
        assert!(registry.follow().borrow().may_have(&two.endpoint_name()));
        assert_eq!(registry.follow().borrow().unreadable.len(), 1);
        assert!(!empty.exists());
        registry.put(&two).unwrap();
        assert_eq!(registry.at(&two.target_path), Some(two.clone()));
        for volume in [&one, &two, &two] {
            registry.remove(&volume.target_path).unwrap();
        }
        assert_eq!(open().all(), []);
        assert!(!registry.follow().borrow().may_have(&two.endpoint_name()));
        assert_eq!(fs::read_dir(scratch.path().join("volumes")).unwrap().count(), 0);
    }
}
