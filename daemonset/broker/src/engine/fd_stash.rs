//! The fd stash: open files without a name that must outlive the engine that opened them.
//!
//! An unlinked file exists only while somebody has it open. Before an engine carries out a call that unlinks an open
//! file, it sends the file to the stash and waits for the reply. A thread of its own replies, never a thread that may
//! itself wait for that engine.
//!
//! Closing a file may block for ever if its file system hangs, and so may receiving one that the engine sent in excess. So
//! only that thread receives, other threads close files, and the lock is held for nothing but the table: the status of the
//! broker, the next engine and the end of the session wait for neither.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, mpsc};
use std::thread;
use std::time::Duration;

use rustix::fs::{AtFlags, StatxFlags, statx};
use virtiofs_contract::channel::{ChannelError, PacketChannel};
use virtiofs_contract::engine::{StashReply, StashRequest};

use crate::channel::{Receiver, Sender, channel};
use crate::disposal::{Account, Foreign};
use crate::holder::Hold;
use crate::holder::names::Part;
use crate::limits::stashed_files;
use crate::poll::{Interest, wait_readable};

/// Most files of one session. The guest decides how many open files it unlinks.
const MAX_STASHED: usize = 4096;

/// Time within which the last requests of a dead engine must be handled. If one blocks, the next engine does without.
const DRAIN_DEADLINE: Duration = Duration::from_secs(1);

/// Time within which the attributes of all stashed files must be read. They are cached, so only a file system that ignores
/// that takes longer.
const STAT_DEADLINE: Duration = Duration::from_secs(1);

/// Files in the stashes of all sessions, and files that are being closed.
static STASHED: OnceLock<Arc<Account>> = OnceLock::new();

fn all_stashes() -> &'static Arc<Account> {
    STASHED.get_or_init(Arc::default)
}

/// Limits of the number of stashed files, those that are being closed included.
#[derive(Clone, Copy, Debug)]
struct Bounds {
    /// Of one session.
    session: usize,
    /// Of all sessions together.
    total: usize,
}

type Files = BTreeMap<u64, Arc<Foreign>>;

/// The stashed files of one session, by the guest's file handle.
#[derive(Debug)]
pub(crate) struct FdStash {
    bounds: Bounds,
    files: Mutex<Files>,
    account: Arc<Account>,
    /// Where files outlive the broker.
    hold: Hold,
}

/// Serves the stash to one engine.
#[derive(Clone, Debug)]
pub(crate) struct StashServer {
    /// Requests to handle everything that has been sent, each with a sender for the acknowledgement.
    drains: Sender<mpsc::Sender<()>>,
}

impl StashServer {
    /// Starts a thread that serves until the engine closes its end.
    pub(crate) fn start(stash: Arc<FdStash>, engine: PacketChannel) -> io::Result<Self> {
        let (drains, requests) = channel()?;
        thread::Builder::new().name("fd-stash".into()).spawn(move || serve(&stash, &engine, &requests))?;
        Ok(StashServer { drains })
    }

    /// Handles the remaining requests of a dead engine. When this returns, the next engine finds every file that the
    /// dead one had sent, unless one of them blocks the receiver.
    pub(crate) fn drain(&self) {
        let (done, acknowledged) = mpsc::channel();
        self.drains.send(done);
        if acknowledged.recv_timeout(DRAIN_DEADLINE) == Err(mpsc::RecvTimeoutError::Timeout) {
            tracing::warn!("fd stash: a file that the engine sent last blocks; it may be lost");
        }
    }
}

/// Serves the stash to one engine, until that closes its end.
fn serve(stash: &FdStash, engine: &PacketChannel, drains: &Receiver<mpsc::Sender<()>>) {
    loop {
        let Ok([request, drain]) = wait_readable(&[Interest::of(engine), Interest::of(drains)], None) else { return };
        if request {
            if stash.handle(engine).is_err() {
                return;
            }
        } else if drain {
            // Nothing was waiting when it was requested.
            drains.take().into_iter().for_each(|done| _ = done.send(()));
        }
    }
}

impl FdStash {
    /// Creates an empty stash.
    pub(crate) fn create(hold: Hold) -> Self {
        Self::with_bounds(Bounds { session: MAX_STASHED, total: stashed_files() }, hold)
    }

    /// The stash of a restored session.
    pub(crate) fn restored(files: BTreeMap<u64, Arc<OwnedFd>>, hold: Hold) -> Self {
        let stash = Self::create(hold);
        let own =
            |(handle, file): (u64, Arc<OwnedFd>)| (handle, Arc::new(Foreign::shared(file, stash.account.clone())));
        *stash.files() = files.into_iter().map(own).collect();
        stash
    }

    fn with_bounds(bounds: Bounds, hold: Hold) -> Self {
        FdStash { bounds, files: Mutex::default(), account: Account::below(all_stashes()), hold }
    }

