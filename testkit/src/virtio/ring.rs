//! The driver's side of a split virtqueue (virtio 1.3, section 2.7).

use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use virtio_bindings::virtio_ring::{
    VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT, VRING_DESC_F_WRITE, VRING_USED_F_NO_NOTIFY,
};
use zerocopy::{FromBytes, Immutable, IntoBytes};

use crate::memory::{Allocator, GuestMemory, MemoryError};

/// The chain continues at `next`.
pub const NEXT: u16 = VRING_DESC_F_NEXT as u16;
/// The device writes this buffer.
pub const WRITE: u16 = VRING_DESC_F_WRITE as u16;
/// The buffer is a table of descriptors.
pub const INDIRECT: u16 = VRING_DESC_F_INDIRECT as u16;

/// A descriptor (section 2.7.5), little endian like all supported hosts.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable)]
#[repr(C)]
pub struct Descriptor {
    /// Guest physical address.
    pub address: u64,
    /// Length in bytes.
    pub len: u32,
    /// `NEXT`, `WRITE`, `INDIRECT`.
    pub flags: u16,
    /// Index of the next descriptor.
    pub next: u16,
}

/// Size of a descriptor in memory.
pub const DESCRIPTOR_SIZE: u64 = size_of::<Descriptor>() as u64;

/// An element of the used ring (section 2.7.8).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Used {
    /// Head of the completed chain.
    pub head: u32,
    /// Number of bytes that the device wrote.
    pub len: u32,
}

/// Guest addresses of the three parts of a ring.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Layout {
    /// Number of descriptors, a power of two.
    pub size: u16,
    /// The descriptor table.
    pub descriptors: u64,
    /// The available ring (driver area).
    pub available: u64,
    /// The used ring (device area).
    pub used: u64,
}

impl Layout {
    /// Allocates memory for a ring of `size` descriptors.
    pub fn allocate(allocator: &mut Allocator, size: u16) -> Result<Self, MemoryError> {
        let n = u64::from(size);
        Ok(Self {
            size,
            descriptors: allocator.take(DESCRIPTOR_SIZE * n)?,
            available: allocator.take(6 + 2 * n)?,
            used: allocator.take(6 + 8 * n)?,
        })
    }

    /// Guest addresses in the order descriptor table, available ring, used ring.
    pub fn addresses(&self) -> [u64; 3] {
        [self.descriptors, self.available, self.used]
    }

    fn available_index(&self) -> u64 {
        self.available + 2
    }

    fn available_slot(&self, position: u16) -> u64 {
        self.available + 4 + 2 * u64::from(position % self.size)
    }

    fn used_event(&self) -> u64 {
        self.available + 4 + 2 * u64::from(self.size)
    }

    fn used_index(&self) -> u64 {
        self.used + 2
    }

    fn used_slot(&self, position: u16) -> u64 {
        self.used + 4 + 8 * u64::from(position % self.size)
    }

    fn avail_event(&self) -> u64 {
        self.used + 4 + 8 * u64::from(self.size)
    }
}

/// The ring and the driver's indexes. It neither waits nor locks.
///
/// The raw methods can write any value to any field, so that hostile tests can violate the protocol.
#[derive(Debug)]
pub struct Ring {
    memory: Arc<GuestMemory>,
    layout: Layout,
    event_idx: bool,
    next_available: u16,
    last_used: u16,
}

impl Ring {
    /// A ring at index 0 in zeroed memory.
    pub fn new(memory: Arc<GuestMemory>, layout: Layout, event_idx: bool) -> Result<Self, MemoryError> {
        let n = u64::from(layout.size);
        memory.zero(layout.descriptors, DESCRIPTOR_SIZE * n)?;
        memory.zero(layout.available, 6 + 2 * n)?;
        memory.zero(layout.used, 6 + 8 * n)?;
        Ok(Self { memory, layout, event_idx, next_available: 0, last_used: 0 })
    }

    /// Guest addresses of the ring.
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// Number of chains made available so far, modulo 2^16.
    pub fn next_available(&self) -> u16 {
        self.next_available
    }

    /// Number of used chains processed so far, modulo 2^16.
    pub fn last_used(&self) -> u16 {
        self.last_used
    }

    /// Writes one descriptor of the table.
    pub fn write_descriptor(&self, index: u16, descriptor: Descriptor) -> Result<(), MemoryError> {
        let at = self.layout.descriptors + DESCRIPTOR_SIZE * u64::from(index);
        self.memory.write(at, descriptor.as_bytes())
    }

