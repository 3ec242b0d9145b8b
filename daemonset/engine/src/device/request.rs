//! A FUSE request in guest memory: checked before the library reads it, and answered in every case.

use std::io::{Read, Write};

use vhost::vhost_user::Backend;
use virtiofsd::descriptor_utils::{Reader, Writer};
use virtiofsd::filesystem::FileSystem;
use virtiofsd::fuse::{InHeader, Opcode, OutHeader};
use virtiofsd::server::Server;
use vm_memory::{ByteValued, Bytes, GuestAddress};

use super::reach::{self, Unreachable};
use super::scratch::Scratch;
use super::{Chain, Memory};

/// A request as the guest queued it.
pub(super) struct Request<'a> {
    memory: &'a Memory,
    chain: Chain,
    /// Reads from the beginning of the request; none if the chain cannot be read, or once the request is answered.
    reader: Option<Reader<'a>>,
    /// Writes from the beginning of the reply; none if the chain cannot be written, or once the request is answered.
    writer: Option<Writer<'a>>,
    header: Option<InHeader>,
    /// Memory that the request needs and the device does not have.
    unreachable: Option<Unreachable>,
}

/// How a request was answered.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Reply {
    /// Bytes written to the guest's buffers, header included; 0 for a request that has no reply.
    pub(super) bytes: u32,
    /// The error number sent, positive; 0 for success.
    pub(super) errno: i32,
    /// Why the file system did not see the request.
    pub(super) fault: Option<Fault>,
}

/// Why a request was answered with an error before the file system saw it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fault {
    /// It does not follow the protocol.
    Malformed,
    /// Its descriptors name guest memory that the device does not have.
    Unreachable(Unreachable),
}

impl<'a> Request<'a> {
    /// Reads the request that `chain`, from the ring with its descriptors at `table`, describes.
    pub(super) fn new(memory: &'a Memory, table: GuestAddress, chain: Chain) -> Self {
        let reader = Reader::new(memory, chain.clone()).ok();
        let writer = Writer::new(memory, chain.clone()).ok();
        let header = reach::header(memory, &chain);
        let complete = reader.is_some() && writer.is_some() && header.is_some();
        let unreachable = if complete { None } else { reach::unreachable(memory, table, &chain) };
        Request { memory, chain, reader, writer, header, unreachable }
    }

    /// The memory that the request needs and the device does not have.
    pub(super) fn unreachable(&self) -> Option<Unreachable> {
        self.unreachable
    }

    /// The FUSE opcode; 0 where the request has no header.
    pub(super) fn opcode(&self) -> u32 {
        self.header.map_or(0, |header| header.opcode)
    }

    /// FUSE's number of the request; 0 where it has no header.
    pub(super) fn unique(&self) -> u64 {
        self.header.map_or(0, |header| header.unique)
    }

    /// FUSE's number of the node that the request is about; 0 where it has no header.
    pub(super) fn node(&self) -> u64 {
        self.header.map_or(0, |header| header.nodeid)
    }

    /// The first bytes of the request as the guest sent it, at most `most`.
    pub(super) fn sent(&self, most: usize) -> Vec<u8> {
        let Ok(mut reader) = Reader::new(self.memory, self.chain.clone()) else { return Vec::new() };
        let mut bytes = vec![0; reader.available_bytes().min(most)];
        if reader.read_exact(&mut bytes).is_err() {
            return Vec::new();
        }
        // The guest may have changed the header since: the one that decisions were based on is the one to use.
        if let (Some(header), Some(first)) = (&self.header, bytes.get_mut(..size_of::<InHeader>())) {
            first.copy_from_slice(header.as_slice());
        }
        bytes
    }

    /// The first `length` bytes of the reply in guest memory.
    pub(super) fn replied_bytes(&self, length: usize) -> Vec<u8> {
        let mut bytes = Vec::new();
        for descriptor in self.chain.clone().writable() {
            let mut piece = vec![0; (descriptor.len() as usize).min(length - bytes.len())];
            if self.memory.read_slice(&mut piece, descriptor.addr()).is_err() {
                break;
            }
            bytes.extend(piece);
        }
        bytes
    }

    /// Writes a reply that was made elsewhere.
    pub(super) fn reply(&self, bytes: &[u8], reply: Reply) -> Reply {
        let sent = Writer::new(self.memory, self.chain.clone())
            .is_ok_and(|mut writer| writer.available_bytes() >= bytes.len() && writer.write_all(bytes).is_ok());
        if sent { reply } else { self.refuse() }
    }

    /// Has `server` answer, or answers `EIO` if it cannot. `scratch` takes the reply if there is no room for it.
    pub(super) fn answer<F: FileSystem + Sync>(&mut self, server: &Server<F>, scratch: &Scratch) -> Reply {
        let (Some(header), Some(reader), Some(writer)) = (self.header, self.reader.take(), self.writer.take()) else {
            return self.refuse();
        };
        if writer.available_bytes() >= size_of::<OutHeader>() {
            return self.answer_into(server, header, reader, writer);
        }
        // The library splits the replies of READ, READDIR and READDIRPLUS after the header, and panics if there is no room
        // for the header. It reads the opcode again, which the guest may have changed to one of these.
        match scratch.queue(&[]).ok().and_then(|chain| Writer::new(scratch.memory(), chain).ok()) {
            Some(writer) if has_no_reply(header.opcode) => {
                let reply = self.answer_into(server, header, reader, writer);
                Reply { bytes: 0, ..reply }
            }
            _ => self.refuse(),
        }
    }

    fn answer_into<F: FileSystem + Sync>(
        &self,
        server: &Server<F>,
        header: InHeader,
        reader: Reader<'_>,
        writer: Writer<'_>,
    ) -> Reply {
        match server.handle_message(reader, writer, None::<&mut Backend>) {
            Ok(bytes) => self.replied(bytes),
            Err(error) => {
                tracing::debug!(opcode = header.opcode, unique = header.unique, "malformed request: {error}");
                self.refuse()
            }
        }
    }

    fn replied(&self, bytes: usize) -> Reply {
        // Every error reply is a bare header; only that one is read back.
        let errno = if bytes == size_of::<OutHeader>() { self.errno_sent() } else { 0 };
        Reply { bytes: bytes as u32, errno, fault: None }
    }

    /// The error number of the reply, if its header is in one descriptor.
    fn errno_sent(&self) -> i32 {
        let address = self.chain.clone().writable().next().map(|descriptor| descriptor.addr());
        address
            .and_then(|GuestAddress(start)| self.memory.read_obj::<OutHeader>(GuestAddress(start)).ok())
            .map_or(0, |header| header.error.checked_neg().unwrap_or(0))
    }

    /// Answers `EIO`, if there is room for the header.
    ///
    /// A guest takes a reply without a header for success (see [`reach`]), so the header is written wherever it can be.
    pub(super) fn refuse(&self) -> Reply {
        let header = OutHeader { len: size_of::<OutHeader>() as u32, error: -libc::EIO, unique: self.unique() };
        let sent = reach::write(self.memory, &self.chain, header.as_slice());
        let fault = self.unreachable.map_or(Fault::Malformed, Fault::Unreachable);
        Reply { bytes: if sent { header.len } else { 0 }, errno: libc::EIO, fault: Some(fault) }
    }
}

/// True for requests that have no reply.
fn has_no_reply(opcode: u32) -> bool {
    let kinds = [Opcode::Forget, Opcode::BatchForget, Opcode::Interrupt, Opcode::Destroy];
    kinds.iter().any(|kind| *kind as u32 == opcode)
}
