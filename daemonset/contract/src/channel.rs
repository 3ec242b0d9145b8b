//! Message channels: datagrams with file descriptors (broker <-> engine) and framed JSON on a stream
//! (agent <-> broker).

use std::io::{self, IoSlice, IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;

use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketFlags, SocketType, recvmsg, sendmsg, socketpair,
};
use serde::Serialize;
use serde::de::DeserializeOwned;
use thiserror::Error;

use crate::lenient;

/// Most bytes of one message, on either channel.
pub const MAX_MESSAGE: usize = 16 << 20;

/// Most bytes of one datagram between broker and engine.
const MAX_PACKET: usize = 128 << 10;

/// Most file descriptors of one message.
const MAX_FDS: usize = 8;

/// Why a message could not be sent or received. Displays its cause, so it has no `source`.
#[derive(Debug, Error)]
pub enum ChannelError {
    /// The peer closed the channel.
    #[error("the peer closed the channel")]
    Closed,
    /// The socket failed.
    #[error("socket: {0}")]
    Io(io::Error),
    /// The bytes are not a message of this version.
    #[error("not a message of this version: {0}")]
    Malformed(serde_json::Error),
    /// A message is larger than either side may send.
    #[error("message of {0} bytes exceeds the limit of {MAX_MESSAGE}")]
    TooLarge(usize),
    /// A message carries more file descriptors than either side may send. All of them are closed.
    #[error("message with more than {MAX_FDS} file descriptors")]
    TooManyFds,
}

impl From<io::Error> for ChannelError {
    fn from(error: io::Error) -> Self {
        ChannelError::Io(error)
    }
}

impl From<serde_json::Error> for ChannelError {
    fn from(error: serde_json::Error) -> Self {
        ChannelError::Malformed(error)
    }
}

/// One end of a `SOCK_SEQPACKET` pair. A datagram is one JSON document and its file descriptors.
#[derive(Debug)]
pub struct PacketChannel {
    socket: OwnedFd,
}

impl PacketChannel {
    /// Creates a connected pair, both ends close-on-exec.
    pub fn pair() -> io::Result<(Self, Self)> {
        let (a, b) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?;
        Ok((PacketChannel { socket: a }, PacketChannel { socket: b }))
    }

    /// The channel on a socket that was inherited or received.
    pub fn from_fd(socket: OwnedFd) -> Self {
        PacketChannel { socket }
    }

    /// A second handle on the same end.
    pub fn try_clone(&self) -> io::Result<Self> {
        Ok(PacketChannel { socket: self.socket.try_clone()? })
    }

    /// Sends one message and its file descriptors.
    pub fn send<M: Serialize>(&self, message: &M, fds: &[BorrowedFd<'_>]) -> Result<(), ChannelError> {
        let bytes = serde_json::to_vec(message)?;
        if bytes.len() > MAX_PACKET {
            return Err(ChannelError::TooLarge(bytes.len()));
        }
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        if fds.len() > MAX_FDS || (!fds.is_empty() && !ancillary.push(SendAncillaryMessage::ScmRights(fds))) {
            return Err(ChannelError::TooManyFds);
        }
        retry(|| sendmsg(&self.socket, &[IoSlice::new(&bytes)], &mut ancillary, SendFlags::NOSIGNAL))?;
        Ok(())
    }

    /// Waits for one message and receives its file descriptors, close-on-exec.
    pub fn receive<M: DeserializeOwned>(&self) -> Result<(M, Vec<OwnedFd>), ChannelError> {
        self.receive_as(RecvFlags::CMSG_CLOEXEC, |fd| fd)
    }

    /// Like [`receive`](Self::receive), but the message stays in the socket, for a process that takes over after this one
    /// was killed. [`discard`](Self::discard) removes it. Each descriptor is passed through `own` before anything can fail,
    /// so that `F` decides how it is closed.
    pub fn peek<M: DeserializeOwned, F>(&self, own: impl Fn(OwnedFd) -> F) -> Result<(M, Vec<F>), ChannelError> {
        self.receive_as(RecvFlags::CMSG_CLOEXEC | RecvFlags::PEEK, own)
    }

    /// Removes a message that was peeked.
    pub fn discard(&self) -> Result<(), ChannelError> {
        // Without room for descriptors, the kernel closes them.
        retry(|| rustix::net::recv(&self.socket, &mut [0u8; 1][..], RecvFlags::TRUNC).map(drop))?;
        Ok(())
    }

    fn receive_as<M: DeserializeOwned, F>(
        &self,
        flags: RecvFlags,
        own: impl Fn(OwnedFd) -> F,
    ) -> Result<(M, Vec<F>), ChannelError> {
        let mut buffer = vec![0u8; MAX_PACKET];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let received = retry(|| recvmsg(&self.socket, &mut [IoSliceMut::new(&mut buffer)], &mut ancillary, flags))?;
        // Collect the descriptors before anything can fail, so that they are closed then.
        let mut fds = Vec::new();
        for message in ancillary.drain() {
            if let RecvAncillaryMessage::ScmRights(rights) = message {
                fds.extend(rights.map(&own));
            }
        }
        if received.flags.contains(ReturnFlags::CTRUNC) || fds.len() > MAX_FDS {
            return Err(ChannelError::TooManyFds);
        }
        if received.bytes == 0 {
            return Err(ChannelError::Closed);
        }
        Ok((serde_json::from_slice(&buffer[..received.bytes])?, fds))
    }
}

fn retry<T>(mut call: impl FnMut() -> Result<T, Errno>) -> io::Result<T> {
    loop {
        match call() {
            Err(Errno::INTR) => continue,
            other => return Ok(other?),
        }
    }
}

impl AsFd for PacketChannel {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl From<PacketChannel> for OwnedFd {
    fn from(channel: PacketChannel) -> OwnedFd {
        channel.socket
    }
}

/// JSON documents on a stream, each after its length (4 bytes, little endian).
#[derive(Debug)]
pub struct FramedStream {
    stream: UnixStream,
}

impl FramedStream {
    /// Sends and receives messages on this connection.
    pub fn new(stream: UnixStream) -> Self {
        FramedStream { stream }
    }

