//! Open files that a session's engine has given into keeping: they must outlive it.
//!
//! An unlinked file exists as long as somebody has it open. The engine parks it before the guest's call that
//! unlinks it is carried out, and waits for the answer: so this is answered by a thread of its own, never by
//! one that may itself be waiting for that engine.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Instant;

use rustix::fs::{AtFlags, StatxFlags, statx};
use virtiofs_contract::channel::{ChannelError, PacketChannel};
use virtiofs_contract::engine::{StashReply, StashRequest};

use crate::limits::stashed_files;
use crate::poll::{Interest, wait_readable};

/// Most files of one session: a guest decides how many it unlinks while they are open.
const MAX_PARKED: usize = 4096;

/// Files parked by all sessions together.
static PARKED: AtomicUsize = AtomicUsize::new(0);

/// How many files may be parked.
#[derive(Clone, Copy, Debug)]
struct Bounds {
    /// By one session.
    own: usize,
    /// By all sessions together.
    all: usize,
}

/// The files of one session, by the guest's number of the handle.
#[derive(Debug)]
pub(crate) struct ParkingLot {
    bounds: Bounds,
    files: Mutex<BTreeMap<u64, OwnedFd>>,
}

/// Serves one engine from the lot.
#[derive(Clone, Debug)]
pub(crate) struct Attendant {
    lot: Arc<ParkingLot>,
    channel: Arc<PacketChannel>,
}

impl Attendant {
    /// Serves until the engine closes its end.
    pub(crate) fn start(lot: Arc<ParkingLot>, channel: PacketChannel) -> io::Result<Self> {
        let attendant = Attendant { lot, channel: Arc::new(channel) };
        let serving = attendant.clone();
        thread::Builder::new().name("parking".into()).spawn(move || serving.serve())?;
        Ok(attendant)
    }

    /// Carries out what a dead engine has asked for last. Nothing of it is left when this returns, so the next
    /// engine finds what this one had parked.
    pub(crate) fn settle(&self) {
        let mut files = self.lot.lock();
        while self.something_waits(Some(Instant::now())) && self.attend(&mut files).is_ok() {}
    }

    fn serve(&self) {
        while self.something_waits(None) {
            // Looked at again under the lock: `settle` may have been faster.
            let mut files = self.lot.lock();
            if self.something_waits(Some(Instant::now())) && self.attend(&mut files).is_err() {
                return;
            }
        }
    }

    fn something_waits(&self, deadline: Option<Instant>) -> bool {
        wait_readable(&[Interest::of(&*self.channel)], deadline).is_ok_and(|[ready]| ready)
    }

    fn attend(&self, files: &mut BTreeMap<u64, OwnedFd>) -> Result<(), ChannelError> {
        let (message, fds) = self.channel.receive::<StashRequest>()?;
        match message {
            StashRequest::Stash { handle } => {
                let accepted = park(files, self.lot.bounds, handle, fds.into_iter().next());
                self.channel.send(&StashReply::Stashed { accepted }, &[])
            }
            StashRequest::Fetch { handle } => {
                let file = files.get(&handle);
                let fds: Vec<_> = file.iter().map(|file| file.as_fd()).collect();
                self.channel.send(&StashReply::Fetched { found: file.is_some() }, &fds)
            }
            StashRequest::Release { handle } => {
                release(files.remove(&handle).into_iter().count());
                Ok(())
            }
            StashRequest::ReleaseAll => {
                release(files.len());
                files.clear();
                Ok(())
            }
        }
    }
}

impl Default for ParkingLot {
    fn default() -> Self {
        ParkingLot { bounds: Bounds { own: MAX_PARKED, all: stashed_files() }, files: Mutex::default() }
    }
}

impl ParkingLot {
    /// How many files are kept.
    pub(crate) fn count(&self) -> usize {
        self.lock().len()
    }

