//! The fd stash: open files without a name that must outlive the engine that opened them.
//!
//! An unlinked file exists only while somebody has it open. Before an engine carries out a call that unlinks an open
//! file, it sends the file to the stash and waits for the reply. A thread of its own replies, never a thread that may
//! itself wait for that engine.
//!
//! Closing a file may block for ever if its file system hangs. So another thread closes files, outside of the lock: the
//! status of the broker, the next engine and the end of the session do not wait for it.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, mpsc};
use std::thread;
use std::time::Instant;

use rustix::fs::{AtFlags, StatxFlags, statx};
use virtiofs_contract::channel::{ChannelError, PacketChannel};
use virtiofs_contract::engine::{StashReply, StashRequest};

use crate::holder::Hold;
use crate::holder::names::Part;
use crate::limits::stashed_files;
use crate::poll::{Interest, wait_readable};

/// Most files of one session. The guest decides how many open files it unlinks.
const MAX_STASHED: usize = 4096;

/// Files in the stashes of all sessions, and files that are being closed.
static STASHED: AtomicUsize = AtomicUsize::new(0);

/// Limits of the number of stashed files.
#[derive(Clone, Copy, Debug)]
struct Bounds {
    /// Of one session.
    session: usize,
    /// Of all sessions together.
    total: usize,
}

type Files = BTreeMap<u64, Arc<OwnedFd>>;

/// The stashed files of one session, by the guest's file handle.
#[derive(Debug)]
pub(crate) struct FdStash {
    bounds: Bounds,
    files: Mutex<Files>,
    /// Files for the thread that closes them.
    closing: mpsc::Sender<Arc<OwnedFd>>,
    /// Where files outlive the broker.
    hold: Hold,
}

/// Serves the stash to one engine.
#[derive(Clone, Debug)]
pub(crate) struct StashServer {
    stash: Arc<FdStash>,
    channel: Arc<PacketChannel>,
}

impl StashServer {
    /// Starts a thread that serves until the engine closes its end.
    pub(crate) fn start(stash: Arc<FdStash>, channel: PacketChannel) -> io::Result<Self> {
        let server = StashServer { stash, channel: Arc::new(channel) };
        let serving = server.clone();
        thread::Builder::new().name("fd-stash".into()).spawn(move || serving.serve())?;
        Ok(server)
    }

    /// Handles the remaining requests of a dead engine. When this returns, the next engine finds every file that the
    /// dead one had sent.
    pub(crate) fn drain(&self) {
        let mut files = self.stash.lock();
        while self.has_request(Some(Instant::now())) && self.handle(&mut files).is_ok() {}
    }

    fn serve(&self) {
        while self.has_request(None) {
            let mut files = self.stash.lock();
            // Check again under the lock: `drain` may have taken the request.
            if self.has_request(Some(Instant::now())) && self.handle(&mut files).is_err() {
                return;
            }
        }
    }

    fn has_request(&self, deadline: Option<Instant>) -> bool {
        wait_readable(&[Interest::of(&*self.channel)], deadline).is_ok_and(|[ready]| ready)
    }

    /// Handles one request. It stays in the channel until it is answered: an engine waits for the reply, and the broker may
    /// be killed before. The engine ignores a second reply.
    fn handle(&self, files: &mut Files) -> Result<(), ChannelError> {
        let (message, fds) = self.channel.peek::<StashRequest>()?;
        match message {
            StashRequest::Stash { request, handle } => {
                let accepted = self.stash.insert(files, handle, fds.into_iter().next());
                self.reply(&StashReply::Stashed { request, accepted }, &[]);
            }
            StashRequest::Fetch { request, handle } => {
                let file = files.get(&handle);
                let fds: Vec<_> = file.iter().map(|file| file.as_fd()).collect();
                self.reply(&StashReply::Fetched { request, found: file.is_some() }, &fds);
            }
            StashRequest::Release { handle } => {
                let file = files.remove_entry(&handle);
                self.stash.close(file);
            }
            StashRequest::ReleaseAll => self.stash.close(std::mem::take(files)),
        }
        self.channel.discard()
    }

    /// A dead engine does not receive the reply, but its other requests count.
    fn reply(&self, reply: &StashReply, fds: &[std::os::fd::BorrowedFd<'_>]) {
        if let Err(error) = self.channel.send(reply, fds) {
            tracing::debug!(%error, "reply of the fd stash");
        }
    }
}

impl FdStash {
    /// Creates an empty stash, and the thread that closes its files.
    pub(crate) fn create(hold: Hold) -> io::Result<Self> {
        Self::with_bounds(Bounds { session: MAX_STASHED, total: stashed_files() }, hold)
    }

    /// The stash of a restored session.
    pub(crate) fn restored(files: Files, hold: Hold) -> io::Result<Self> {
        let stash = Self::create(hold)?;
        STASHED.fetch_add(files.len(), Relaxed);
        *stash.lock() = files;
        Ok(stash)
    }

    fn with_bounds(bounds: Bounds, hold: Hold) -> io::Result<Self> {
        let (closing, files) = mpsc::channel::<Arc<OwnedFd>>();
        let close_all = move || {
            for file in files {
                drop(file);
                STASHED.fetch_sub(1, Relaxed);
            }
        };
        thread::Builder::new().name("fd-close".into()).spawn(close_all)?;
        Ok(FdStash { bounds, files: Mutex::default(), closing, hold })
    }

