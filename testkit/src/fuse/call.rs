//! One request and its reply: framing, and rules for every reply.

use nix::errno::Errno;
use zerocopy::{FromBytes, FromZeros, IntoBytes};

use super::wire::{InHeader, Opcode, OutHeader};
use crate::virtio::queue::{Message, QueueError, Ticket};

/// Size of a reply header.
pub const OUT_HEADER: u32 = size_of::<OutHeader>() as u32;
/// The kernel rejects larger error numbers (`fuse_dev_do_write`: -512 is excluded).
const MAX_ERRNO: i32 = 511;

/// A request without a result.
#[derive(Debug, thiserror::Error)]
pub enum CallError {
    /// The server replied with an error. Applications of a guest may expect only this kind.
    #[error("{op:?} of node {node:#x}: {errno}")]
    Errno {
        /// The request.
        op: Opcode,
        /// Its node.
        node: u64,
        /// The error of the reply.
        errno: Errno,
    },
    /// The reply violates the protocol.
    #[error("{op:?} of node {node:#x} (unique {unique}): {what}")]
    Protocol {
        /// The request.
        op: Opcode,
        /// Its node.
        node: u64,
        /// Its unique number.
        unique: u64,
        /// The violation.
        what: String,
    },
    /// There was no reply.
    #[error("{op:?} of node {node:#x} (unique {unique}): {source}")]
    Queue {
        /// The request.
        op: Opcode,
        /// Its node.
        node: u64,
        /// Its unique number.
        unique: u64,
        /// The error of the queue.
        source: QueueError,
    },
}

impl CallError {
    /// The errno of the reply, if the server replied with one.
    pub fn errno(&self) -> Option<Errno> {
        match self {
            Self::Errno { errno, .. } => Some(*errno),
            _ => None,
        }
    }

    /// True if no reply was received, or a reply without a call.
    pub fn is_hung(&self) -> bool {
        matches!(self.queue(), Some(QueueError::Hung { .. }))
    }

    /// True if the reply was received without a call.
    pub fn is_lost_wakeup(&self) -> bool {
        matches!(self.queue(), Some(QueueError::LostWakeup { .. }))
    }

    /// True if the back-end closed the connection.
    pub fn is_disconnected(&self) -> bool {
        matches!(self.queue(), Some(QueueError::Disconnected { .. }))
    }

    fn queue(&self) -> Option<&QueueError> {
        match self {
            Self::Queue { source, .. } => Some(source),
            _ => None,
        }
    }
}

/// A request without its header.
#[derive(Debug, Clone, Copy)]
pub struct Call<'a> {
    /// Operation.
    pub op: Opcode,
    /// Node id.
    pub node: u64,
    /// Structs and names of the arguments.
    pub arguments: &'a [&'a [u8]],
    /// Length of the extensions at the end of the arguments, in bytes.
    pub extensions: u32,
    /// File data.
    pub payload: &'a [u8],
    /// Size of the struct in the reply.
    pub reply: u32,
    /// Maximum number of bytes after that struct.
    pub reply_payload: u32,
    /// False if there is no reply (FORGET).
    pub answered: bool,
}

impl<'a> Call<'a> {
    /// A request with these arguments and an empty reply.
    pub fn new(op: Opcode, node: u64, arguments: &'a [&'a [u8]]) -> Self {
        Self { op, node, arguments, extensions: 0, payload: &[], reply: 0, reply_payload: 0, answered: true }
    }

    /// Expects a struct in the reply.
    pub fn expecting<T>(mut self) -> Self {
        self.reply = size_of::<T>() as u32;
        self
    }

    /// Accepts up to `room` bytes of data in the reply.
    pub fn receiving(mut self, room: u32) -> Self {
        self.reply_payload = room;
        self
    }

    /// Adds data to the request.
    pub fn sending(mut self, payload: &'a [u8]) -> Self {
        self.payload = payload;
        self
    }

    /// Declares the last bytes of the arguments as extensions.
    pub fn extended(mut self, bytes: usize) -> Self {
        self.extensions = bytes as u32;
        self
    }

    /// Declares that there is no reply.
    pub fn unanswered(mut self) -> Self {
        self.answered = false;
        self
    }

    /// The request's header; `seed` has caller and number.
    pub(super) fn header(&self, seed: InHeader) -> InHeader {
        let arguments: usize = self.arguments.iter().map(|part| part.len()).sum();
        let len = size_of::<InHeader>() + arguments + self.payload.len();
        InHeader {
            len: len as u32,
            opcode: self.op as u32,
            nodeid: self.node,
            total_extlen: (self.extensions / 8) as u16,
            ..seed
        }
    }

    pub(super) fn message<'m>(&self, header: &'m [u8]) -> Message<'m>
    where
        'a: 'm,
    {
        Message {
            header,
            arguments: self.arguments,
            payload: self.payload,
            reply_header: if self.answered { OUT_HEADER } else { 0 },
            reply_arguments: self.reply,
            reply_payload: self.reply_payload,
        }
    }
}

