//! The connection of a VMM: messages are peeked, then consumed.
//!
//! In between, the broker writes its record. A consumed message is in a pipe until it is handled, and a reply is in a pipe
//! until it is sent. Both pipes outlive the broker, so the next one knows which of these steps were taken.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, RecvMsg, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};
use thiserror::Error;

use crate::disposal::{Account, Foreign};

use super::codec::{HEADER_LEN, Header, MAX_FDS, Malformed, Reply, Request};
use super::pipe::Pipe;
use crate::fault;

/// Time within which a whole message must arrive after its first byte. VMMs send messages whole, so this bounds one that
/// stops in the middle or trickles.
const MESSAGE_DEADLINE: Duration = Duration::from_secs(5);

/// Interval at which the rest of a message is looked for.
const PART_POLL: Duration = Duration::from_millis(5);

/// Why a connection ended.
#[derive(Debug, Error)]
pub(crate) enum ConnectionError {
    #[error("closed by the other side")]
    Closed,
    #[error(transparent)]
    Malformed(#[from] Malformed),
    #[error("message with more than {MAX_FDS} descriptors")]
    TooManyFds,
    #[error("half a message: {0}")]
    Incomplete(Missing),
    #[error("answers are not read")]
    NotReading,
    #[error("socket: {0}")]
    Io(io::Error),
}

from_cause!(ConnectionError::Io(io::Error));

/// Why the rest of a message is missing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub(crate) enum Missing {
    /// It may still arrive.
    #[error("the rest has not arrived")]
    NotYet,
    #[error("the rest did not arrive within {MESSAGE_DEADLINE:?}")]
    Late,
    #[error("the connection is closed")]
    Never,
}

impl From<Errno> for ConnectionError {
    fn from(errno: Errno) -> Self {
        match errno {
            Errno::AGAIN => ConnectionError::Incomplete(Missing::NotYet),
            Errno::CONNRESET | Errno::PIPE => ConnectionError::Closed,
            other => ConnectionError::Io(other.into()),
        }
    }
}

/// A message that is still in the socket.
#[derive(Debug)]
pub(crate) struct Peeked {
    pub(crate) request: Request<Foreign>,
    pub(crate) need_reply: bool,
    length: usize,
}

/// The connection of one VMM. No call waits for the VMM.
#[derive(Debug)]
pub(crate) struct VmmSocket {
    stream: Arc<Foreign>,
    account: Arc<Account>,
    /// The consumed message.
    pub(crate) message: Pipe,
    /// The reply.
    pub(crate) reply: Pipe,
    /// When the message of which a part has arrived must be whole.
    whole_by: Option<Instant>,
    message_deadline: Duration,
}

impl VmmSocket {
    /// `account`: for the descriptors that the VMM sends.
    pub(crate) fn new(stream: Arc<Foreign>, account: Arc<Account>) -> io::Result<Self> {
        Ok(Self::restored(stream, account, Pipe::create()?, Pipe::create()?))
    }

    /// The connection of an earlier broker.
    pub(crate) fn restored(stream: Arc<Foreign>, account: Arc<Account>, message: Pipe, reply: Pipe) -> Self {
        VmmSocket { stream, account, message, reply, whole_by: None, message_deadline: MESSAGE_DEADLINE }
    }

    /// The connection, for others who hold it.
    pub(crate) fn shared(&self) -> Arc<Foreign> {
        self.stream.clone()
    }

    /// Time at which [`VmmSocket::peek`] is to be called again, if only a part of a message has arrived. poll(2) cannot wait
    /// for the rest: it reports the part.
    pub(crate) fn look_again_at(&self) -> Option<Instant> {
        self.whole_by.map(|by| by.min(Instant::now() + PART_POLL))
    }

    /// The next message, which stays in the socket; none: it is not whole yet. A whole message must arrive within one
    /// deadline, however many pieces it arrives in.
    ///
    /// Descriptors are peeked only if the request carries some: if these bytes have none, the kernel would return those of
    /// the next message (`unix_stream_read_generic` follows the queue up to the first that has any). Other descriptors
    /// are dropped with the bytes, including those of REM_MEM_REG, as the protocol says.
    pub(crate) fn peek(&mut self) -> Result<Option<Peeked>, ConnectionError> {
        match self.try_peek() {
            Ok(peeked) => {
                self.whole_by = None;
                Ok(Some(peeked))
            }
            Err(ConnectionError::Incomplete(Missing::NotYet)) => {
                let now = Instant::now();
                if *self.whole_by.get_or_insert(now + self.message_deadline) <= now {
                    return Err(ConnectionError::Incomplete(Missing::Late));
                }
                Ok(None)
            }
            Err(error) => Err(error),
        }
    }

