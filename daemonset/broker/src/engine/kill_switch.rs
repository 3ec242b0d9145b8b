//! Kills all engine processes of a session, and those that are still to come.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use rustix::process::{Signal, pidfd_send_signal};

use crate::poll::{Interest, wait_readable};

/// The engine processes of one session. Any thread may throw the switch: it needs neither the session's thread nor the
/// engines' channels.
#[derive(Debug, Default)]
pub(crate) struct KillSwitch {
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    thrown: bool,
    pidfds: Vec<OwnedFd>,
}

impl KillSwitch {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// True if the session is over.
    pub(crate) fn is_thrown(&self) -> bool {
        self.state().thrown
    }

    /// Adds a process. Kills it if the switch is thrown already.
    pub(crate) fn add(&self, process: BorrowedFd<'_>) -> std::io::Result<()> {
        let pidfd = process.try_clone_to_owned()?;
        let mut state = self.state();
        state.pidfds.retain(|pidfd| !has_exited(pidfd));
        if state.thrown {
            kill(&pidfd);
        }
        state.pidfds.push(pidfd);
        Ok(())
    }

    /// Kills every process that was added, and every one that will be.
    pub(crate) fn throw(&self) {
        let mut state = self.state();
        state.thrown = true;
        state.pidfds.drain(..).for_each(|pidfd| kill(&pidfd));
    }
}

fn has_exited(pidfd: &OwnedFd) -> bool {
    wait_readable(&[Interest::of(pidfd)], Some(Instant::now())).is_ok_and(|[readable]| readable)
}

fn kill(pidfd: &impl AsFd) {
    // It fails only if the process is reaped already.
    let _ = pidfd_send_signal(pidfd, Signal::KILL);
}

#[cfg(test)]
mod tests {
    use std::process::{Child, Command};
    use std::time::Duration;

    use rustix::process::{Pid, PidfdFlags, pidfd_open};

    use super::*;

    fn child() -> (Child, OwnedFd) {
        let child = Command::new("sleep").arg("600").spawn().unwrap();
        let pidfd = pidfd_open(Pid::from_child(&child), PidfdFlags::empty()).unwrap();
        (child, pidfd)
    }

    fn ends(pidfd: &OwnedFd) -> bool {
        wait_readable(&[Interest::of(pidfd)], Some(Instant::now() + Duration::from_secs(20))).unwrap()[0]
    }

    #[test]
    fn processes_before_and_after_the_throw_are_killed() {
        let switch = KillSwitch::default();
        let (mut before, first) = child();
        switch.add(first.as_fd()).unwrap();
        assert!(!switch.is_thrown() && !has_exited(&first));
        switch.throw();
        let (mut after, second) = child();
        switch.add(second.as_fd()).unwrap();
        assert!(switch.is_thrown() && ends(&first) && ends(&second));
        before.wait().unwrap();
        after.wait().unwrap();
    }
}