    /// The connection.
    pub fn stream(&self) -> &UnixStream {
        &self.stream
    }

    /// Sends one message.
    pub fn send<M: Serialize>(&mut self, message: &M) -> Result<(), ChannelError> {
        self.send_with(message, &[])
    }

    /// Sends one message and its file descriptors, which are attached to its first byte.
    pub fn send_with<M: Serialize>(&mut self, message: &M, fds: &[BorrowedFd<'_>]) -> Result<(), ChannelError> {
        let body = serde_json::to_vec(message)?;
        if body.len() > MAX_MESSAGE {
            return Err(ChannelError::TooLarge(body.len()));
        }
        let mut frame = Vec::with_capacity(4 + body.len());
        frame.extend_from_slice(&(body.len() as u32).to_le_bytes());
        frame.extend_from_slice(&body);
        let sent = if fds.is_empty() { 0 } else { send_attached(&self.stream, &frame, fds)? };
        self.stream.write_all(&frame[sent..])?;
        Ok(())
    }

    /// Waits for one message and closes its file descriptors.
    pub fn receive<M: DeserializeOwned>(&mut self) -> Result<M, ChannelError> {
        self.receive_with().map(|(message, _)| message)
    }

    /// Waits for a report and closes its file descriptors. Unknown fields are ignored at every depth, see [`lenient`].
    pub fn receive_report<M: DeserializeOwned>(&mut self) -> Result<M, ChannelError> {
        let (body, _) = self.receive_frame()?;
        Ok(lenient::from_slice(&body)?.0)
    }

    /// Waits for one message and receives its file descriptors, close-on-exec.
    pub fn receive_with<M: DeserializeOwned>(&mut self) -> Result<(M, Vec<OwnedFd>), ChannelError> {
        let (body, fds) = self.receive_frame()?;
        Ok((serde_json::from_slice(&body)?, fds))
    }

    fn receive_frame(&mut self) -> Result<(Vec<u8>, Vec<OwnedFd>), ChannelError> {
        let mut reader = FdReader { stream: &self.stream, fds: Vec::new(), too_many: false };
        let mut length = [0u8; 4];
        match reader.read_exact(&mut length) {
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Err(ChannelError::Closed),
            other => other?,
        }
        let length = u32::from_le_bytes(length) as usize;
        if length > MAX_MESSAGE {
            return Err(ChannelError::TooLarge(length));
        }
        let mut body = vec![0u8; length];
        reader.read_exact(&mut body)?;
        if reader.too_many {
            return Err(ChannelError::TooManyFds);
        }
        Ok((body, reader.fds))
    }
}

/// Sends a first part of the bytes with the descriptors and returns its length.
fn send_attached(stream: &UnixStream, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> Result<usize, ChannelError> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    if fds.len() > MAX_FDS || !ancillary.push(SendAncillaryMessage::ScmRights(fds)) {
        return Err(ChannelError::TooManyFds);
    }
    Ok(retry(|| sendmsg(stream, &[IoSlice::new(bytes)], &mut ancillary, SendFlags::NOSIGNAL))?)
}

/// Reads a stream and collects the descriptors it carries.
struct FdReader<'a> {
    stream: &'a UnixStream,
    fds: Vec<OwnedFd>,
    too_many: bool,
}

impl Read for FdReader<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let received =
            retry(|| recvmsg(self.stream, &mut [IoSliceMut::new(buffer)], &mut ancillary, RecvFlags::CMSG_CLOEXEC))?;
        for message in ancillary.drain() {
            if let RecvAncillaryMessage::ScmRights(rights) = message {
                self.fds.extend(rights);
            }
        }
        if received.flags.contains(ReturnFlags::CTRUNC) || self.fds.len() > MAX_FDS {
            self.too_many = true;
            self.fds.clear();
        }
        Ok(received.bytes)
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::Read;

    use super::*;
    use crate::engine::ToEngine;

