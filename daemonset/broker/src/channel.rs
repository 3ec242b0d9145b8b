//! A channel whose receiver can be polled: an `mpsc` channel and an eventfd.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, mpsc};

use rustix::event::{EventfdFlags, eventfd};

/// The sending end. Clones send to the same receiver.
#[derive(Debug)]
pub(crate) struct Sender<T> {
    commands: mpsc::Sender<T>,
    eventfd: Arc<OwnedFd>,
}

impl<T> Clone for Sender<T> {
    fn clone(&self) -> Self {
        Sender { commands: self.commands.clone(), eventfd: self.eventfd.clone() }
    }
}

/// The receiving end: readable while it holds commands.
#[derive(Debug)]
pub(crate) struct Receiver<T> {
    commands: mpsc::Receiver<T>,
    eventfd: Arc<OwnedFd>,
}

/// Creates a channel.
pub(crate) fn channel<T>() -> io::Result<(Sender<T>, Receiver<T>)> {
    let eventfd = Arc::new(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?);
    let (sender, receiver) = mpsc::channel();
    Ok((Sender { commands: sender, eventfd: eventfd.clone() }, Receiver { commands: receiver, eventfd }))
}

impl<T> Sender<T> {
    /// Sends a command. It is dropped if the receiver is gone.
    pub(crate) fn send(&self, command: T) {
        if self.commands.send(command).is_ok() {
            // If the counter is saturated, the write fails with EAGAIN and the eventfd is readable anyway.
            let _ = rustix::io::write(&self.eventfd, &1u64.to_ne_bytes());
        }
    }
}

impl<T> Receiver<T> {
    /// Takes all commands.
    pub(crate) fn take(&self) -> Vec<T> {
        let mut count = [0u8; 8];
        // Clear the eventfd first: a command that arrives in between sets it again.
        let _ = rustix::io::read(&self.eventfd, &mut count);
        self.commands.try_iter().collect()
    }
}

impl<T> AsFd for Receiver<T> {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.eventfd.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;
    use crate::poll::{Interest, wait_readable};

    #[test]
    fn receiver_is_readable_while_it_holds_commands() {
        let (sender, receiver) = channel().unwrap();
        let readable = || wait_readable(&[Interest::of(&receiver)], Some(Instant::now())).unwrap()[0];
        assert!(!readable());
        sender.send(1);
        sender.clone().send(2);
        assert!(readable());
        assert_eq!(receiver.take(), [1, 2]);
        assert!(!readable());
    }
}