    /// Makes the chain at `head` available. True if the device requests a kick (sections 2.7.13.3 and 2.7.13.4).
    pub fn publish(&mut self, head: u16) -> Result<bool, MemoryError> {
        let old = self.next_available;
        let new = old.wrapping_add(1);
        self.memory.store(self.layout.available_slot(old), head)?;
        self.set_available_index(new)?;
        // The index must be visible before the device's kick request is read; otherwise both sides may wait.
        fence(Ordering::SeqCst);
        if self.event_idx {
            return Ok(need_event(self.avail_event()?, new, old));
        }
        let flags: u16 = self.memory.load(self.layout.used)?;
        Ok(u32::from(flags) & VRING_USED_F_NO_NOTIFY == 0)
    }

    /// Writes any value to avail.idx.
    pub fn set_available_index(&mut self, index: u16) -> Result<(), MemoryError> {
        self.next_available = index;
        self.memory.store(self.layout.available_index(), index)
    }

    /// Takes one used chain off the ring.
    pub fn pop_used(&mut self) -> Result<Option<Used>, MemoryError> {
        if self.used_index()? == self.last_used {
            return Ok(None);
        }
        let at = self.layout.used_slot(self.last_used);
        let used = Used { head: self.memory.load(at)?, len: self.memory.load(at + 4)? };
        self.last_used = self.last_used.wrapping_add(1);
        Ok(Some(used))
    }

    /// Requests a call for the next used chain. True if there already is one, for which the device need not send a call
    /// (section 2.7.10).
    pub fn enable_calls(&mut self) -> Result<bool, MemoryError> {
        if self.event_idx {
            self.memory.store(self.layout.used_event(), self.last_used)?;
        }
        fence(Ordering::SeqCst);
        Ok(self.used_index()? != self.last_used)
    }

    /// Requests no calls, for a driver that polls: sets the event index to the farthest value.
    pub fn disable_calls(&mut self) -> Result<(), MemoryError> {
        if self.event_idx {
            let far = self.last_used.wrapping_sub(1);
            self.memory.store(self.layout.used_event(), far)?;
        }
        Ok(())
    }

    /// used.idx, as written by the device.
    pub fn used_index(&self) -> Result<u16, MemoryError> {
        self.memory.load(self.layout.used_index())
    }

    /// avail_event, as written by the device: the index at which it requests a kick.
    pub fn avail_event(&self) -> Result<u16, MemoryError> {
        self.memory.load(self.layout.avail_event())
    }
}

/// vring_need_event: true if the step from `old` to `new` passed `event`.
fn need_event(event: u16, new: u16, old: u16) -> bool {
    new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn ring(size: u16, event_idx: bool) -> Ring {
        let memory = Arc::new(GuestMemory::create(1 << 20, None).unwrap());
        let layout = Layout::allocate(&mut Allocator::new(&memory), size).unwrap();
        Ring::new(memory, layout, event_idx).unwrap()
    }

    /// Returns a chain, as a device does.
    fn device_returns(ring: &Ring, position: u16, used: Used) {
        let at = ring.layout.used_slot(position);
        ring.memory.store(at, used.head).unwrap();
        ring.memory.store(at + 4, used.len).unwrap();
        let index = ring.layout.used_index();
        ring.memory.store(index, position.wrapping_add(1)).unwrap();
    }

    #[test]
    fn the_device_is_kicked_only_on_request() {
        let mut ring = ring(8, true);
        assert!(ring.publish(0).unwrap(), "a new device waits at index 0");
        assert!(!ring.publish(1).unwrap(), "avail_event is unchanged");
        ring.memory.store(ring.layout.avail_event(), 2_u16).unwrap();
        assert!(ring.publish(2).unwrap());
    }

    #[test]
    fn used_chains_return_in_order_across_the_wrap() {
        let mut ring = ring(4, true);
        ring.last_used = u16::MAX;
        ring.memory.store(ring.layout.used_index(), u16::MAX).unwrap();
        assert_eq!(ring.pop_used().unwrap(), None);
        assert!(!ring.enable_calls().unwrap());
        device_returns(&ring, u16::MAX, Used { head: 3, len: 16 });
        assert!(ring.enable_calls().unwrap());
        assert_eq!(ring.pop_used().unwrap(), Some(Used { head: 3, len: 16 }));
        assert_eq!(ring.last_used(), 0);
    }

    proptest! {
        /// Compares with the definition: the half-open window [old, new) contains the event.
        #[test]
        fn need_event_is_a_window(event: u16, old: u16, step in 1_u16..512) {
            let new = old.wrapping_add(step);
            let inside = (0..step).any(|i| old.wrapping_add(i) == event);
            prop_assert_eq!(need_event(event, new, old), inside);
        }
    }
}
