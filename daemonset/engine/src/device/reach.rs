//! Checks which guest memory the device can reach.
//!
//! A VMM shares guest memory region by region and omits what it cannot share: QEMU omits RAM without a file descriptor,
//! such as a hot-plugged `memory-backend-ram` (`vhost_user_mem_section_filter` in hw/virtio/vhost-user.c). The guest does
//! not know that and places requests there.
//!
//! Such a request must not be completed without a reply header. Linux ignores the used length
//! (`virtio_fs_requests_done_work`) and trusts the header (`virtio_fs_request_complete`), which it allocated zeroed
//! (`fuse_request_alloc`): error 0. So the request succeeds, and the former contents of its buffers become the data.
//! Therefore:
//! - If the reply header is within reach, the request fails with `EIO` before the file system sees it.
//! - If the request has no reply (FORGET), it is completed unseen. The guest's reference remains until it unmounts.
//! - Otherwise the request stays at the head of its ring, and the ring waits. No error can be reported, and virtio sets no
//!   time limit for a device. The device tries again when the VMM shares more memory.

use virtio_queue::desc::RawDescriptor;
use virtio_queue::desc::split::Descriptor;
use virtiofsd::fuse::{InHeader, OutHeader};
use vm_memory::{ByteValued, Bytes, GuestAddress, GuestMemory};

use super::{Chain, Memory};

/// Guest memory that a request needs and the device does not have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Unreachable {
    /// Guest-physical address of its first byte.
    pub(super) start: u64,
    /// Guest-physical address of the byte behind its last.
    pub(super) end: u64,
    /// True if the request can be completed without being taken for a success.
    pub(super) can_complete: bool,
}

/// The first memory out of reach among what `chain` names, in the order of its descriptors. `table`: the ring's
/// descriptor table.
pub(super) fn unreachable(memory: &Memory, table: GuestAddress, chain: &Chain) -> Option<Unreachable> {
    if let Some(indirect) = indirect_table(memory, table, chain).filter(|it| !reaches(memory, it)) {
        return Some(missing(&indirect, false));
    }
    let first = chain.clone().find(|descriptor| !reaches(memory, descriptor))?;
    Some(missing(&first, header_reaches(memory, chain)))
}

/// The request's header, read without what follows it.
pub(super) fn header(memory: &Memory, chain: &Chain) -> Option<InHeader> {
    let mut header = InHeader::default();
    let mut left = header.as_mut_slice();
    for descriptor in chain.clone().readable() {
        if left.is_empty() {
            break;
        }
        let (part, rest) = left.split_at_mut(left.len().min(descriptor.len() as usize));
        memory.read_slice(part, descriptor.addr()).ok()?;
        left = rest;
    }
    left.is_empty().then_some(header)
}

/// Writes `bytes` to the beginning of the reply, whatever follows them. False if there is no room within reach.
pub(super) fn write(memory: &Memory, chain: &Chain, bytes: &[u8]) -> bool {
    let mut left = bytes;
    for descriptor in chain.clone().writable() {
        if left.is_empty() {
            break;
        }
        let (part, rest) = left.split_at(left.len().min(descriptor.len() as usize));
        if memory.write_slice(part, descriptor.addr()).is_err() {
            return false;
        }
        left = rest;
    }
    left.is_empty()
}

/// True if the reply's header can be written, or none is expected.
fn header_reaches(memory: &Memory, chain: &Chain) -> bool {
    let mut left = size_of::<OutHeader>() as u32;
    chain
        .clone()
        .writable()
        .take_while(|descriptor| {
            let needed = left > 0;
            left = left.saturating_sub(descriptor.len());
            needed
        })
        .all(|descriptor| reaches(memory, &descriptor))
}

/// The ring's descriptor that leads to the chain's indirect table, if it has one.
fn indirect_table(memory: &Memory, table: GuestAddress, chain: &Chain) -> Option<Descriptor> {
    let offset = u64::from(chain.head_index()) * size_of::<RawDescriptor>() as u64;
    let head = memory.read_obj::<RawDescriptor>(GuestAddress(table.0.checked_add(offset)?)).ok()?;
    Some(Descriptor::from(head)).filter(Descriptor::refers_to_indirect_table)
}

/// True if the device has all that the descriptor names. In one region, as the library wants it.
fn reaches(memory: &Memory, descriptor: &Descriptor) -> bool {
    memory.get_slice(descriptor.addr(), descriptor.len() as usize).is_ok()
}

fn missing(descriptor: &Descriptor, can_complete: bool) -> Unreachable {
    let start = descriptor.addr().0;
    Unreachable { start, end: start.saturating_add(descriptor.len().into()), can_complete }
}