    #[test]
    fn datagram_carries_descriptors() {
        let (a, b) = PacketChannel::pair().unwrap();
        let (mut reader, writer) = std::io::pipe().unwrap();
        a.send(&ToEngine::Quiesce, &[writer.as_fd()]).unwrap();
        drop(writer);
        let (message, fds) = b.receive::<ToEngine>().unwrap();
        assert_eq!(message, ToEngine::Quiesce);
        let mut received = File::from(fds.into_iter().next().unwrap());
        received.write_all(b"through").unwrap();
        drop(received);
        let mut text = String::new();
        reader.read_to_string(&mut text).unwrap();
        assert_eq!(text, "through");
    }

    #[test]
    fn peeked_message_stays_until_discarded() {
        let (a, b) = PacketChannel::pair().unwrap();
        let (reader, writer) = std::io::pipe().unwrap();
        a.send(&ToEngine::Quiesce, &[writer.as_fd()]).unwrap();
        a.send(&ToEngine::Resume, &[]).unwrap();
        drop(writer);
        for _ in 0..2 {
            let (message, fds) = b.peek::<ToEngine, _>(|fd| fd).unwrap();
            assert_eq!((message, fds.len()), (ToEngine::Quiesce, 1));
        }
        b.discard().unwrap();
        // Were a copy of the writing end left open, this would wait for ever.
        assert_eq!(std::io::read_to_string(reader).unwrap(), "");
        assert_eq!(b.receive::<ToEngine>().unwrap().0, ToEngine::Resume);
    }

    #[test]
    fn too_many_descriptors_are_refused_and_none_is_kept() {
        let (a, b) = PacketChannel::pair().unwrap();
        let (reader, writer) = std::io::pipe().unwrap();
        let many = [writer.as_fd(); MAX_FDS + 1];
        assert!(matches!(a.send(&ToEngine::Quiesce, &many), Err(ChannelError::TooManyFds)));
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS + 1))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        assert!(ancillary.push(SendAncillaryMessage::ScmRights(&many)));
        sendmsg(&a, &[IoSlice::new(b"\"Quiesce\"")], &mut ancillary, SendFlags::empty()).unwrap();
        assert!(matches!(b.receive::<ToEngine>(), Err(ChannelError::TooManyFds)));
        drop(writer);
        // Were one of the received copies of the writing end left open, this would wait for ever.
        assert_eq!(std::io::read_to_string(reader).unwrap(), "");
    }

    #[test]
    fn closed_channel_is_reported() {
        let (a, b) = PacketChannel::pair().unwrap();
        drop(a);
        assert!(matches!(b.receive::<ToEngine>(), Err(ChannelError::Closed)));
    }

    #[test]
    fn oversized_frame_is_refused_unread() {
        let (mut a, b) = UnixStream::pair().unwrap();
        a.write_all(&u32::MAX.to_le_bytes()).unwrap();
        assert!(matches!(FramedStream::new(b).receive::<u32>(), Err(ChannelError::TooLarge(_))));
    }

    #[test]
    fn descriptors_come_with_the_frame_that_they_were_sent_with() {
        let (a, b) = UnixStream::pair().unwrap();
        let (mut a, mut b) = (FramedStream::new(a), FramedStream::new(b));
        let (mut reader, writer) = std::io::pipe().unwrap();
        a.send(&"before").unwrap();
        a.send_with(&"with", &[writer.as_fd()]).unwrap();
        a.send(&"after").unwrap();
        drop(writer);
        let (message, fds) = b.receive_with::<String>().unwrap();
        assert_eq!((message.as_str(), fds.len()), ("before", 0));
        let (message, fds) = b.receive_with::<String>().unwrap();
        assert_eq!((message.as_str(), fds.len()), ("with", 1));
        File::from(fds.into_iter().next().unwrap()).write_all(b"through").unwrap();
        let (message, fds) = b.receive_with::<String>().unwrap();
        assert_eq!((message.as_str(), fds.len()), ("after", 0));
        let mut text = String::new();
        reader.read_to_string(&mut text).unwrap();
        assert_eq!(text, "through");
    }

    #[test]
    fn descriptors_that_nobody_wants_are_closed() {
        let (a, b) = UnixStream::pair().unwrap();
        let (mut a, mut b) = (FramedStream::new(a), FramedStream::new(b));
        let (reader, writer) = std::io::pipe().unwrap();
        a.send_with(&"with", &[writer.as_fd()]).unwrap();
        drop(writer);
        assert_eq!(b.receive::<String>().unwrap(), "with");
        // Were the received copy of the writing end left open, this would wait for ever.
        assert_eq!(std::io::read_to_string(reader).unwrap(), "");
    }

    #[test]
    fn frames_keep_their_borders() {
        let (a, b) = UnixStream::pair().unwrap();
        let (mut a, mut b) = (FramedStream::new(a), FramedStream::new(b));
        a.send(&"one").unwrap();
        a.send(&"two").unwrap();
        assert_eq!(b.receive::<String>().unwrap(), "one");
        assert_eq!(b.receive::<String>().unwrap(), "two");
        drop(a);
        assert!(matches!(b.receive::<String>(), Err(ChannelError::Closed)));
    }
}
