//! Bytes between a VMM's socket and the broker, in a pipe that outlives the broker.
//!
//! splice(2) moves bytes between the pipe and the socket in one system call, which a SIGKILL does not divide. So the next
//! broker finds a message either in the socket or in the pipe, and knows from an empty pipe that a reply was sent.

use std::fs::OpenOptions;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;

use rustix::io::{Errno, ioctl_fionread};

/// A pipe, opened for reading and writing.
#[derive(Debug)]
pub(crate) struct Pipe(OwnedFd);

impl Pipe {
    pub(crate) fn create() -> io::Result<Self> {
        let (reader, _writer) = io::pipe()?;
        let path = format!("/proc/self/fd/{}", reader.as_raw_fd());
        // One descriptor for both ends, so that there is one to hold.
        let both = OpenOptions::new().read(true).write(true).custom_flags(libc::O_NONBLOCK).open(path)?;
        Ok(Pipe(both.into()))
    }

    /// The pipe of an earlier broker.
    pub(crate) fn restored(fd: OwnedFd) -> Self {
        Pipe(fd)
    }

    /// Number of bytes in it.
    pub(crate) fn len(&self) -> io::Result<usize> {
        Ok(usize::try_from(ioctl_fionread(&self.0)?).unwrap_or(usize::MAX))
    }

    /// Adds bytes.
    pub(crate) fn write(&self, bytes: &[u8]) -> io::Result<()> {
        match rustix::io::write(&self.0, bytes)? {
            written if written == bytes.len() => Ok(()),
            _ => Err(io::ErrorKind::WriteZero.into()),
        }
    }

    /// Removes all bytes.
    pub(crate) fn clear(&self) -> io::Result<()> {
        let mut buffer = [0u8; 4096];
        loop {
            match rustix::io::read(&self.0, &mut buffer) {
                Err(Errno::AGAIN) => return Ok(()),
                Ok(_) | Err(Errno::INTR) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
    }

    /// Moves up to `most` bytes from a socket into it. Their descriptors are closed.
    pub(crate) fn take_from(&self, socket: impl AsFd, most: usize) -> Result<usize, Errno> {
        splice(socket.as_fd(), self.0.as_fd(), most)
    }

    /// Moves all its bytes into a socket.
    pub(crate) fn send_to(&self, socket: impl AsFd) -> Result<usize, Errno> {
        splice(self.0.as_fd(), socket.as_fd(), 4096)
    }
}

impl AsFd for Pipe {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

fn splice(from: BorrowedFd<'_>, to: BorrowedFd<'_>, most: usize) -> Result<usize, Errno> {
    let (none, flags) = (std::ptr::null_mut(), libc::SPLICE_F_NONBLOCK);
    loop {
        // SAFETY: the call gets two open descriptors and no pointer to memory.
        let moved = unsafe { libc::splice(from.as_raw_fd(), none, to.as_raw_fd(), none, most, flags) };
        match usize::try_from(moved) {
            Ok(moved) => return Ok(moved),
            Err(_) => match Errno::from_io_error(&io::Error::last_os_error()) {
                Some(Errno::INTR) => {}
                Some(errno) => return Err(errno),
                None => return Err(Errno::IO),
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;

    use super::*;

    #[test]
    fn bytes_are_in_the_socket_or_in_the_pipe() {
        let (mut near, far) = UnixStream::pair().unwrap();
        let pipe = Pipe::create().unwrap();
        near.write_all(b"message, next").unwrap();
        assert_eq!(pipe.take_from(&far, 3), Ok(3));
        assert_eq!(pipe.take_from(&far, 4), Ok(4));
        let again = Pipe::restored(pipe.as_fd().try_clone_to_owned().unwrap());
        assert_eq!(again.len().unwrap(), 7);
        again.clear().unwrap();
        assert_eq!((pipe.len().unwrap(), pipe.take_from(&far, 100)), (0, Ok(6)));
        pipe.clear().unwrap();
        assert_eq!(pipe.take_from(&far, 100), Err(Errno::AGAIN));
        pipe.write(b"reply").unwrap();
        assert_eq!(pipe.send_to(&far), Ok(5));
        assert_eq!(pipe.send_to(&far), Err(Errno::AGAIN));
        let mut reply = [0; 5];
        near.read_exact(&mut reply).unwrap();
        assert_eq!(&reply, b"reply");
    }
}