    /// Handles one request. It stays in the channel until it is answered: an engine waits for the reply, and the broker may
    /// be killed before. The engine ignores a second reply.
    fn handle(&self, engine: &PacketChannel) -> Result<(), ChannelError> {
        let foreign = |fd: OwnedFd| Arc::new(Foreign::new(fd, self.account.clone()));
        // They live until the request is discarded, so that the kernel never closes the last copy of one there.
        let (message, fds) = engine.peek::<StashRequest, _>(foreign)?;
        match message {
            StashRequest::Stash { request, handle } => {
                let accepted = fds.first().is_some_and(|file| self.insert(handle, file));
                reply(engine, &StashReply::Stashed { request, accepted }, &[]);
            }
            StashRequest::Fetch { request, handle } => {
                let file = self.files().get(&handle).cloned();
                let fds: Vec<_> = file.iter().map(|file| file.as_fd()).collect();
                reply(engine, &StashReply::Fetched { request, found: file.is_some() }, &fds);
            }
            StashRequest::Release { handle } => {
                if self.files().remove(&handle).is_some() {
                    self.hold.remove(Part::File(handle));
                }
            }
            StashRequest::ReleaseAll => self.clear(),
        }
        engine.discard()
    }

    /// Number of stashed files.
    pub(crate) fn count(&self) -> usize {
        self.files().len()
    }

    /// Number of stashed files without a name; none: their file system does not answer.
    pub(crate) fn count_orphaned(&self) -> Option<usize> {
        let files: Vec<_> = self.files().values().cloned().collect();
        let (answer, counted) = mpsc::channel();
        let count = move || {
            let orphaned = |file: &&Arc<Foreign>| {
                let stat = statx(file, "", AtFlags::EMPTY_PATH | AtFlags::STATX_DONT_SYNC, StatxFlags::NLINK);
                stat.is_ok_and(|stat| stat.stx_nlink == 0)
            };
            // The receiver is gone if the deadline has passed.
            let _ = answer.send(files.iter().filter(orphaned).count());
        };
        thread::Builder::new().name("fd-stat".into()).spawn(count).ok()?;
        counted.recv_timeout(STAT_DEADLINE).ok()
    }

    /// Closes all files.
    pub(crate) fn clear(&self) {
        let files = std::mem::take(&mut *self.files());
        files.keys().for_each(|handle| self.hold.remove(Part::File(*handle)));
    }

    fn insert(&self, handle: u64, file: &Arc<Foreign>) -> bool {
        let known = self.files().contains_key(&handle);
        let room = known || self.bounds.have_room(self.account.files(), all_stashes().files());
        if !room {
            return false;
        }
        if known {
            self.hold.remove(Part::File(handle));
        }
        self.hold.deposit(Part::File(handle), file.clone());
        self.files().insert(handle, file.clone());
        true
    }

