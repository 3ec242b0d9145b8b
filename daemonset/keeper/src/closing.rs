//! Closes descriptors. A close can block for an unbounded time: that of a file on a hung file system, and that of a
//! socket with SO_LINGER or with such a socket in a message that is not received. So a pool of threads closes
//! descriptors, and no thread waits for another one.

use std::collections::VecDeque;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};
use rustix::fs::{AtFlags, FileType, StatxFlags, fcntl_get_seals, statx};
use rustix::process::Pid;
use rustix::thread::gettid;

/// Maximum number of threads. Further descriptors wait for a thread.
const MAX_THREADS: usize = 64;

/// Time for which a thread without work waits for more.
const IDLE: Duration = Duration::from_secs(5);

/// Time after which a close is interrupted if descriptors wait. The close of a socket with SO_LINGER then returns.
const OVERDUE: Duration = Duration::from_secs(1);

/// Wakes a thread that is blocked in a close.
const INTERRUPT: Signal = Signal::SIGUSR2;

/// Threads that close descriptors.
#[derive(Clone, Default)]
pub(crate) struct Closer(Arc<Shared>);

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    more: Condvar,
}

#[derive(Default)]
struct State {
    waiting: VecDeque<OwnedFd>,
    idle: usize,
    /// The threads that are closing a descriptor, and since when.
    busy: Vec<(Pid, Instant)>,
    threads: usize,
}

impl Closer {
    pub(crate) fn start() -> io::Result<Self> {
        extern "C" fn nothing(_: libc::c_int) {}
        // An ignored signal does not interrupt a call, and with SA_RESTART the kernel would restart it.
        let action = SigAction::new(SigHandler::Handler(nothing), SaFlags::SA_RESTART, SigSet::empty());
        // SAFETY: the handler does nothing, so it is safe at any point of any thread.
        unsafe { sigaction(INTERRUPT, &action) }?;
        Ok(Closer::default())
    }

    /// Closes a descriptor: a memfd immediately, so that nothing delays it, and one that may block in a thread.
    pub(crate) fn close(&self, fd: OwnedFd) {
        if !may_block(&fd) {
            return;
        }
        let mut state = self.state();
        state.waiting.push_back(fd);
        if state.idle >= state.waiting.len() {
            self.0.more.notify_one();
        } else if state.threads < MAX_THREADS {
            state.threads += 1;
            drop(state);
            self.spawn();
        } else {
            state.interrupt_overdue();
        }
    }

    fn spawn(&self) {
        let closer = self.clone();
        if let Err(error) = thread::Builder::new().name("close".into()).spawn(move || closer.work()) {
            self.state().threads -= 1;
            tracing::error!(%error, "no thread to close a descriptor");
        }
    }

    fn work(&self) {
        let thread = gettid();
        while let Some(fd) = self.next(thread) {
            drop(fd);
            self.state().busy.retain(|(other, _)| *other != thread);
        }
    }

    /// The next descriptor. `None`: there was none for a while; the thread is removed from the count.
    fn next(&self, thread: Pid) -> Option<OwnedFd> {
        let mut state = self.state();
        if state.waiting.is_empty() {
            state.idle += 1;
            let waited = self.0.more.wait_timeout_while(state, IDLE, |state| state.waiting.is_empty());
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
            state.idle -= 1;
        }
        let next = state.waiting.pop_front();
        match next {
            Some(_) => state.busy.push((thread, Instant::now())),
            None => state.threads -= 1,
        }
        next
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    /// The threads in `busy` run: each removes itself, under the lock, before it ends.
    fn interrupt_overdue(&self) {
        for (thread, _) in self.busy.iter().filter(|(_, since)| since.elapsed() >= OVERDUE) {
            let thread = thread.as_raw_nonzero().get();
            // SAFETY: tgkill reads three numbers; the process is this one.
            unsafe { libc::syscall(libc::SYS_tgkill, std::process::id(), thread, INTERRUPT as libc::c_int) };
        }
    }
}

/// Reads only attributes that the kernel has in memory, so that it does not block.
fn may_block(fd: &OwnedFd) -> bool {
    let Ok(stat) = statx(fd, "", AtFlags::EMPTY_PATH | AtFlags::STATX_DONT_SYNC, StatxFlags::TYPE) else { return true };
    match FileType::from_raw_mode(stat.stx_mode.into()) {
        FileType::Directory | FileType::Socket => true,
        // Only files of tmpfs and hugetlbfs can have seals.
        FileType::RegularFile => fcntl_get_seals(fd).is_err(),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::Write;
    use std::net::{TcpListener, TcpStream};
    use std::os::unix::net::UnixStream;

    use rustix::fs::{MemfdFlags, memfd_create};

    use super::*;

    /// A socket whose close blocks for a minute: it lingers for data that its peer does not read.
    fn lingering() -> (OwnedFd, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let mut socket = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let peer = listener.accept().unwrap().0;
        socket.set_nonblocking(true).unwrap();
        while socket.write(&[0; 1 << 16]).is_ok() {}
        socket.set_nonblocking(false).unwrap();
        rustix::net::sockopt::set_socket_linger(&socket, Some(Duration::from_secs(60))).unwrap();
        (socket.into(), peer)
    }

    #[test]
    fn memory_is_closed_at_once_and_files_and_sockets_are_not() {
        let memory = memfd_create("x", MemfdFlags::CLOEXEC).unwrap();
        let (reader, _writer) = io::pipe().unwrap();
        assert!(!may_block(&memory) && !may_block(&reader.into()));
        assert!(may_block(&UnixStream::pair().unwrap().0.into()));
        for path in ["/proc/self/maps", "/"] {
            assert!(may_block(&File::open(path).unwrap().into()), "{path}");
        }
    }

    #[test]
    fn sockets_that_linger_delay_no_other_close() {
        let closer = Closer::start().unwrap();
        let begin = Instant::now();
        // More than there are threads.
        let peers: Vec<_> = (0..MAX_THREADS + 8)
            .map(|_| {
                let (socket, peer) = lingering();
                closer.close(socket);
                peer
            })
            .collect();
        thread::sleep(OVERDUE);
        let (near, mut far) = UnixStream::pair().unwrap();
        closer.close(near.into());
        assert_eq!(io::copy(&mut far, &mut io::sink()).unwrap(), 0);
        assert!(begin.elapsed() < Duration::from_secs(50), "{:?}", begin.elapsed());
        drop(peers);
    }
}
