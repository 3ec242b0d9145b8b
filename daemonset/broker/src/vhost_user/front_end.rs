//! The broker as a front-end: requests to an engine, each with a deadline.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use rustix::net::RecvFlags;
use thiserror::Error;

use super::codec::{HEADER_LEN, Header, Malformed, Reply, ReplyValue, Request};
use super::socket::{ConnectionError, recv_plain, send};
use crate::poll::{Interest, wait_readable};

/// Why a request to an engine failed.
#[derive(Debug, Error)]
pub(crate) enum FrontEndError {
    #[error("no answer to request {request} within {deadline:?}")]
    Deadline { request: u32, deadline: Duration },
    #[error("request {request} was refused")]
    Refused { request: u32 },
    #[error("vhost-user connection: {0}")]
    Connection(ConnectionError),
    #[error("vhost-user connection: {0}")]
    Io(io::Error),
}

from_cause!(FrontEndError::Connection(ConnectionError));
from_cause!(FrontEndError::Io(io::Error));

/// A connection to an engine.
#[derive(Debug)]
pub(crate) struct FrontEnd {
    stream: UnixStream,
    deadline: Duration,
}

impl FrontEnd {
    pub(crate) fn new(stream: UnixStream, deadline: Duration) -> io::Result<Self> {
        stream.set_write_timeout(Some(deadline))?;
        Ok(FrontEnd { stream, deadline })
    }

    /// Sends a request without waiting for it. If the engine fails at it, the engine closes the connection and the next
    /// [`FrontEnd::confirm`] fails.
    pub(crate) fn send<F: AsFd>(&self, request: &Request<F>) -> Result<(), FrontEndError> {
        self.write(request, false)
    }

    /// Sends a request and waits until it and all requests before it are done.
    pub(crate) fn confirm<F: AsFd>(&self, request: &Request<F>) -> Result<(), FrontEndError> {
        self.write(request, true)?;
        match self.reply(request.number())?.value {
            ReplyValue::U64(0) => Ok(()),
            _ => Err(FrontEndError::Refused { request: request.number() }),
        }
    }

    /// Sends a request and returns the number in its reply.
    pub(crate) fn request<F: AsFd>(&self, request: &Request<F>) -> Result<u64, FrontEndError> {
        self.write(request, false)?;
        match self.reply(request.number())?.value {
            ReplyValue::U64(value) => Ok(value),
            ReplyValue::Vring { base, .. } => Ok(u64::from(base)),
        }
    }

    fn write<F: AsFd>(&self, request: &Request<F>, need_reply: bool) -> Result<(), FrontEndError> {
        let (bytes, fds) = request.encode(need_reply);
        let fds: Vec<BorrowedFd<'_>> = fds.into_iter().map(AsFd::as_fd).collect();
        Ok(send(&self.stream, &bytes, &fds)?)
    }

    fn reply(&self, request: u32) -> Result<Reply, FrontEndError> {
        let end = Instant::now() + self.deadline;
        let mut head = [0u8; HEADER_LEN];
        self.read(&mut head, request, end)?;
        let header = Header::decode(&head);
        let mut payload = vec![0u8; header.reply_len(request).map_err(malformed)?];
        self.read(&mut payload, request, end)?;
        Ok(Reply::decode(&header, &payload).map_err(malformed)?)
    }

    fn read(&self, buffer: &mut [u8], request: u32, end: Instant) -> Result<(), FrontEndError> {
        let mut at = 0;
        while at < buffer.len() {
            if !wait_readable(&[Interest::of(&self.stream)], Some(end))?.contains(&true) {
                return Err(FrontEndError::Deadline { request, deadline: self.deadline });
            }
            match recv_plain(&self.stream, &mut buffer[at..], RecvFlags::DONTWAIT)? {
                0 => return Err(ConnectionError::Closed.into()),
                more => at += more,
            }
        }
        Ok(())
    }
}

fn malformed(error: Malformed) -> ConnectionError {
    ConnectionError::Malformed(error)
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::os::fd::OwnedFd;

    use super::super::codec::number;
    use super::super::socket::{VmmSocket, tests::pair as sockets};
    use super::*;

    const SHORT: Duration = Duration::from_millis(20);

    fn pair() -> (FrontEnd, VmmSocket) {
        let (front, back) = sockets();
        (FrontEnd::new(front, SHORT).unwrap(), back)
    }

    fn acknowledge(back: &VmmSocket, request: u32, value: u64) {
        back.answer(&Reply { request, value: ReplyValue::U64(value) }).unwrap();
    }

    #[test]
    fn acknowledgement_is_success_or_refusal() {
        let (front, back) = pair();
        acknowledge(&back, number::SET_OWNER, 0);
        assert!(front.confirm(&Request::<OwnedFd>::SetOwner).is_ok());
        acknowledge(&back, number::SET_OWNER, 1);
        let refused = front.confirm(&Request::<OwnedFd>::SetOwner);
        assert!(matches!(refused, Err(FrontEndError::Refused { request: number::SET_OWNER })));
    }

    #[test]
    fn missing_reply_ends_at_the_deadline() {
        let (front, mut back) = UnixStream::pair().unwrap();
        let front = FrontEnd::new(front, SHORT).unwrap();
        let silent = front.request(&Request::<OwnedFd>::GetFeatures);
        assert!(matches!(silent, Err(FrontEndError::Deadline { .. })));
        back.write_all(&[1, 0, 0]).unwrap();
        let half = front.request(&Request::<OwnedFd>::GetFeatures);
        assert!(matches!(half, Err(FrontEndError::Deadline { .. })));
    }

    #[test]
    fn reply_to_another_request_is_an_error() {
        let (front, back) = pair();
        acknowledge(&back, number::GET_QUEUE_NUM, 0);
        assert!(front.request(&Request::<OwnedFd>::GetFeatures).is_err());
        drop(back);
        assert!(front.request(&Request::<OwnedFd>::GetFeatures).is_err());
    }
}
