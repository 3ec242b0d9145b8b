//! The guest's FUSE_INIT, told to an engine that the guest never mounted with.
//!
//! What client and server agree on is said once, at mount. It is kept in the ledger, request and reply, and a new
//! engine hears the request again, through a little memory of its own. Should it answer anything else than the
//! guest was told, this engine's configuration cannot serve this mount.

use std::io;

use thiserror::Error;
use virtio_bindings::bindings::virtio_ring::{VRING_DESC_F_NEXT, VRING_DESC_F_WRITE};
use virtio_queue::desc::RawDescriptor;
use virtio_queue::desc::split::Descriptor;
use virtio_queue::{Queue, QueueOwnedT, QueueT};
use virtiofsd::filesystem::FileSystem;
use virtiofsd::fuse::Opcode;
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace, GuestMemoryAtomic};

use super::request::{Reply, Request};
use super::ring::Chain;
use super::{Device, Memory};

/// Most bytes of a FUSE_INIT, and of its reply.
const MOST: usize = 256;

const TABLE: u64 = 0;
const AVAILABLE: u64 = 0x100;
const USED: u64 = 0x200;
const SENT: u64 = 0x1000;
const REPLY: u64 = 0x2000;
const SIZE: usize = 0x3000;

/// Why an engine cannot take a mount over.
#[derive(Debug, Error)]
pub(crate) enum ReplayError {
    /// It would have agreed on something else.
    #[error("it would have answered the guest's FUSE_INIT differently")]
    Differs,
    /// The little memory could not be made.
    #[error("scratch memory: {0}")]
    Scratch(String),
}

impl<F: FileSystem + Send + Sync + 'static> Device<F> {
    /// Notes what guest and server have agreed on.
    pub(super) fn record_init(&self, request: &Request<'_>, reply: &Reply) {
        if request.opcode() == Opcode::Init as u32 && reply.errno == 0 {
            let sent = request.sent(MOST);
            self.core.record_init(&sent, &request.replied_bytes(reply.bytes as usize));
            *self.told.lock().unwrap_or_else(std::sync::PoisonError::into_inner) = Some(sent);
        }
    }

    /// Tells this engine what the guest agreed on with an earlier one, unless it has been told.
    pub(crate) fn replay_init(&self) -> Result<(), ReplayError> {
        let Some((sent, agreed)) = self.core.init() else { return Ok(()) };
        let mut told = self.told.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        if told.as_ref() == Some(&sent) {
            return Ok(());
        }
        self.core.replay_init(true);
        let answered = self.answer_alone(&sent);
        self.core.replay_init(false);
        *told = Some(sent);
        if answered? == agreed { Ok(()) } else { Err(ReplayError::Differs) }
    }

    /// Has a request answered that no guest sent.
    fn answer_alone(&self, sent: &[u8]) -> Result<Vec<u8>, ReplayError> {
        let scratch = |error: &dyn std::fmt::Display| ReplayError::Scratch(error.to_string());
        let memory = Memory::from_ranges(&[(GuestAddress(0), SIZE)]).map_err(|e| scratch(&e))?;
        let memory = GuestMemoryAtomic::new(memory).memory();
        let chain = queue_one(&memory, sent).map_err(|e| scratch(&e))?;
        let chain = chain.ok_or_else(|| scratch(&"the request was not found in it"))?;
        let request = Request::new(&memory, chain);
        let reply = request.answer(&self.server);
        Ok(request.replied_bytes(reply.bytes as usize))
    }
}

/// Puts one request into a queue of its own and takes it out at the other end.
fn queue_one(memory: &vm_memory::GuestMemoryLoadGuard<Memory>, sent: &[u8]) -> io::Result<Option<Chain>> {
    let other = |error: &dyn std::fmt::Display| io::Error::other(error.to_string());
    let next = VRING_DESC_F_NEXT as u16;
    let descriptors = [
        Descriptor::new(SENT, sent.len().min(MOST) as u32, next, 1),
        Descriptor::new(REPLY, MOST as u32, VRING_DESC_F_WRITE as u16, 0),
    ];
    memory.write_slice(&sent[..sent.len().min(MOST)], GuestAddress(SENT)).map_err(|e| other(&e))?;
    for (at, descriptor) in (0..).zip(descriptors) {
        memory.write_obj(RawDescriptor::from(descriptor), GuestAddress(TABLE + 16 * at)).map_err(|e| other(&e))?;
    }
    // flags, idx, ring[0]: one chain is available, and begins at descriptor 0.
    memory.write_obj([0u16, 1, 0], GuestAddress(AVAILABLE)).map_err(|e| other(&e))?;
    let mut queue = Queue::new(4).map_err(|e| other(&e))?;
    queue.set_size(4);
    queue.try_set_desc_table_address(GuestAddress(TABLE)).map_err(|e| other(&e))?;
    queue.try_set_avail_ring_address(GuestAddress(AVAILABLE)).map_err(|e| other(&e))?;
    queue.try_set_used_ring_address(GuestAddress(USED)).map_err(|e| other(&e))?;
    queue.set_ready(true);
    Ok(queue.iter(memory.clone()).map_err(|e| other(&e))?.next())
}