    fn try_peek(&self) -> Result<Peeked, ConnectionError> {
        set_peek_offset(&*self.stream, 0)?;
        let mut head = [0u8; HEADER_LEN];
        self.peek_all(&mut head).map_err(closed_if_empty)?;
        let header = Header::decode(&head);
        let mut payload = vec![0u8; header.payload_len()?];
        self.peek_all(&mut payload).map_err(|(error, _)| error)?;
        let fds = if header.brings_fds(&payload) { self.peek_fds()? } else { Vec::new() };
        let request = Request::decode(&header, &payload, fds)?;
        Ok(Peeked { request, need_reply: header.need_reply(), length: HEADER_LEN + payload.len() })
    }

    /// Peeks the following bytes. Returns how many have arrived, if not all have.
    fn peek_all(&self, buffer: &mut [u8]) -> Result<(), (ConnectionError, usize)> {
        let mut at = 0;
        while at < buffer.len() {
            match recv_plain(&*self.stream, &mut buffer[at..], RecvFlags::PEEK | RecvFlags::DONTWAIT) {
                Ok(0) => return Err((ConnectionError::Incomplete(Missing::Never), at)),
                Ok(more) => at += more,
                Err(error) => return Err((error, at)),
            }
        }
        Ok(())
    }

    fn peek_fds(&self) -> Result<Vec<Foreign>, ConnectionError> {
        set_peek_offset(&*self.stream, 0)?;
        let mut fds = Vec::new();
        let foreign = |fd| fds.push(Foreign::new(fd, self.account.clone()));
        receive(&*self.stream, &mut [0u8; HEADER_LEN], RecvFlags::PEEK | RecvFlags::DONTWAIT, foreign)?;
        Ok(fds)
    }

    /// Moves what is left in the socket of a peeked message into the message pipe.
    ///
    /// The pipe has room for sixteen pieces. VMMs send a message in one; of one that trickles, the rest is read, and the
    /// session ends if the broker is killed between the two.
    pub(crate) fn consume(&self, peeked_length: usize) -> Result<(), ConnectionError> {
        loop {
            fault::step();
            let left = peeked_length.saturating_sub(self.message.len()?);
            if left == 0 {
                return Ok(());
            }
            match self.message.take_from(&*self.stream, left) {
                Ok(0) => return Err(ConnectionError::Incomplete(Missing::Never)),
                Ok(_) => {}
                Err(Errno::AGAIN) => return self.discard(left),
                Err(errno) => return Err(errno.into()),
            }
        }
    }

    fn discard(&self, mut left: usize) -> Result<(), ConnectionError> {
        let mut buffer = vec![0u8; left];
        while left > 0 {
            match recv_plain(&*self.stream, &mut buffer[..left], RecvFlags::DONTWAIT)? {
                0 => return Err(ConnectionError::Incomplete(Missing::Never)),
                more => left -= more,
            }
        }
        Ok(())
    }

    /// Forgets the consumed message: it is handled.
    pub(crate) fn finish(&self) -> Result<(), ConnectionError> {
        fault::step();
        Ok(self.message.clear()?)
    }

    /// Puts a reply into the reply pipe.
    pub(crate) fn prepare_reply(&self, reply: &Reply) -> Result<(), ConnectionError> {
        self.reply.clear()?;
        fault::step();
        Ok(self.reply.write(&reply.encode())?)
    }

    /// Sends the reply in the reply pipe, if there is one. Does not wait for a VMM that does not read its replies.
    pub(crate) fn send_reply(&self) -> Result<(), ConnectionError> {
        if self.reply.len()? == 0 {
            return Ok(());
        }
        let mut writable = [PollFd::from_borrowed_fd(self.stream.as_fd(), PollFlags::OUT)];
        poll(&mut writable, Some(&Timespec { tv_sec: 0, tv_nsec: 0 }))?;
        if !writable[0].revents().intersects(PollFlags::OUT | PollFlags::HUP | PollFlags::ERR) {
            return Err(ConnectionError::NotReading);
        }
        fault::step();
        self.reply.send_to(&*self.stream)?;
        fault::step();
        if self.reply.len()? == 0 { Ok(()) } else { Err(ConnectionError::NotReading) }
    }

    /// Sends a reply.
    #[cfg(test)]
    pub(crate) fn answer(&self, reply: &Reply) -> Result<(), ConnectionError> {
        self.prepare_reply(reply)?;
        self.send_reply()
    }
}

impl AsFd for VmmSocket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }
}

