//! Follows a directory: reads it at once, and again after each change, once no further change follows.

use std::io;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};
use thiserror::Error;
use tokio::sync::watch;
use virtiofs_client::report::Problem;
use virtiofs_crds::read_directory;

use super::document_store::DocumentStore;
use super::last_good::LastGood;
use crate::model::desired::Desired;

/// How long a directory must be without changes before it is read: several files may be written together.
const QUIET: Duration = Duration::from_millis(150);

/// How long a read is deferred at most while changes continue.
const DEFER_AT_MOST: Duration = Duration::from_secs(2);

/// Time between two reads without a reported change: files may be links to elsewhere, and not every file system reports
/// changes.
const READ_EVERY: Duration = Duration::from_secs(10);

/// Time between two attempts to store documents with the broker.
const STORE_EVERY: Duration = Duration::from_millis(300);

/// Why a directory cannot be followed.
#[derive(Debug, Error)]
pub(crate) enum WatchError {
    /// The directory cannot be read.
    #[error("shares directory {path}: {error}")]
    Directory { path: PathBuf, error: io::Error },
    /// The kernel has no inotify instance left, or the thread could not be started.
    #[error("cannot watch the shares directory: {0}")]
    Resources(io::Error),
}

impl From<io::Error> for WatchError {
    fn from(error: io::Error) -> Self {
        WatchError::Resources(error)
    }
}

/// A directory that is followed.
#[derive(Debug)]
pub(crate) struct Manifests {
    /// What it declares. It is followed while there is a receiver.
    pub(crate) desired: watch::Receiver<Desired>,
    /// Requests a read at once.
    nudge: Arc<EventFd>,
    /// Counts the requested reads.
    nudged: watch::Receiver<u64>,
}

impl Manifests {
    /// Requests a read at once and waits until it is done.
    pub(crate) async fn read_again(&mut self) {
        self.nudged.mark_unchanged();
        if let Err(errno) = self.nudge.write(1) {
            tracing::warn!(error = errno.desc(), "cannot request a read of the shares directory");
            return;
        }
        // An error means that the follower has ended.
        _ = self.nudged.changed().await;
    }
}

/// Reads the directory and follows it. `broker` is the control socket of the broker that stores documents.
///
/// # Errors
/// The directory cannot be read or watched.
pub(crate) fn follow(directory: &Path, broker: &Path) -> Result<Manifests, WatchError> {
    let nudge = EventFd::from_flags(EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC).map_err(io::Error::from)?;
    let nudge = Arc::new(nudge);
    let (readings, nudged) = watch::channel(0);
    let inotify = Inotify::init(InitFlags::IN_NONBLOCK | InitFlags::IN_CLOEXEC).map_err(io::Error::from)?;
    let mut follower = Follower {
        directory: directory.to_path_buf(),
        inotify,
        nudge: nudge.clone(),
        readings,
        last_good: LastGood::default(),
        store: DocumentStore::at(broker.to_path_buf()),
        is_stored: false,
    };
    follower.arm();
    let first = follower.read().map_err(|error| WatchError::Directory { path: directory.to_path_buf(), error })?;
    let (sender, desired) = watch::channel(first);
    thread::Builder::new().name("manifests".to_owned()).spawn(move || follower.run(&sender))?;
    Ok(Manifests { desired, nudge, nudged })
}

struct Follower {
    directory: PathBuf,
    inotify: Inotify,
    nudge: Arc<EventFd>,
    readings: watch::Sender<u64>,
    last_good: LastGood,
    store: DocumentStore,
    /// True if the broker stores all documents.
    is_stored: bool,
}

/// What woke the follower.
#[derive(Clone, Copy, Debug, Default)]
struct Woken {
    /// Something has changed.
    change: bool,
    /// A read was requested.
    nudge: bool,
}

impl Follower {
    fn run(mut self, sender: &watch::Sender<Desired>) {
        let mut read_at = Instant::now();
        while !sender.is_closed() {
            let mut woken = self.wait(if self.is_stored { READ_EVERY } else { STORE_EVERY });
            if woken.change && !woken.nudge {
                woken.nudge = self.wait_until_quiet();
            }
            let is_due = woken.change || woken.nudge || read_at.elapsed() >= READ_EVERY;
            if !is_due && self.store.is_loaded() {
                self.is_stored = self.store.store(self.last_good.documents());
                continue;
            }
            self.arm();
            let desired = self.read().unwrap_or_else(|error| self.last_good.unreadable(self.unreadable(&error)));
            let desired = Desired { partial: !self.store.is_loaded(), ..desired };
            read_at = Instant::now();
            sender.send_if_modified(|current| {
                let changed = *current != desired;
                if changed {
                    *current = desired;
                }
                changed
            });
            if woken.nudge {
                self.readings.send_modify(|count| *count += 1);
            }
        }
    }

    /// Loads the documents of an earlier agent first, so that documents that became invalid meanwhile keep their version.
    /// Stores the present ones for the next agent.
    fn read(&mut self) -> io::Result<Desired> {
        if !self.store.is_loaded()
            && let Some(documents) = self.store.load()
        {
            self.last_good.load(documents);
        }
        let desired = self.last_good.take(read_directory(&self.directory)?);
        let desired = Desired { partial: !self.store.is_loaded(), ..desired };
        self.is_stored = self.store.is_loaded() && self.store.store(self.last_good.documents());
        Ok(desired)
    }

