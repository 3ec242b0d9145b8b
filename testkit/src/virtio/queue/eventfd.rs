//! Kick and call eventfds.

use std::os::fd::BorrowedFd;
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};

use super::QueueError;

/// Why a poll returned; neither after a timeout.
#[derive(Debug, Clone, Copy)]
pub(super) struct Woken {
    pub(super) called: bool,
    pub(super) hung_up: bool,
}

/// Waits for `fd` to be readable or for the socket to hang up.
pub(super) fn wait_readable(
    fd: BorrowedFd<'_>,
    socket: Option<BorrowedFd<'_>>,
    patience: Duration,
) -> Result<Woken, QueueError> {
    let mut fds = vec![PollFd::new(fd, PollFlags::POLLIN)];
    if let Some(socket) = socket {
        // poll(2) always reports a hang-up. The front-end reads the data.
        fds.push(PollFd::new(socket, PollFlags::empty()));
    }
    // Rounded up: otherwise it would spin during the last fraction of a millisecond.
    let millis = patience.as_millis().saturating_add(1).min(1 << 30) as i32;
    let timeout = PollTimeout::try_from(millis).unwrap_or(PollTimeout::MAX);
    match poll(&mut fds, timeout) {
        Ok(_) | Err(nix::Error::EINTR) => {}
        Err(source) => {
            return Err(QueueError::Event { what: "waiting for the call", source });
        }
    }
    let any = |fd: &PollFd<'_>| fd.any().unwrap_or(false);
    Ok(Woken { called: any(&fds[0]), hung_up: fds.get(1).is_some_and(any) })
}

pub(super) fn eventfd() -> Result<EventFd, QueueError> {
    let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
    EventFd::from_value_and_flags(0, flags).map_err(|source| QueueError::Event { what: "creating an eventfd", source })
}
