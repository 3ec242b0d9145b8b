//! Closes descriptors that others made, on threads that nothing waits for.
//!
//! A close can block for as long as its maker likes: a socket that lingers, a file whose file system hangs. So the
//! threads of sessions, of the control socket and of the fd stash never close such a descriptor themselves.

use std::collections::VecDeque;
use std::fmt;
use std::mem::ManuallyDrop;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use crate::interrupt::ThreadId;

/// Time for which a thread without work waits for more.
const IDLE: Duration = Duration::from_secs(5);

/// Most threads. Descriptors beyond that wait for a thread; admission bounds how many one endpoint can have there.
const MAX_THREADS: usize = 4096;

/// Time after which a close is interrupted by [`interrupt_overdue`].
const OVERDUE: Duration = Duration::from_secs(1);

/// Whose descriptors they are. Counts them, from their arrival until they are closed.
#[derive(Debug, Default)]
pub(crate) struct Account {
    files: AtomicUsize,
    /// Also counts them.
    parent: Option<Arc<Account>>,
}

impl Account {
    /// An account whose descriptors count in `parent` too.
    pub(crate) fn below(parent: &Arc<Account>) -> Arc<Self> {
        Arc::new(Account { files: AtomicUsize::new(0), parent: Some(parent.clone()) })
    }

    /// Number of its descriptors.
    pub(crate) fn files(&self) -> usize {
        self.files.load(Relaxed)
    }

    /// True if this is the other account, or one below it.
    fn is_below(&self, other: &Arc<Account>) -> bool {
        std::ptr::eq(self, Arc::as_ptr(other)) || self.parent.as_ref().is_some_and(|parent| parent.is_below(other))
    }

    fn begin(&self) {
        self.files.fetch_add(1, Relaxed);
        self.parent.iter().for_each(|parent| parent.begin());
    }

    fn end(&self) {
        self.files.fetch_sub(1, Relaxed);
        self.parent.iter().for_each(|parent| parent.end());
    }
}

/// A descriptor that somebody else made. Dropping it never blocks.
pub(crate) struct Foreign {
    fd: ManuallyDrop<SharedFd>,
    account: Arc<Account>,
}

/// An open file that several may hold.
pub(crate) type SharedFd = Arc<dyn AsFd + Send + Sync>;

impl Foreign {
    pub(crate) fn new(fd: OwnedFd, account: Arc<Account>) -> Self {
        Self::shared(Arc::new(fd), account)
    }

    /// One of several holders.
    pub(crate) fn shared(fd: SharedFd, account: Arc<Account>) -> Self {
        account.begin();
        Foreign { fd: ManuallyDrop::new(fd), account }
    }

    /// Replaces the open file by `/dev/null`, under the same number: whoever still holds this descriptor no longer keeps
    /// the file. The close of the file may block the caller.
    pub(crate) fn revoke(&self, null: BorrowedFd<'_>) {
        // SAFETY: the number is that of a descriptor that this value owns and does not close while it is borrowed; dup3
        // replaces its open file in one step.
        let result = unsafe { libc::dup3(null.as_raw_fd(), self.as_fd().as_raw_fd(), libc::O_CLOEXEC) };
        if result < 0 {
            tracing::warn!(error = %std::io::Error::last_os_error(), "descriptor not revoked");
        }
    }
}

impl fmt::Debug for Foreign {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Foreign").field(&self.as_fd().as_raw_fd()).finish()
    }
}