    /// Watches the present directory; no change if it is watched already.
    fn arm(&self) {
        let events = AddWatchFlags::IN_CLOSE_WRITE
            | AddWatchFlags::IN_CREATE
            | AddWatchFlags::IN_DELETE
            | AddWatchFlags::IN_MOVED_FROM
            | AddWatchFlags::IN_MOVED_TO
            | AddWatchFlags::IN_ATTRIB
            | AddWatchFlags::IN_DELETE_SELF
            | AddWatchFlags::IN_MOVE_SELF
            | AddWatchFlags::IN_ONLYDIR;
        if let Err(errno) = self.inotify.add_watch(&self.directory, events) {
            tracing::debug!(directory = %self.directory.display(), error = errno.desc(), "directory not watched; it is read periodically");
        }
    }

    /// Waits until no further change follows. True if a read was requested meanwhile.
    fn wait_until_quiet(&self) -> bool {
        let begun = Instant::now();
        while begun.elapsed() < DEFER_AT_MOST {
            let woken = self.wait(QUIET);
            if woken.nudge || !woken.change {
                return woken.nudge;
            }
        }
        false
    }

    /// Waits for events and consumes them.
    fn wait(&self, longest: Duration) -> Woken {
        let timeout = PollTimeout::try_from(longest).unwrap_or(PollTimeout::MAX);
        let mut polled =
            [PollFd::new(self.inotify.as_fd(), PollFlags::POLLIN), PollFd::new(self.nudge.as_fd(), PollFlags::POLLIN)];
        match poll(&mut polled, timeout) {
            Ok(0) | Err(Errno::EINTR) => Woken::default(),
            Ok(_) => {
                let [changed, nudged] = polled.map(|it| it.any().unwrap_or(false));
                Woken { change: changed && self.take_events(), nudge: nudged && self.nudge.read().is_ok() }
            }
            Err(errno) => {
                tracing::warn!(error = errno.desc(), "cannot wait for changes of the shares directory");
                thread::sleep(longest);
                Woken::default()
            }
        }
    }

    fn take_events(&self) -> bool {
        match self.inotify.read_events() {
            Ok(events) => !events.is_empty(),
            // The queue has overflowed or is empty: an additional read does no harm.
            Err(_) => true,
        }
    }

    fn unreadable(&self, error: &io::Error) -> Problem {
        Problem {
            file: Some(self.directory.clone()),
            document: 0,
            share: None,
            field: String::new(),
            message: format!("the directory cannot be read: {error}; every share stays as it is"),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    const NO_BROKER: &str = "/nowhere/broker.sock";

    fn manifest(name: &str) -> String {
        format!(
            "apiVersion: virtiofs.dev/v1alpha1\nkind: VirtiofsShare\nmetadata: {{name: {name}}}\n\
             spec: {{source: {{hostPath: {{path: /srv/{name}}}}}}}\n"
        )
    }

    async fn until(desired: &mut watch::Receiver<Desired>, names: &[&str], problems: usize) {
        let wanted = |it: &Desired| it.shares.keys().eq(names) && it.problems.len() == problems;
        tokio::time::timeout(Duration::from_secs(30), desired.wait_for(wanted)).await.unwrap().unwrap();
    }

    #[tokio::test(flavor = "current_thread")]
    async fn additions_changes_and_removals_are_followed() {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("a.yaml"), manifest("a")).unwrap();
        let mut desired = follow(folder.path(), NO_BROKER.as_ref()).unwrap().desired;
        assert!(desired.borrow().shares.contains_key("a"));

        fs::write(folder.path().join("b.yml"), manifest("b")).unwrap();
        until(&mut desired, &["a", "b"], 0).await;

        fs::write(folder.path().join("a.yaml"), "spec: [").unwrap();
        until(&mut desired, &["a", "b"], 1).await;

        fs::remove_file(folder.path().join("a.yaml")).unwrap();
        until(&mut desired, &["b"], 0).await;
    }

    #[tokio::test(flavor = "current_thread")]
    async fn a_missing_directory_removes_no_share() {
        let folder = tempfile::tempdir().unwrap();
        let directory = folder.path().join("shares");
        fs::create_dir(&directory).unwrap();
        fs::write(directory.join("a.yaml"), manifest("a")).unwrap();
        let mut desired = follow(&directory, NO_BROKER.as_ref()).unwrap().desired;

        fs::rename(&directory, folder.path().join("elsewhere")).unwrap();
        until(&mut desired, &["a"], 1).await;
        fs::rename(folder.path().join("elsewhere"), &directory).unwrap();
        until(&mut desired, &["a"], 0).await;
    }

    #[tokio::test(flavor = "current_thread")]
    async fn a_requested_read_is_done_when_it_returns() {
        let folder = tempfile::tempdir().unwrap();
        let mut manifests = follow(folder.path(), NO_BROKER.as_ref()).unwrap();
        for round in 1..=20 {
            fs::write(folder.path().join(format!("{round}.yaml")), manifest(&format!("s{round}"))).unwrap();
            manifests.read_again().await;
            assert_eq!(manifests.desired.borrow().shares.len(), round);
        }
    }

    #[test]
    fn a_missing_directory_is_an_error_at_the_start() {
        let error = follow(Path::new("/nowhere/shares"), NO_BROKER.as_ref()).unwrap_err();
        assert!(error.to_string().contains("/nowhere/shares"), "{error}");
    }
}