/// A request in flight.
#[derive(Debug)]
pub struct Pending {
    pub(super) ticket: Ticket,
    pub(super) op: Opcode,
    pub(super) node: u64,
    pub(super) unique: u64,
    pub(super) reply: u32,
    pub(super) reply_payload: u32,
    pub(super) answered: bool,
}

/// A valid reply without an error.
#[derive(Debug)]
pub struct Reply {
    pending: Pending,
    len: u32,
}

impl Pending {
    /// The request's unique number.
    pub fn unique(&self) -> u64 {
        self.unique
    }

    /// Waits for the reply and checks it.
    pub fn wait(self) -> Result<Reply, CallError> {
        let used = self.ticket.wait().map_err(|source| self.lost(source))?;
        if !self.answered {
            return if used == 0 {
                Ok(Reply { pending: self, len: 0 })
            } else {
                Err(self.broken(format!("{used} bytes for a request without a reply")))
            };
        }
        let mut header = OutHeader::new_zeroed();
        self.ticket.reply(0, header.as_mut_bytes()).map_err(|source| self.lost(source))?;
        let len =
            check(&header, used, self.unique, self.reply, self.reply_payload).map_err(|what| self.broken(what))?;
        match header.error {
            0 => Ok(Reply { pending: self, len }),
            error => Err(CallError::Errno { op: self.op, node: self.node, errno: Errno::from_raw(-error) }),
        }
    }

    fn lost(&self, source: QueueError) -> CallError {
        CallError::Queue { op: self.op, node: self.node, unique: self.unique, source }
    }

    fn broken(&self, what: String) -> CallError {
        CallError::Protocol { op: self.op, node: self.node, unique: self.unique, what }
    }
}

impl Reply {
    /// The struct in the reply.
    pub fn body<T: FromBytes + IntoBytes>(&self) -> Result<T, CallError> {
        let mut body = T::new_zeroed();
        self.pending.ticket.reply(OUT_HEADER, body.as_mut_bytes()).map_err(|source| self.pending.lost(source))?;
        Ok(body)
    }

    /// Number of bytes after the struct.
    pub fn payload_len(&self) -> u32 {
        self.len
    }

    /// The bytes after the struct.
    pub fn payload(&self) -> Result<Vec<u8>, CallError> {
        let mut data = vec![0; self.len as usize];
        self.pending.ticket.payload(&mut data).map_err(|source| self.pending.lost(source))?;
        Ok(data)
    }

    /// Turns an inconsistent reply into a protocol violation.
    pub fn broken(&self, what: impl std::fmt::Display) -> CallError {
        self.pending.broken(what.to_string())
    }
}

/// Checks the rules for every reply; returns the number of bytes after the struct.
fn check(header: &OutHeader, used: u32, unique: u64, reply: u32, reply_payload: u32) -> Result<u32, String> {
    if header.unique != unique {
        return Err(format!("the reply is to request {}", header.unique));
    }
    if header.len != used {
        return Err(format!("the reply has {} bytes, the used ring reports {used}", header.len));
    }
    if header.error > 0 || header.error < -MAX_ERRNO {
        return Err(format!("invalid error {}", header.error));
    }
    if header.error != 0 && header.len != OUT_HEADER {
        return Err(format!("an error reply of {} bytes", header.len));
    }
    if header.error != 0 {
        return Ok(0);
    }
    let least = OUT_HEADER + reply;
    match header.len.checked_sub(least) {
        Some(rest) if rest <= reply_payload => Ok(rest),
        _ => Err(format!("{} bytes instead of {least} to {}", header.len, least + reply_payload)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn header(len: u32, error: i32, unique: u64) -> OutHeader {
        OutHeader { len, error, unique }
    }

    #[test]
    fn protocol_violations_are_distinguished() {
        assert_eq!(check(&header(16 + 128, 0, 4), 144, 4, 128, 0), Ok(0));
        assert_eq!(check(&header(16 + 7, 0, 4), 23, 4, 0, 4096), Ok(7));
        for (reply, used) in [
            (header(144, 0, 6), 144),
            (header(144, 0, 4), 16),
            (header(144, -2, 4), 144),
            (header(16, 2, 4), 16),
            (header(16, -512, 4), 16),
            (header(16, 0, 4), 16),
            (header(145, 0, 4), 145),
        ] {
            assert!(check(&reply, used, 4, 128, 0).is_err(), "{reply:?}");
        }
    }

    proptest! {
        #[test]
        fn a_reply_is_never_longer_than_its_buffer(len: u32, room in 0_u32..1 << 21) {
            let given = check(&header(len, 0, 1), len, 1, 0, room);
            prop_assert!(given.map_or(true, |rest| rest <= room));
        }
    }
}