impl AsFd for Foreign {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl Drop for Foreign {
    fn drop(&mut self) {
        // SAFETY: the value is being dropped, so nothing uses the field afterwards.
        let fd = unsafe { ManuallyDrop::take(&mut self.fd) };
        POOL.submit(Closing { fd, account: self.account.clone() });
    }
}

/// A descriptor to close.
struct Closing {
    fd: SharedFd,
    account: Arc<Account>,
}

/// Threads that close descriptors. A new one is started whenever none is idle, so that no close waits for another one.
struct Pool {
    state: Mutex<State>,
    more: Condvar,
}

struct State {
    waiting: VecDeque<Closing>,
    threads: usize,
    idle: usize,
    busy: Vec<Busy>,
}

/// A thread that is closing a descriptor.
struct Busy {
    thread: ThreadId,
    since: Instant,
    account: Arc<Account>,
}

static POOL: Pool = Pool {
    state: Mutex::new(State { waiting: VecDeque::new(), threads: 0, idle: 0, busy: Vec::new() }),
    more: Condvar::new(),
};

/// Interrupts each close of this account that has blocked for a while, and returns how many there are. Those of lingering
/// sockets end then.
pub(crate) fn interrupt_overdue(account: &Arc<Account>) -> usize {
    let now = Instant::now();
    let mut state = POOL.state();
    let overdue =
        |busy: &&mut Busy| now.saturating_duration_since(busy.since) >= OVERDUE && busy.account.is_below(account);
    let mut count = 0;
    for busy in state.busy.iter_mut().filter(overdue) {
        busy.thread.interrupt();
        count += 1;
    }
    count
}

impl Pool {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn submit(&'static self, closing: Closing) {
        let mut state = self.state();
        state.waiting.push_back(closing);
        if state.idle >= state.waiting.len() {
            self.more.notify_one();
            return;
        }
        if state.threads >= MAX_THREADS {
            return;
        }
        state.threads += 1;
        drop(state);
        if let Err(error) = thread::Builder::new().name("fd-close".into()).spawn(move || self.work()) {
            self.state().threads -= 1;
            tracing::error!(%error, "no thread to close a descriptor");
        }
    }

    fn work(&self) {
        let thread = ThreadId::current();
        while let Some(Closing { fd, account }) = self.next(thread) {
            drop(fd);
            self.state().busy.retain(|busy| busy.thread != thread);
            account.end();
        }
    }

    /// The next descriptor; none: there was none for a while, and the thread no longer counts.
    fn next(&self, thread: ThreadId) -> Option<Closing> {
        let mut state = self.state();
        if state.waiting.is_empty() {
            state.idle += 1;
            let waited = self.more.wait_timeout_while(state, IDLE, |state| state.waiting.is_empty());
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
            state.idle -= 1;
        }
        let next = state.waiting.pop_front();
        match &next {
            Some(Closing { account, .. }) => {
                state.busy.push(Busy { thread, since: Instant::now(), account: account.clone() });
            }
            None => state.threads -= 1,
        }
        next
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use std::io::Write;
    use std::net::{TcpListener, TcpStream};

    use super::*;

    /// A socket whose close blocks for a minute: it lingers for data that its peer does not read.
    pub(crate) fn lingering() -> (OwnedFd, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let mut socket = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let peer = listener.accept().unwrap().0;
        socket.set_nonblocking(true).unwrap();
        while socket.write(&[0; 1 << 16]).is_ok() {}
        socket.set_nonblocking(false).unwrap();
        rustix::net::sockopt::set_socket_linger(&socket, Some(Duration::from_secs(60))).unwrap();
        (socket.into(), peer)
    }

    fn until(holds: impl Fn() -> bool) {
        let end = Instant::now() + Duration::from_secs(20);
        while !holds() {
            assert!(Instant::now() < end);
            thread::sleep(Duration::from_millis(5));
        }
    }

    #[test]
    fn blocked_close_delays_neither_its_owner_nor_other_closes() {
        let share = Arc::new(Account::default());
        let (stuck, healthy) = (Account::below(&share), Account::below(&share));
        let begin = Instant::now();
        let mut peers = Vec::new();
        for _ in 0..3 {
            let (socket, peer) = lingering();
            peers.push(peer);
            drop(Foreign::new(socket, stuck.clone()));
        }
        let (reader, writer) = std::io::pipe().unwrap();
        drop(Foreign::new(writer.into(), healthy.clone()));
        assert_eq!(std::io::read_to_string(reader).unwrap(), "");
        assert!(begin.elapsed() < Duration::from_secs(20), "{:?}", begin.elapsed());
        until(|| healthy.files() == 0);
        assert_eq!((stuck.files(), share.files()), (3, 3));
        crate::interrupt::install().unwrap();
        until(|| {
            assert_eq!(interrupt_overdue(&healthy), 0);
            interrupt_overdue(&share);
            share.files() == 0
        });
        drop(peers);
    }

    #[test]
    fn revoked_descriptor_keeps_its_number_and_not_its_file() {
        let (reader, writer) = std::io::pipe().unwrap();
        let foreign = Foreign::new(writer.into(), Arc::default());
        let null = std::fs::File::open("/dev/null").unwrap();
        let number = foreign.as_fd().as_raw_fd();
        foreign.revoke(null.as_fd());
        assert_eq!(std::io::read_to_string(reader).unwrap(), "");
        assert_eq!(foreign.as_fd().as_raw_fd(), number);
    }
}
