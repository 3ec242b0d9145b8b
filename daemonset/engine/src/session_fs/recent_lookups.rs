//! Files that were looked up a moment ago, kept open so that the request that follows finds them.
//!
//! The library closes what it looked up and opens it by its file handle for the next request. If the file was replaced or
//! removed in between, that fails with `ESTALE`. The guest's kernel then looks the name up again and repeats the request,
//! but only once (`do_filp_open`, `retry_estale`). Where a file is replaced some hundred times a second that fails as
//! well, and the program gets an error. On a local file system it gets the old file or the new one.
//!
//! The first `ESTALE` is expected, because the guest's kernel may come by a cached name. So nothing is kept until a node was
//! found stale; then the files of all lookups are, for a short time. Where no files are replaced this costs nothing.
//!
//! After an OPEN that was refused, the same thread's LOOKUP and OPEN are the kernel's second attempt if they come within
//! [`AFTER_STALE`]: guest and host may be busy. Other OPENs follow their LOOKUP at once, or come by a cached name
//! ([`super::removed`]).

use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::time::{Duration, Instant};

use virtiofsd::filesystem::{Entry, FileSystem};

use crate::ledger::OpenKind;

use super::SessionFs;
use super::errors::{engine_context, errno};
use super::handles::OpenFile;
use super::nodes::SAME_WALK;
use super::request::RequestContext;
use super::state::State;

/// Most files that are kept. `limits::TRANSIENT_FILES` reserves descriptors for them.
const MAX_KEPT: usize = 16;

/// How long after a node was found stale files are kept, each until the first sweep after as long, and how long the kernel's
/// second attempt to open a file may take.
const AFTER_STALE: Duration = Duration::from_secs(1);

/// Most threads of the guest whose OPEN was refused.
const MAX_REFUSED: usize = 16;

/// Most lookups for one request. Between a lookup and the open of what it found, a file is hardly ever replaced.
const MAX_LOOKUPS: usize = 8;

/// The files that are kept, and whether any are to be.
#[derive(Default)]
pub(super) struct RecentLookups {
    /// When a node was found stale last.
    stale_at: Option<Instant>,
    /// `O_PATH` descriptors, the oldest first.
    kept: VecDeque<(Instant, File)>,
    /// Threads of the guest whose last OPEN was refused, and when, the oldest first.
    refused: VecDeque<(libc::pid_t, Instant)>,
}

impl RecentLookups {
    /// A node was found stale: files that are looked up from now on are kept.
    pub(super) fn node_is_stale(&mut self) {
        self.stale_at = Some(Instant::now());
    }

    /// True if files that are looked up are to be kept.
    pub(super) fn must_keep(&self) -> bool {
        self.stale_at.is_some_and(|at| at.elapsed() < AFTER_STALE)
    }

    /// An OPEN of this thread is answered `ESTALE`.
    pub(super) fn open_refused(&mut self, pid: libc::pid_t) {
        self.node_is_stale();
        self.refused.retain(|(by, _)| *by != pid);
        if self.refused.len() == MAX_REFUSED {
            self.refused.pop_front();
        }
        self.refused.push_back((pid, Instant::now()));
    }

    /// How long before an OPEN of this thread the LOOKUP of the same path walk may have been.
    pub(super) fn longest_walk(&mut self, pid: libc::pid_t) -> Duration {
        let refused = self.refused.iter().position(|(by, _)| *by == pid);
        let refused = refused.and_then(|position| self.refused.remove(position));
        let repeats = refused.is_some_and(|(_, at)| at.elapsed() < AFTER_STALE);
        if repeats { AFTER_STALE } else { SAME_WALK }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.kept.is_empty()
    }

    fn keep(&mut self, file: File) {
        drop(self.take_old());
        if self.kept.len() == MAX_KEPT {
            self.kept.pop_front();
        }
        self.kept.push_back((Instant::now(), file));
    }

