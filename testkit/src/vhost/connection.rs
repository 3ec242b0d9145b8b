//! vhost-user messages on a socket, well-formed or not.
//!
//! The `Frontend` of the `vhost` crate does not suffice: it has no deadline (it retries `EAGAIN` forever), and it
//! cannot violate the protocol on purpose.

use std::io::{Read, Write};
use std::os::fd::RawFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

pub use ::vhost::vhost_user::message::FrontendReq as Request;
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

/// Version 1 in bits 0-1 of each header's flags.
pub const VERSION: u32 = 0x1;
/// Flag of each message of the back-end.
pub const REPLY: u32 = 0x4;
/// Flag that requests an acknowledgement, if REPLY_ACK was negotiated.
pub const NEED_REPLY: u32 = 0x8;

/// Size of a header: request, flags, size as 32-bit words ("Message header" of the vhost-user specification).
pub const HEADER_SIZE: usize = 12;
/// Maximum size of a reply.
const MAX_BODY: u32 = 0x1000;

/// An error on the vhost-user socket.
#[derive(Debug, thiserror::Error)]
pub enum VhostError {
    /// No process listens there.
    #[error("connecting to {path}: {source}")]
    Connect {
        /// The socket's path.
        path: PathBuf,
        /// The kernel's error.
        source: std::io::Error,
    },
    /// Sending failed.
    #[error("sending {request:?}: {source}")]
    Send {
        /// The message that was being sent.
        request: Request,
        /// The kernel's error.
        source: std::io::Error,
    },
    /// No reply was received in time.
    #[error("no reply to {request:?} within {after:?}")]
    Timeout {
        /// The unanswered message.
        request: Request,
        /// The time limit.
        after: Duration,
    },
    /// The back-end closed the connection.
    #[error("the back-end closed the connection at {request:?}")]
    Closed {
        /// The unanswered message.
        request: Request,
    },
    /// Receiving failed.
    #[error("receiving the reply to {request:?}: {source}")]
    Receive {
        /// The answered message.
        request: Request,
        /// The kernel's error.
        source: std::io::Error,
    },
    /// The reply does not match the request.
    #[error("reply to {request:?} is malformed: {what}")]
    Malformed {
        /// The answered message.
        request: Request,
        /// The defect of the reply.
        what: String,
    },
    /// The back-end acknowledged the message with an error.
    #[error("the back-end rejected {request:?} with {code}")]
    Rejected {
        /// The rejected message.
        request: Request,
        /// The code of the acknowledgement.
        code: u64,
    },
    /// The back-end does not offer a feature that this front-end needs.
    #[error("the back-end does not offer {0}")]
    NotOffered(&'static str),
    /// A file descriptor could not be created.
    #[error("creating {what}: {source}")]
    Descriptor {
        /// Purpose of the descriptor.
        what: &'static str,
        /// The kernel's error.
        source: std::io::Error,
    },
    /// A ring is outside of guest memory.
    #[error(transparent)]
    Memory(#[from] crate::memory::MemoryError),
}

/// A connected vhost-user socket.
#[derive(Debug)]
pub struct Connection {
    stream: UnixStream,
    timeout: Duration,
}

impl Connection {
    /// Connects to a path once, as QEMU does.
    pub fn connect(path: &Path, timeout: Duration) -> Result<Self, VhostError> {
        let failed = |source| VhostError::Connect { path: path.to_owned(), source };
        let stream = UnixStream::connect(path).map_err(failed)?;
        stream.set_read_timeout(Some(timeout)).map_err(failed)?;
        Ok(Self { stream, timeout })
    }

    /// The socket itself, for incomplete headers or garbage.
    pub fn stream(&self) -> &UnixStream {
        &self.stream
    }

    /// Sends a message with any flags, body and descriptors.
    pub fn send(&mut self, request: Request, flags: u32, body: &[u8], fds: &[RawFd]) -> Result<(), VhostError> {
        let message = encode(request, flags, body);
        let failed = |source| VhostError::Send { request, source };
        let sent = self.stream.send_with_fds(&[message.as_slice()], fds).map_err(|errno| failed(errno.into()))?;
        self.stream.write_all(&message[sent..]).map_err(failed)
    }

    /// Receives the reply to `request`.
    pub fn reply(&mut self, request: Request) -> Result<Vec<u8>, VhostError> {
        let mut header = [0; HEADER_SIZE];
        self.read_exact(request, &mut header)?;
        let size = check_header(request, &header)?;
        let mut body = vec![0; size as usize];
        self.read_exact(request, &mut body)?;
        Ok(body)
    }

    /// Sends a request and returns the reply of one 64-bit word.
    pub fn request(&mut self, request: Request) -> Result<u64, VhostError> {
        self.send(request, VERSION, &[], &[])?;
        let body = self.reply(request)?;
        word(request, &body)
    }

    /// Sends a message and waits for the acknowledgement (REPLY_ACK).
    pub fn send_acknowledged(&mut self, request: Request, body: &[u8], fds: &[RawFd]) -> Result<(), VhostError> {
        self.send(request, VERSION | NEED_REPLY, body, fds)?;
        let reply = self.reply(request)?;
        match word(request, &reply)? {
            0 => Ok(()),
            code => Err(VhostError::Rejected { request, code }),
        }
    }

    fn read_exact(&mut self, request: Request, buffer: &mut [u8]) -> Result<(), VhostError> {
        use std::io::ErrorKind::{ConnectionReset, TimedOut, UnexpectedEof, WouldBlock};
        self.stream.read_exact(buffer).map_err(|source| match source.kind() {
            UnexpectedEof | ConnectionReset => VhostError::Closed { request },
            WouldBlock | TimedOut => VhostError::Timeout { request, after: self.timeout },
            _ => VhostError::Receive { request, source },
        })
    }
}

/// A message in wire format.
pub fn encode(request: Request, flags: u32, body: &[u8]) -> Vec<u8> {
    let mut message = Vec::with_capacity(HEADER_SIZE + body.len());
    for field in [request.into(), flags, body.len() as u32] {
        message.extend_from_slice(&u32::to_le_bytes(field));
    }
    message.extend_from_slice(body);
    message
}

/// Checks a reply header. Returns the length of the body that follows.
fn check_header(request: Request, header: &[u8; HEADER_SIZE]) -> Result<u32, VhostError> {
    let [code, flags, size] =
        [0, 4, 8].map(|at| u32::from_le_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]]));
    let malformed = |what| Err(VhostError::Malformed { request, what });
    if code != u32::from(request) {
        return malformed(format!("it is a reply to request {code}"));
    }
    if flags & 0x3 != VERSION || flags & REPLY == 0 {
        return malformed(format!("its flags are {flags:#x}"));
    }
    if size > MAX_BODY {
        return malformed(format!("it has {size} bytes"));
    }
    Ok(size)
}

/// Decodes a body of one 64-bit word.
fn word(request: Request, body: &[u8]) -> Result<u64, VhostError> {
    <[u8; 8]>::try_from(body)
        .map(u64::from_le_bytes)
        .map_err(|_| VhostError::Malformed { request, what: format!("{} bytes instead of 8", body.len()) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_is_header_then_body() {
        let message = encode(Request::SET_FEATURES, VERSION, &7_u64.to_le_bytes());
        assert_eq!(&message[..12], &[2, 0, 0, 0, 1, 0, 0, 0, 8, 0, 0, 0]);
        assert_eq!(message.len(), 20);
    }

    #[test]
    fn a_reply_to_another_request_is_rejected() {
        let mut header = [0; HEADER_SIZE];
        let reply = encode(Request::GET_FEATURES, VERSION | REPLY, &[]);
        header.copy_from_slice(&reply);
        assert!(check_header(Request::GET_FEATURES, &header).is_ok());
        assert!(check_header(Request::GET_QUEUE_NUM, &header).is_err());
        header[4] = VERSION as u8;
        assert!(check_header(Request::GET_FEATURES, &header).is_err());
    }
}
