//! Commands for a thread that waits in poll.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, mpsc};

use rustix::event::{EventfdFlags, eventfd};

/// Where commands are put in.
#[derive(Debug)]
pub(crate) struct Post<T> {
    commands: mpsc::Sender<T>,
    bell: Arc<OwnedFd>,
}

impl<T> Clone for Post<T> {
    fn clone(&self) -> Self {
        Post { commands: self.commands.clone(), bell: self.bell.clone() }
    }
}

/// Where commands are taken out; readable while there are any.
#[derive(Debug)]
pub(crate) struct Mailbox<T> {
    commands: mpsc::Receiver<T>,
    bell: Arc<OwnedFd>,
}

/// A new mailbox and its opening.
pub(crate) fn mailbox<T>() -> io::Result<(Post<T>, Mailbox<T>)> {
    let bell = Arc::new(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?);
    let (sender, receiver) = mpsc::channel();
    Ok((Post { commands: sender, bell: bell.clone() }, Mailbox { commands: receiver, bell }))
}

impl<T> Post<T> {
    /// Puts a command in. It is lost if the reader has gone, and with it whatever the command was about.
    pub(crate) fn send(&self, command: T) {
        if self.commands.send(command).is_ok() {
            // The counter of a bell that nobody hears saturates: it is readable then as well.
            let _ = rustix::io::write(&self.bell, &1u64.to_ne_bytes());
        }
    }
}

impl<T> Mailbox<T> {
    /// All commands that have been put in.
    pub(crate) fn take(&self) -> Vec<T> {
        let mut count = [0u8; 8];
        // Silent before the commands are taken: one that comes in between rings again.
        let _ = rustix::io::read(&self.bell, &mut count);
        self.commands.try_iter().collect()
    }
}

impl<T> AsFd for Mailbox<T> {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.bell.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;
    use crate::poll::{Interest, wait_readable};

    #[test]
    fn a_mailbox_is_readable_while_it_holds_something() {
        let (post, mailbox) = mailbox().unwrap();
        let readable = || wait_readable(&[Interest::of(&mailbox)], Some(Instant::now())).unwrap()[0];
        assert!(!readable());
        post.send(1);
        post.clone().send(2);
        assert!(readable());
        assert_eq!(mailbox.take(), [1, 2]);
        assert!(!readable());
    }
}