    /// Files that no request of the same path walk can be about. Closing the last descriptor of a removed file may take long.
    pub(super) fn take_old(&mut self) -> Vec<File> {
        let old = self.kept.iter().take_while(|(at, _)| at.elapsed() >= AFTER_STALE).count();
        self.kept.drain(..old).map(|(_, file)| file).collect()
    }
}

impl<F: FileSystem> SessionFs<F> {
    /// True if the file that a LOOKUP finds is to be kept. Without file handles the library has each inode open.
    pub(super) fn must_keep(&self, state: &State, request: RequestContext, mode: u32) -> bool {
        let regular = mode & libc::S_IFMT == libc::S_IFREG;
        regular && request.is_lookup() && !self.mounts.is_empty() && state.recent.must_keep()
    }

    /// Looks up, and keeps the file open that was found if it has to be.
    pub(super) fn look_up_and_keep(
        &self,
        state: &mut State,
        request: RequestContext,
        mut look_up: impl FnMut(&mut State) -> io::Result<Entry>,
    ) -> io::Result<Entry> {
        let mut found = look_up(state)?;
        for _ in 1..MAX_LOOKUPS {
            if !self.must_keep(state, request, found.attr.mode) {
                break;
            }
            match self.open_path(found.inode) {
                Ok(file) => {
                    self.keep(state, file);
                    break;
                }
                Err(stale) if errno(&stale) == libc::ESTALE => {
                    self.library.forget(engine_context(), found.inode.into(), 1);
                    found = look_up(state)?;
                }
                // Without a descriptor left, the file is not kept.
                Err(_) => break,
            }
        }
        Ok(found)
    }

    fn keep(&self, state: &mut State, file: File) {
        let first = state.keeps_nothing();
        state.recent.keep(file);
        if first {
            self.shared.wake_sweep.notify_one();
        }
    }

    /// An `O_PATH` descriptor of an inode of the library.
    fn open_path(&self, inode: u64) -> io::Result<File> {
        let (handle, _) = self.library.open(engine_context(), inode.into(), false, libc::O_PATH as u32)?;
        let handle = handle.ok_or_else(|| io::Error::from_raw_os_error(libc::EBADF))?.into();
        let file = self.with_file(&OpenFile::Library { inode, handle }, File::try_clone);
        self.close_unused(OpenKind::File, inode, handle);
        file
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file() -> File {
        File::open("/dev/null").unwrap()
    }

    #[test]
    fn nothing_is_kept_until_a_node_is_stale() {
        let mut recent = RecentLookups::default();
        assert!(!recent.must_keep());
        recent.node_is_stale();
        assert!(recent.must_keep());
        recent.stale_at = Instant::now().checked_sub(AFTER_STALE);
        assert!(!recent.must_keep());
    }

    #[test]
    fn few_files_are_kept_and_not_for_long() {
        let mut recent = RecentLookups::default();
        (0..2 * MAX_KEPT).for_each(|_| recent.keep(file()));
        assert!(recent.kept.len() <= MAX_KEPT);
        recent.kept = (0..4).map(|_| (Instant::now().checked_sub(AFTER_STALE).unwrap(), file())).collect();
        recent.keep(file());
        assert_eq!(recent.kept.len(), 1, "the old ones are closed");
    }

    #[test]
    fn an_open_after_a_refused_one_may_be_late_once() {
        let mut recent = RecentLookups::default();
        recent.open_refused(7);
        assert_eq!(recent.longest_walk(8), SAME_WALK);
        assert_eq!([recent.longest_walk(7), recent.longest_walk(7)], [AFTER_STALE, SAME_WALK]);
        recent.refused.extend(Instant::now().checked_sub(AFTER_STALE).map(|at| (7, at)));
        recent.open_refused(7);
        assert_eq!(recent.longest_walk(7), AFTER_STALE, "the last refusal counts");
        (0..2 * MAX_REFUSED as i32).for_each(|pid| recent.open_refused(pid));
        assert_eq!(recent.refused.len(), MAX_REFUSED);
    }
}