    fn files(&self) -> MutexGuard<'_, Files> {
        self.files.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A dead engine does not receive the reply, but its other requests count.
fn reply(engine: &PacketChannel, reply: &StashReply, fds: &[BorrowedFd<'_>]) {
    if let Err(error) = engine.send(reply, fds) {
        tracing::debug!(%error, "reply of the fd stash");
    }
}

impl Bounds {
    /// True if a file fits that these numbers include already.
    fn have_room(self, session: usize, total: usize) -> bool {
        session <= self.session && total <= self.total
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::{Read, Write};
    use std::time::Instant;

    use super::*;
    use crate::disposal::tests::lingering;

    fn engine(stash: &Arc<FdStash>) -> (PacketChannel, StashServer) {
        let (ours, theirs) = PacketChannel::pair().unwrap();
        (theirs, StashServer::start(stash.clone(), ours).unwrap())
    }

    fn stash_file(channel: &PacketChannel, handle: u64, file: &File) -> bool {
        channel.send(&StashRequest::Stash { request: 5, handle }, &[file.as_fd()]).unwrap();
        matches!(channel.receive().unwrap(), (StashReply::Stashed { request: 5, accepted: true }, _))
    }

    fn fetch(channel: &PacketChannel, handle: u64) -> Option<File> {
        channel.send(&StashRequest::Fetch { request: 6, handle }, &[]).unwrap();
        let (reply, fds) = channel.receive::<StashReply>().unwrap();
        let file = fds.into_iter().next().map(File::from);
        assert_eq!(reply, StashReply::Fetched { request: 6, found: file.is_some() });
        file
    }

    fn nobody() -> Hold {
        crate::holder::Holder::default().group(crate::holder::names::Group::Session(1))
    }

    fn scratch(text: &str) -> File {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(text.as_bytes()).unwrap();
        file
    }

    #[test]
    fn file_outlives_the_engine_that_stashed_it() {
        let stash = Arc::new(FdStash::create(nobody()));
        let (first, _) = engine(&stash);
        assert!(stash_file(&first, 7, &scratch("kept")));
        drop(first);
        let (second, _) = engine(&stash);
        let mut file = fetch(&second, 7).unwrap();
        std::io::Seek::rewind(&mut file).unwrap();
        let mut text = String::new();
        file.read_to_string(&mut text).unwrap();
        assert_eq!(text, "kept");
        assert!(fetch(&second, 8).is_none());
        second.send(&StashRequest::Release { handle: 7 }, &[]).unwrap();
        assert!(fetch(&second, 7).is_none());
    }

    #[test]
    fn drain_handles_the_last_requests_of_a_dead_engine() {
        for _ in 0..200 {
            let stash = Arc::new(FdStash::create(nobody()));
            let (first, server) = engine(&stash);
            first.send(&StashRequest::Stash { request: 5, handle: 1 }, &[scratch("x").as_fd()]).unwrap();
            drop(first);
            server.drain();
            assert!(stash.files().contains_key(&1));
        }
    }

    #[test]
    fn request_that_was_not_answered_is_answered_by_the_next_broker() {
        let stash = Arc::new(FdStash::create(nobody()));
        let (ours, engine) = PacketChannel::pair().unwrap();
        engine.send(&StashRequest::Stash { request: 5, handle: 7 }, &[scratch("kept").as_fd()]).unwrap();
        // A broker that is killed here has peeked the request only.
        drop(ours.peek::<StashRequest, _>(|fd| fd).unwrap());
        StashServer::start(stash.clone(), ours).unwrap();
        let (reply, _) = engine.receive::<StashReply>().unwrap();
        assert_eq!(reply, StashReply::Stashed { request: 5, accepted: true });
        assert!(fetch(&engine, 7).is_some());
    }

    #[test]
    fn session_limit_is_enforced() {
        let bounds = Bounds { session: 4, total: usize::MAX };
        let stash = Arc::new(FdStash::with_bounds(bounds, nobody()));
        let (channel, _server) = engine(&stash);
        let file = scratch("");
        for handle in 0..4 {
            assert!(stash_file(&channel, handle, &file));
        }
        assert!(!stash_file(&channel, 4, &file));
        assert!(stash_file(&channel, 3, &file), "a stashed handle may be stashed again");
        channel.send(&StashRequest::ReleaseAll, &[]).unwrap();
        // They count until they are closed.
        let end = Instant::now() + Duration::from_secs(20);
        while !stash_file(&channel, 4, &file) {
            assert!(Instant::now() < end);
        }
    }

    #[test]
    fn hung_close_blocks_neither_status_nor_engine() {
        let stash = Arc::new(FdStash::create(nobody()));
        let (channel, _server) = engine(&stash);
        let (socket, _peer) = lingering();
        assert!(stash_file(&channel, 1, &File::from(socket)));
        channel.send(&StashRequest::Release { handle: 1 }, &[]).unwrap();
        let begin = Instant::now();
        assert!(stash_file(&channel, 2, &scratch("")));
        assert_eq!(stash.count(), 1);
        stash.clear();
        assert_eq!(stash.count(), 0);
        assert!(begin.elapsed() < std::time::Duration::from_secs(5), "{:?}", begin.elapsed());
    }

    /// A broken engine sends more files than one, and the lock must not wait for the close of any.
    #[test]
    fn excess_descriptors_block_neither_status_nor_end() {
        let stash = Arc::new(FdStash::create(nobody()));
        let (channel, server) = engine(&stash);
        let (excess, peer) = lingering();
        let fds = [scratch("").as_fd().try_clone_to_owned().unwrap(), excess];
        let borrowed: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
        channel.send(&StashRequest::Stash { request: 5, handle: 1 }, &borrowed).unwrap();
        drop(fds);
        let (own_close, own_peer) = lingering();
        channel.send(&StashRequest::Stash { request: 5, handle: 2 }, &[own_close.as_fd()]).unwrap();
        channel.send(&StashRequest::Release { handle: 2 }, &[]).unwrap();
        drop(own_close);
        let begin = Instant::now();
        server.drain();
        assert_eq!(stash.count(), 1);
        assert!(begin.elapsed() < Duration::from_secs(20), "{:?}", begin.elapsed());
        drop((peer, own_peer));
    }

    #[test]
    fn files_that_do_not_close_count_against_their_session() {
        let bounds = Bounds { session: 2, total: usize::MAX };
        let stash = Arc::new(FdStash::with_bounds(bounds, nobody()));
        let (channel, _server) = engine(&stash);
        let mut peers = Vec::new();
        for handle in 0..2 {
            let (socket, peer) = lingering();
            peers.push(peer);
            assert!(stash_file(&channel, handle, &File::from(socket)));
        }
        channel.send(&StashRequest::ReleaseAll, &[]).unwrap();
        assert!(!stash_file(&channel, 3, &scratch("")));
        drop(peers);
    }

    #[test]
    fn lower_limit_decides() {
        let bounds = Bounds { session: 4, total: 8 };
        for (session, total, room) in [(1, 1, true), (4, 8, true), (5, 5, false), (1, 9, false), (4, 10, false)] {
            assert_eq!(bounds.have_room(session, total), room, "{session} of this session, {total} in total");
        }
    }
}
