//! Follows a directory: reads it at once, and again whenever something in it has changed and then rested.

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
use virtiofs_crds::read_directory;

use super::last_good::LastGood;
use super::memory::Memory;
use crate::desired::{Desired, Problem};

/// How long a directory must rest before it is read: whoever writes several files is done by then.
const REST: Duration = Duration::from_millis(150);

/// How long reading is put off at most while the directory does not rest.
const PUT_OFF_AT_MOST: Duration = Duration::from_secs(2);

/// How often the directory is read without being told of a change: files may be links to elsewhere, and not
/// every file system tells.
const READ_EVERY: Duration = Duration::from_secs(10);

/// How often the broker is asked to remember while it does not.
const REMEMBER_EVERY: Duration = Duration::from_millis(300);

/// Why a directory cannot be followed.
#[derive(Debug, Error)]
pub(crate) enum WatchError {
    /// The directory cannot be read.
    #[error("shares directory {path}: {error}")]
    Directory { path: PathBuf, error: io::Error },
    /// The kernel gives no inotify instance, or the thread could not be started.
    #[error("cannot watch the shares directory: {0}")]
    Resources(#[from] io::Error),
}

/// A directory that is followed.
#[derive(Debug)]
pub(crate) struct Manifests {
    /// What it declares. It is followed for as long as there is a receiver.
    pub(crate) desired: watch::Receiver<Desired>,
    /// Asks for a reading at once.
    nudge: Arc<EventFd>,
    /// Counts the readings that were asked for.
    nudged: watch::Receiver<u64>,
}

impl Manifests {
    /// Has the directory read now, whatever the kernel tells of changes, and waits until it was.
    pub(crate) async fn read_again(&mut self) {
        self.nudged.mark_unchanged();
        if let Err(errno) = self.nudge.write(1) {
            tracing::warn!(error = errno.desc(), "cannot ask for a reading of the shares directory");
            return;
        }
        // An error means that nobody reads any more.
        _ = self.nudged.changed().await;
    }
}

/// Reads the directory and keeps on following it.
/// `broker` is the control socket of the one that keeps what must outlive this agent.
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
        memory: Memory::at(broker.to_path_buf()),
        is_kept: false,
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
    memory: Memory,
    /// Does the broker keep all of it?
    is_kept: bool,
}

/// What the follower was woken by.
#[derive(Clone, Copy, Debug, Default)]
struct Woken {
    /// Something has changed.
    change: bool,
    /// Somebody wants a reading.
    nudge: bool,
}

impl Follower {
    fn run(mut self, sender: &watch::Sender<Desired>) {
        let mut read_at = Instant::now();
        while !sender.is_closed() {
            let mut woken = self.wait(if self.is_kept { READ_EVERY } else { REMEMBER_EVERY });
            if woken.change && !woken.nudge {
                woken.nudge = self.let_rest();
            }
            let is_due = woken.change || woken.nudge || read_at.elapsed() >= READ_EVERY;
            if !is_due && self.memory.is_recalled() {
                self.is_kept = self.memory.keep(self.last_good.documents());
                continue;
            }
            self.arm();
            let desired = self.read().unwrap_or_else(|error| self.last_good.keep(self.unreadable(&error)));
            let desired = Desired { partial: !self.memory.is_recalled(), ..desired };
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

    /// What an earlier agent knew comes first: only then can be told what has turned bad meanwhile. What is known
    /// now is kept for the next one.
    fn read(&mut self) -> io::Result<Desired> {
        if !self.memory.is_recalled()
            && let Some(documents) = self.memory.recall()
        {
            self.last_good.recall(documents);
        }
        let desired = self.last_good.take(read_directory(&self.directory)?);
        let desired = Desired { partial: !self.memory.is_recalled(), ..desired };
        self.is_kept = self.memory.is_recalled() && self.memory.keep(self.last_good.documents());
        Ok(desired)
    }

    /// Watches the directory that is there now; for the one that was already watched this changes nothing.
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
            tracing::debug!(directory = %self.directory.display(), error = errno.desc(), "not watched; it is read anyway");
        }
    }

    /// Waits until nothing changes any more. Does somebody want a reading meanwhile?
    fn let_rest(&self) -> bool {
        let begun = Instant::now();
        while begun.elapsed() < PUT_OFF_AT_MOST {
            let woken = self.wait(REST);
            if woken.nudge || !woken.change {
                return woken.nudge;
            }
        }
        false
    }

    /// Waits for events and takes them.
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
            // The queue has overflowed or is empty after all: reading once too often does no harm.
            Err(_) => true,
        }
    }

    fn unreadable(&self, error: &io::Error) -> Problem {
        Problem {
            file: Some(self.directory.clone()),
            document: 0,
            share: None,
            field: String::new(),
            message: format!("the directory cannot be read: {error}; every share stays as it was"),
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
    async fn additions_changes_and_removals_are_seen() {
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
    async fn a_directory_that_goes_takes_nothing_with_it_and_may_come_back() {
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
    async fn a_reading_that_is_asked_for_is_done_when_it_is_said_to_be() {
        let folder = tempfile::tempdir().unwrap();
        let mut manifests = follow(folder.path(), NO_BROKER.as_ref()).unwrap();
        for round in 1..=20 {
            fs::write(folder.path().join(format!("{round}.yaml")), manifest(&format!("s{round}"))).unwrap();
            manifests.read_again().await;
            assert_eq!(manifests.desired.borrow().shares.len(), round);
        }
    }

    #[test]
    fn a_directory_that_is_not_there_is_an_error_at_the_start() {
        let error = follow(Path::new("/nowhere/shares"), NO_BROKER.as_ref()).unwrap_err();
        assert!(error.to_string().contains("/nowhere/shares"), "{error}");
    }
}