    /// How many of them no name leads to any more. What is known here is enough: a source that hangs is not asked.
    pub(crate) fn nameless(&self) -> usize {
        let gone = |file: &&OwnedFd| {
            let stat = statx(file, "", AtFlags::EMPTY_PATH | AtFlags::STATX_DONT_SYNC, StatxFlags::NLINK);
            stat.is_ok_and(|stat| stat.stx_nlink == 0)
        };
        self.lock().values().filter(gone).count()
    }

    /// Lets go of all of them.
    pub(crate) fn clear(&self) {
        let mut files = self.lock();
        release(files.len());
        files.clear();
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<u64, OwnedFd>> {
        self.files.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for ParkingLot {
    fn drop(&mut self) {
        release(self.lock().len());
    }
}

impl Bounds {
    /// Is there room for one more beside these?
    fn have_room(self, own: usize, all: usize) -> bool {
        own < self.own && all < self.all
    }
}

fn park(files: &mut BTreeMap<u64, OwnedFd>, bounds: Bounds, handle: u64, file: Option<OwnedFd>) -> bool {
    let Some(file) = file else { return false };
    if !files.contains_key(&handle) {
        if !bounds.have_room(files.len(), PARKED.load(Relaxed)) {
            return false;
        }
        PARKED.fetch_add(1, Relaxed);
    }
    files.insert(handle, file);
    true
}

fn release(count: usize) {
    PARKED.fetch_sub(count, Relaxed);
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::{Read, Write};

    use super::*;

    fn engine(lot: &Arc<ParkingLot>) -> (PacketChannel, Attendant) {
        let (ours, theirs) = PacketChannel::pair().unwrap();
        (theirs, Attendant::start(lot.clone(), ours).unwrap())
    }

    fn park_with(channel: &PacketChannel, handle: u64, file: &File) -> bool {
        channel.send(&StashRequest::Stash { handle }, &[file.as_fd()]).unwrap();
        matches!(channel.receive().unwrap(), (StashReply::Stashed { accepted: true }, _))
    }

    fn fetch(channel: &PacketChannel, handle: u64) -> Option<File> {
        channel.send(&StashRequest::Fetch { handle }, &[]).unwrap();
        let (answer, fds) = channel.receive::<StashReply>().unwrap();
        let file = fds.into_iter().next().map(File::from);
        assert_eq!(answer, StashReply::Fetched { found: file.is_some() });
        file
    }

    fn scratch(text: &str) -> File {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(text.as_bytes()).unwrap();
        file
    }

    #[test]
    fn a_file_outlives_the_engine_that_parked_it() {
        let lot = Arc::new(ParkingLot::default());
        let (first, _) = engine(&lot);
        assert!(park_with(&first, 7, &scratch("kept")));
        drop(first);
        let (second, _) = engine(&lot);
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
    fn the_last_words_of_a_dead_engine_are_heard_before_the_next_one_asks() {
        for _ in 0..200 {
            let lot = Arc::new(ParkingLot::default());
            let (first, attendant) = engine(&lot);
            first.send(&StashRequest::Stash { handle: 1 }, &[scratch("x").as_fd()]).unwrap();
            drop(first);
            attendant.settle();
            assert!(lot.lock().contains_key(&1));
        }
    }

    #[test]
    fn a_session_keeps_so_many_and_no_more() {
        let bounds = Bounds { own: 4, all: usize::MAX };
        let lot = Arc::new(ParkingLot { bounds, files: Mutex::default() });
        let (channel, _attendant) = engine(&lot);
        let file = scratch("");
        for handle in 0..4 {
            assert!(park_with(&channel, handle, &file));
        }
        assert!(!park_with(&channel, 4, &file));
        assert!(park_with(&channel, 3, &file), "what is there may be parked again");
        channel.send(&StashRequest::ReleaseAll, &[]).unwrap();
        assert!(park_with(&channel, 4, &file));
    }

    #[test]
    fn room_ends_with_the_first_bound_that_is_reached() {
        let bounds = Bounds { own: 4, all: 8 };
        for (own, all, room) in [(0, 0, true), (3, 7, true), (4, 4, false), (0, 8, false), (3, 9, false)] {
            assert_eq!(bounds.have_room(own, all), room, "{own} of this session, {all} of all");
        }
    }
}