impl Peeked {
    /// Length for [`VmmSocket::consume`].
    pub(crate) fn length(&self) -> usize {
        self.length
    }
}

/// A close between two messages is not an error.
fn closed_if_empty((error, received): (ConnectionError, usize)) -> ConnectionError {
    match error {
        ConnectionError::Incomplete(Missing::Never) if received == 0 => ConnectionError::Closed,
        other => other,
    }
}

/// Sets the position of the next peek: `SO_PEEK_OFF`, which increases with each peek and decreases with each read.
fn set_peek_offset(stream: impl AsFd, offset: libc::c_int) -> io::Result<()> {
    // SAFETY: the option's value is one int, which lives across the call.
    let result = unsafe {
        libc::setsockopt(
            stream.as_fd().as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_PEEK_OFF,
            (&raw const offset).cast(),
            size_of::<libc::c_int>() as libc::socklen_t,
        )
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Receives bytes, and passes their descriptors on.
fn receive(
    stream: impl AsFd,
    buffer: &mut [u8],
    flags: RecvFlags,
    mut pass_on: impl FnMut(OwnedFd),
) -> Result<usize, ConnectionError> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let received =
        retry(|| recvmsg(&stream, &mut [IoSliceMut::new(buffer)], &mut ancillary, flags | RecvFlags::CMSG_CLOEXEC))?;
    let RecvMsg { bytes, flags, .. } = received;
    let mut count = 0;
    for message in ancillary.drain() {
        if let RecvAncillaryMessage::ScmRights(rights) = message {
            for fd in rights {
                count += 1;
                pass_on(fd);
            }
        }
    }
    if flags.contains(ReturnFlags::CTRUNC) || count > MAX_FDS {
        return Err(ConnectionError::TooManyFds);
    }
    Ok(bytes)
}

/// Receives bytes only; the kernel drops their descriptors.
pub(super) fn recv_plain(stream: impl AsFd, buffer: &mut [u8], flags: RecvFlags) -> Result<usize, ConnectionError> {
    Ok(retry(|| rustix::net::recv(&stream, &mut *buffer, flags).map(|(_, received)| received))?)
}

/// Sends one whole message, with the descriptors on its first byte.
pub(super) fn send(stream: impl AsFd, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> Result<(), ConnectionError> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() && !ancillary.push(SendAncillaryMessage::ScmRights(fds)) {
        return Err(ConnectionError::TooManyFds);
    }
    let sent = retry(|| sendmsg(&stream, &[IoSlice::new(bytes)], &mut ancillary, SendFlags::NOSIGNAL))?;
    if sent == bytes.len() { Ok(()) } else { Err(ConnectionError::NotReading) }
}

fn retry<T>(mut call: impl FnMut() -> Result<T, Errno>) -> Result<T, Errno> {
    loop {
        match call() {
            Err(Errno::INTR) => continue,
            other => return other,
        }
    }
}

#[cfg(test)]
pub(super) mod tests {
    use std::io::Write;
    use std::os::unix::net::UnixStream;
    use std::thread;

    use super::super::codec::{ReplyValue, number};
    use super::*;

    pub(in super::super) fn pair() -> (UnixStream, VmmSocket) {
        let (vmm, broker) = UnixStream::pair().unwrap();
        (vmm, VmmSocket::new(Arc::new(Foreign::new(broker.into(), Arc::default())), Arc::default()).unwrap())
    }

    /// Peeks until a message is whole.
    fn peek(socket: &mut VmmSocket) -> Result<Peeked, ConnectionError> {
        loop {
            match socket.peek()? {
                Some(peeked) => return Ok(peeked),
                None => thread::sleep(socket.look_again_at().unwrap().saturating_duration_since(Instant::now())),
            }
        }
    }

    fn pipes(count: usize) -> Vec<OwnedFd> {
        (0..count).map(|_| io::pipe().unwrap().0.into()).collect()
    }

    fn send_request(vmm: &UnixStream, request: &Request<OwnedFd>) {
        let (bytes, fds) = request.encode(false);
        let fds: Vec<BorrowedFd<'_>> = fds.into_iter().map(AsFd::as_fd).collect();
        send(vmm, &bytes, &fds).unwrap();
    }

    #[test]
    fn message_stays_until_consumed() {
        let (vmm, mut socket) = pair();
        for fd in pipes(2) {
            send_request(&vmm, &Request::SetVringKick { ring: 1, fd: Some(fd) });
        }
        send_request(&vmm, &Request::SetFeatures(5));
        for _ in 0..3 {
            let peeked = peek(&mut socket).unwrap();
            assert!(matches!(peeked.request, Request::SetVringKick { ring: 1, fd: Some(_) }));
        }
        for _ in 0..2 {
            let peeked = peek(&mut socket).unwrap();
            assert!(matches!(peeked.request, Request::SetVringKick { ring: 1, fd: Some(_) }));
            socket.consume(peeked.length()).unwrap();
            socket.finish().unwrap();
        }
        let last = peek(&mut socket).unwrap();
        assert!(matches!(last.request, Request::SetFeatures(5)));
        socket.consume(last.length()).unwrap();
        socket.finish().unwrap();
        drop(vmm);
        assert!(matches!(peek(&mut socket), Err(ConnectionError::Closed)));
    }

    #[test]
    fn message_does_not_take_descriptors_of_the_next() {
        let (vmm, mut socket) = pair();
        let expected = [Request::SetFeatures(1), Request::SetVringCall { ring: 0, fd: None }, Request::SetOwner];
        for request in &expected {
            send_request(&vmm, request);
        }
        send_request(&vmm, &Request::SetVringKick { ring: 1, fd: pipes(1).pop() });
        for request in expected {
            let peeked = peek(&mut socket).unwrap();
            assert_eq!(peeked.request.number(), request.number());
            socket.consume(peeked.length()).unwrap();
            socket.finish().unwrap();
        }
        assert!(matches!(peek(&mut socket).unwrap().request, Request::SetVringKick { fd: Some(_), .. }));
    }

    #[test]
    fn split_message_is_assembled() {
        let (mut vmm, mut socket) = pair();
        let (bytes, _) = Request::<OwnedFd>::SetFeatures(9).encode(true);
        let writer = thread::spawn(move || {
            for byte in bytes {
                vmm.write_all(&[byte]).unwrap();
                thread::yield_now();
            }
            vmm
        });
        let peeked = peek(&mut socket).unwrap();
        assert!(peeked.need_reply && matches!(peeked.request, Request::SetFeatures(9)));
        socket.consume(peeked.length()).unwrap();
        socket.finish().unwrap();
        drop(writer.join().unwrap());
        assert!(matches!(peek(&mut socket), Err(ConnectionError::Closed)));
    }

    #[test]
    fn trickled_message_ends_at_one_deadline() {
        let (mut vmm, mut broker) = pair();
        broker.message_deadline = Duration::from_millis(200);
        let (bytes, _) = Request::<OwnedFd>::SetFeatures(1).encode(false);
        let trickle = std::thread::spawn(move || {
            for byte in bytes {
                // The broker has closed its end once it gives up.
                if vmm.write_all(&[byte]).is_err() {
                    return;
                }
                std::thread::sleep(Duration::from_millis(100));
            }
        });
        let begin = Instant::now();
        assert!(matches!(peek(&mut broker), Err(ConnectionError::Incomplete(Missing::Late))));
        assert!(begin.elapsed() < Duration::from_millis(1500), "{:?}", begin.elapsed());
        drop(broker);
        trickle.join().unwrap();
    }

    #[test]
    fn half_a_message_is_an_error() {
        for length in 1..20 {
            let (mut vmm, mut socket) = pair();
            let (bytes, _) = Request::<OwnedFd>::SetFeatures(9).encode(true);
            vmm.write_all(&bytes[..length]).unwrap();
            drop(vmm);
            assert!(matches!(peek(&mut socket), Err(ConnectionError::Incomplete(Missing::Never))), "{length}");
        }
    }

    #[test]
    fn too_many_descriptors_are_refused_and_closed() {
        let (vmm, mut socket) = pair();
        let kick = Request::SetVringKick { ring: 0, fd: pipes(1).pop() };
        let (bytes, _) = kick.encode(true);
        let (reader, writer) = io::pipe().unwrap();
        let many = [writer.as_fd(); MAX_FDS + 1];
        let mut space = vec![MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS + 1))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        assert!(ancillary.push(SendAncillaryMessage::ScmRights(&many)));
        sendmsg(&vmm, &[IoSlice::new(&bytes)], &mut ancillary, SendFlags::empty()).unwrap();
        assert!(matches!(peek(&mut socket), Err(ConnectionError::TooManyFds)));
        drop((writer, vmm, socket));
        // If a received copy of the writing end were still open, this would wait for ever.
        assert_eq!(io::read_to_string(reader).unwrap(), "");
    }

    #[test]
    fn vmm_that_reads_no_replies_is_detected() {
        let (_vmm, socket) = pair();
        let reply = Reply { request: number::GET_FEATURES, value: ReplyValue::U64(1) };
        let result = (0..1_000_000).try_for_each(|_| socket.answer(&reply));
        assert!(matches!(result, Err(ConnectionError::NotReading)));
    }
}