    /// Number of stashed files.
    pub(crate) fn count(&self) -> usize {
        self.lock().len()
    }

    /// Number of stashed files without a name. It is read from cached attributes, so a hung source does not block.
    pub(crate) fn count_orphaned(&self) -> usize {
        let orphaned = |file: &&Arc<OwnedFd>| {
            let stat = statx(file, "", AtFlags::EMPTY_PATH | AtFlags::STATX_DONT_SYNC, StatxFlags::NLINK);
            stat.is_ok_and(|stat| stat.stx_nlink == 0)
        };
        self.lock().values().filter(orphaned).count()
    }

    /// Closes all files.
    pub(crate) fn clear(&self) {
        let files = std::mem::take(&mut *self.lock());
        self.close(files);
    }

    fn insert(&self, files: &mut Files, handle: u64, file: Option<OwnedFd>) -> bool {
        let Some(file) = file.map(Arc::new) else { return false };
        let room = files.contains_key(&handle) || self.bounds.have_room(files.len(), STASHED.load(Relaxed));
        STASHED.fetch_add(1, Relaxed);
        if !room {
            self.close_one(file);
            return false;
        }
        self.close(files.remove_entry(&handle));
        self.hold.deposit(Part::File(handle), file.clone());
        files.insert(handle, file);
        true
    }

    /// Hands files to the thread that closes them. They count until they are closed.
    fn close(&self, files: impl IntoIterator<Item = (u64, Arc<OwnedFd>)>) {
        for (handle, file) in files {
            // First here, so that the last reference is that of the thread.
            self.hold.remove(Part::File(handle));
            self.close_one(file);
        }
    }

    fn close_one(&self, file: Arc<OwnedFd>) {
        // The thread receives as long as this sender exists.
        let _ = self.closing.send(file);
    }

    fn lock(&self) -> MutexGuard<'_, Files> {
        self.files.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for FdStash {
    fn drop(&mut self) {
        self.clear();
    }
}

impl Bounds {
    /// True if one more file fits.
    fn have_room(self, session: usize, total: usize) -> bool {
        session < self.session && total < self.total
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::{Read, Write};

    use super::*;

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
        let stash = Arc::new(FdStash::create(nobody()).unwrap());
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
            let stash = Arc::new(FdStash::create(nobody()).unwrap());
            let (first, server) = engine(&stash);
            first.send(&StashRequest::Stash { request: 5, handle: 1 }, &[scratch("x").as_fd()]).unwrap();
            drop(first);
            server.drain();
            assert!(stash.lock().contains_key(&1));
        }
    }

    #[test]
    fn request_that_was_not_answered_is_answered_by_the_next_broker() {
        let stash = Arc::new(FdStash::create(nobody()).unwrap());
        let (ours, engine) = PacketChannel::pair().unwrap();
        engine.send(&StashRequest::Stash { request: 5, handle: 7 }, &[scratch("kept").as_fd()]).unwrap();
        // A broker that is killed here has peeked the request only.
        drop(ours.peek::<StashRequest>().unwrap());
        StashServer::start(stash.clone(), ours).unwrap();
        let (reply, _) = engine.receive::<StashReply>().unwrap();
        assert_eq!(reply, StashReply::Stashed { request: 5, accepted: true });
        assert!(fetch(&engine, 7).is_some());
    }

    #[test]
    fn session_limit_is_enforced() {
        let bounds = Bounds { session: 4, total: usize::MAX };
        let stash = Arc::new(FdStash::with_bounds(bounds, nobody()).unwrap());
        let (channel, _server) = engine(&stash);
        let file = scratch("");
        for handle in 0..4 {
            assert!(stash_file(&channel, handle, &file));
        }
        assert!(!stash_file(&channel, 4, &file));
        assert!(stash_file(&channel, 3, &file), "a stashed handle may be stashed again");
        channel.send(&StashRequest::ReleaseAll, &[]).unwrap();
        assert!(stash_file(&channel, 4, &file));
    }

    /// A socket whose close blocks for ten seconds: it lingers for data that its peer does not read.
    fn lingering() -> (OwnedFd, std::net::TcpStream) {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let mut socket = std::net::TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let peer = listener.accept().unwrap().0;
        socket.set_nonblocking(true).unwrap();
        while socket.write(&[0; 1 << 16]).is_ok() {}
        socket.set_nonblocking(false).unwrap();
        let linger = Some(std::time::Duration::from_secs(10));
        rustix::net::sockopt::set_socket_linger(&socket, linger).unwrap();
        (socket.into(), peer)
    }

    #[test]
    fn hung_close_blocks_neither_status_nor_engine() {
        let stash = Arc::new(FdStash::create(nobody()).unwrap());
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

    #[test]
    fn lower_limit_decides() {
        let bounds = Bounds { session: 4, total: 8 };
        for (session, total, room) in [(0, 0, true), (3, 7, true), (4, 4, false), (0, 8, false), (3, 9, false)] {
            assert_eq!(bounds.have_room(session, total), room, "{session} of this session, {total} in total");
        }
    }
}
