//! Interrupts a system call of another thread.
//!
//! A close that waits for a lingering socket ends early when its thread receives a signal (`sk_stream_wait_close`). A signal
//! that is ignored wakes nobody, so it has a handler, which does nothing.

use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};

const SIGNAL: Signal = Signal::SIGUSR2;

/// Installs the handler.
pub(crate) fn install() -> std::io::Result<()> {
    extern "C" fn nothing(_: libc::c_int) {}
    // With SA_RESTART, a call that can be restarted does not notice.
    let action = SigAction::new(SigHandler::Handler(nothing), SaFlags::SA_RESTART, SigSet::empty());
    // SAFETY: the handler does nothing, so it is safe at any point of any thread.
    unsafe { sigaction(SIGNAL, &action) }?;
    Ok(())
}

/// A thread of this process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct ThreadId(i32);

impl ThreadId {
    /// The calling thread.
    pub(crate) fn current() -> Self {
        ThreadId(rustix::thread::gettid().as_raw_nonzero().get())
    }

    /// Interrupts its system call, if it is in one that can be interrupted. If the thread has ended, another one of this
    /// process may receive the signal, which has no effect there.
    pub(crate) fn interrupt(self) {
        // SAFETY: tgkill reads three numbers; the process is this one.
        unsafe { libc::syscall(libc::SYS_tgkill, std::process::id(), self.0, SIGNAL as libc::c_int) };
    }
}
