//! Memory of the engine's own in place of guest memory, for a request that the guest must not see or change.

use std::io;

use virtio_bindings::bindings::virtio_ring::{VRING_DESC_F_NEXT, VRING_DESC_F_WRITE};
use virtio_queue::desc::RawDescriptor;
use virtio_queue::desc::split::Descriptor;
use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace, GuestMemoryAtomic, GuestMemoryLoadGuard};

use super::{Chain, Memory};

/// Most bytes of a request, and of its reply.
pub(super) const MAX_BYTES: usize = 256;

const TABLE: u64 = 0;
const AVAILABLE: u64 = 0x100;
const USED: u64 = 0x200;
const SENT: u64 = 0x1000;
const REPLY: u64 = 0x2000;
const SIZE: usize = 0x3000;

/// The memory, with room for one request and its reply.
pub(super) struct Scratch {
    memory: GuestMemoryLoadGuard<Memory>,
}

impl Scratch {
    /// # Errors
    /// If there is no memory.
    pub(super) fn new() -> io::Result<Self> {
        let memory = Memory::from_ranges(&[(GuestAddress(0), SIZE)]).map_err(other)?;
        Ok(Scratch { memory: GuestMemoryAtomic::new(memory).memory() })
    }

    pub(super) fn memory(&self) -> &Memory {
        &self.memory
    }

    /// Guest address of the queue's descriptor table.
    pub(super) fn table(&self) -> GuestAddress {
        GuestAddress(TABLE)
    }

    /// Puts a request into a queue and takes it out as a descriptor chain.
    ///
    /// # Errors
    /// If it does not fit.
    pub(super) fn queue(&self, sent: &[u8]) -> io::Result<Chain> {
        let next = VRING_DESC_F_NEXT as u16;
        let sent = sent.get(..sent.len().min(MAX_BYTES)).unwrap_or_default();
        let descriptors = [
            Descriptor::new(SENT, sent.len() as u32, next, 1),
            Descriptor::new(REPLY, MAX_BYTES as u32, VRING_DESC_F_WRITE as u16, 0),
        ];
        self.memory.write_slice(sent, GuestAddress(SENT)).map_err(other)?;
        for (at, descriptor) in (0..).zip(descriptors) {
            self.memory.write_obj(RawDescriptor::from(descriptor), GuestAddress(TABLE + 16 * at)).map_err(other)?;
        }
        // flags, idx, ring[0]: one chain is available, which begins at descriptor 0.
        self.memory.write_obj([0u16, 1, 0], GuestAddress(AVAILABLE)).map_err(other)?;
        let mut queue = Queue::new(4).map_err(other)?;
        queue.set_size(4);
        queue.try_set_desc_table_address(GuestAddress(TABLE)).map_err(other)?;
        queue.try_set_avail_ring_address(GuestAddress(AVAILABLE)).map_err(other)?;
        queue.try_set_used_ring_address(GuestAddress(USED)).map_err(other)?;
        queue.set_ready(true);
        let chain = queue.iter(self.memory.clone()).map_err(other)?.next();
        chain.ok_or_else(|| io::Error::other("no request in the queue"))
    }
}

fn other(error: impl std::fmt::Display) -> io::Error {
    io::Error::other(error.to_string())
}
