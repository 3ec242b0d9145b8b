//! poll(2): waiting for descriptors.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::time::Instant;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;

/// A descriptor to wait for, or none.
#[derive(Clone, Copy)]
pub(crate) struct Interest<'a>(Option<BorrowedFd<'a>>);

impl<'a> Interest<'a> {
    pub(crate) fn of(fd: &'a impl AsFd) -> Self {
        Interest(Some(fd.as_fd()))
    }

    pub(crate) fn maybe(fd: Option<&'a impl AsFd>) -> Self {
        Interest(fd.map(AsFd::as_fd))
    }
}

/// CLOCK_MONOTONIC in nanoseconds, as engines write it into shared pages.
pub(crate) fn monotonic_ns() -> u64 {
    // The clock cannot fail on Linux.
    let now = nix::time::clock_gettime(nix::time::ClockId::CLOCK_MONOTONIC);
    now.map_or(0, |now| std::time::Duration::from(now).as_nanos() as u64)
}

/// Waits until a descriptor is readable or hung up, or until the deadline. Returns which ones are.
pub(crate) fn wait_readable<const N: usize>(
    interests: &[Interest<'_>; N],
    deadline: Option<Instant>,
) -> io::Result<[bool; N]> {
    let present = interests.iter().enumerate().filter_map(|(index, interest)| Some((index, interest.0?)));
    let mut ready = [false; N];
    for index in wait_any(&present.collect::<Vec<_>>(), deadline)? {
        ready[index] = true;
    }
    Ok(ready)
}

/// Waits until a descriptor is readable or hung up, or until the deadline. Returns the tokens of those that are, in the
/// order of `interests`.
pub(crate) fn wait_any<T: Copy>(interests: &[(T, BorrowedFd<'_>)], deadline: Option<Instant>) -> io::Result<Vec<T>> {
    let mut fds: Vec<PollFd<'_>> =
        interests.iter().map(|(_, fd)| PollFd::from_borrowed_fd(*fd, PollFlags::IN)).collect();
    loop {
        match poll(&mut fds, remaining(deadline).as_ref()) {
            Ok(_) => break,
            Err(Errno::INTR) => continue,
            Err(errno) => return Err(errno.into()),
        }
    }
    let ready = interests.iter().zip(&fds).filter(|(_, fd)| !fd.revents().is_empty());
    Ok(ready.map(|((token, _), _)| *token).collect())
}

fn remaining(deadline: Option<Instant>) -> Option<Timespec> {
    let left = deadline?.saturating_duration_since(Instant::now());
    Timespec::try_from(left).ok()
}
