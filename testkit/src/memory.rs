//! Guest RAM: a memfd, mapped in this process and sent to the back-end as memory regions.

use std::fs::File;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use nix::sys::memfd::{MFdFlags, memfd_create};
use vm_memory::{AtomicAccess, Bytes, FileOffset, GuestAddress, GuestMemory as _, GuestMemoryMmap, GuestMemoryRegion};

/// Guest address above the hole for devices below 4 GiB, at which the RAM of a PC continues.
const ABOVE_THE_HOLE: u64 = 4 << 30;

/// Page size: alignment of buffers, and step when memory is touched.
pub const PAGE: u64 = 4096;

/// An error in setting up or accessing guest memory.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// The memfd could not be created or resized, or its size could not be read.
    #[error("memfd of {size} bytes: {source}")]
    Memfd {
        /// The requested size.
        size: u64,
        /// The kernel's error.
        source: std::io::Error,
    },
    /// The memfd could not be mapped.
    #[error("mapping guest memory: {0}")]
    Map(#[from] vm_memory::mmap::FromRangesError),
    /// This driver used an address outside of guest memory.
    #[error("guest address {address:#x}, {len} bytes: {source}")]
    Access {
        /// Guest physical address.
        address: u64,
        /// Number of bytes.
        len: usize,
        /// The error of the mapping.
        source: vm_memory::GuestMemoryError,
    },
    /// The guest's memory is too small for its rings and buffers.
    #[error("guest memory of {size} bytes has no room for another {wanted} bytes of buffers")]
    Full {
        /// Size of the guest's memory.
        size: u64,
        /// The requested size.
        wanted: u64,
    },
}

/// A region as sent to the back-end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Region {
    /// Guest physical address of its first byte.
    pub guest: u64,
    /// Length in bytes.
    pub size: u64,
    /// Address of the mapping in this process, the "user address" of the vhost-user protocol.
    pub user: u64,
    /// Offset of the region in the memfd.
    pub offset: u64,
}

/// Guest memory in a memfd. Pages are allocated when they are touched.
#[derive(Debug)]
pub struct GuestMemory {
    map: GuestMemoryMmap,
    file: Arc<File>,
    size: u64,
}

impl GuestMemory {
    /// Creates `size` bytes of memory. With `split`: two regions of one memfd with a hole between them, as QEMU
    /// describes RAM above 4 GiB.
    pub fn create(size: u64, split: Option<u64>) -> Result<Self, MemoryError> {
        let memfd = |source: std::io::Error| MemoryError::Memfd { size, source };
        let fd = memfd_create("testkit-guest-ram", MFdFlags::MFD_CLOEXEC).map_err(|errno| memfd(errno.into()))?;
        Self::in_file(Arc::new(File::from(fd)), size, split)
    }

    /// The same in a file of the caller.
    pub fn in_file(file: Arc<File>, size: u64, split: Option<u64>) -> Result<Self, MemoryError> {
        file.set_len(size).map_err(|source| MemoryError::Memfd { size, source })?;
        let ranges = ranges(size, split).into_iter().map(|(guest, len, offset)| {
            let backing = FileOffset::from_arc(Arc::clone(&file), offset);
            (GuestAddress(guest), len as usize, Some(backing))
        });
        let map = GuestMemoryMmap::from_ranges_with_files(ranges)?;
        Ok(Self { map, file, size })
    }

    /// Total size in bytes.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// The memfd, which the front-end sends.
    pub fn fd(&self) -> RawFd {
        self.file.as_raw_fd()
    }

    /// Truncates the memfd while the back-end uses it, as a hostile front-end (SIGBUS in the back-end). This process
    /// must not access the truncated part either.
    pub fn truncate(&self, size: u64) -> Result<(), MemoryError> {
        self.file.set_len(size).map_err(|source| MemoryError::Memfd { size, source })
    }

    /// Writes one byte to each page, so that all pages are allocated: the teardown of a killed back-end takes time in
    /// proportion to the touched memory.
    pub fn touch(&self) -> Result<(), MemoryError> {
        for region in self.regions() {
            for at in (region.guest..region.guest + region.size).step_by(PAGE as usize) {
                self.store(at, 0_u8)?;
            }
        }
        Ok(())
    }

    /// The regions, lowest guest address first.
    pub fn regions(&self) -> Vec<Region> {
        self.map
            .iter()
            .map(|region| Region {
                guest: region.start_addr().0,
                size: region.len(),
                user: region.as_ptr() as u64,
                offset: region.file_offset().map_or(0, FileOffset::start),
            })
            .collect()
    }

    /// The user address of a guest address, for SET_VRING_ADDR.
    pub fn user_address(&self, address: u64) -> Result<u64, MemoryError> {
        self.map
            .get_host_address(GuestAddress(address))
            .map(|pointer| pointer as u64)
            .map_err(|source| access(address, 0, source))
    }

    /// Copies `data` to guest memory.
    pub fn write(&self, address: u64, data: &[u8]) -> Result<(), MemoryError> {
        self.map.write_slice(data, GuestAddress(address)).map_err(|source| access(address, data.len(), source))
    }

    /// Copies guest memory to `data`.
    pub fn read(&self, address: u64, data: &mut [u8]) -> Result<(), MemoryError> {
        let len = data.len();
        self.map.read_slice(data, GuestAddress(address)).map_err(|source| access(address, len, source))
    }

    /// Zeroes `len` bytes.
    pub fn zero(&self, address: u64, len: u64) -> Result<(), MemoryError> {
        self.write(address, &vec![0; len as usize])
    }

    /// Stores a value atomically with Release order: earlier writes are visible before it.
    pub fn store<T: AtomicAccess>(&self, address: u64, value: T) -> Result<(), MemoryError> {
        self.map
            .store(value, GuestAddress(address), Ordering::Release)
            .map_err(|source| access(address, size_of::<T>(), source))
    }

    /// Loads a value atomically with Acquire order.
    pub fn load<T: AtomicAccess>(&self, address: u64) -> Result<T, MemoryError> {
        self.map
            .load(GuestAddress(address), Ordering::Acquire)
            .map_err(|source| access(address, size_of::<T>(), source))
    }
}

fn access(address: u64, len: usize, source: vm_memory::GuestMemoryError) -> MemoryError {
    MemoryError::Access { address, len, source }
}

/// `(guest address, length, file offset)` of each region.
fn ranges(size: u64, split: Option<u64>) -> Vec<(u64, u64, u64)> {
    match split {
        Some(at) if at > 0 && at < size => {
            vec![(0, at, 0), (ABOVE_THE_HOLE.max(at), size - at, at)]
        }
        _ => vec![(0, size, 0)],
    }
}

/// Allocates guest memory from front to back. Nothing is freed.
#[derive(Debug)]
pub struct Allocator {
    regions: Vec<Region>,
    current: usize,
    next: u64,
    size: u64,
}

impl Allocator {
    /// Starts at the bottom of `memory`. Omits page 0, so that address 0 is always invalid.
    pub fn new(memory: &GuestMemory) -> Self {
        Self { regions: memory.regions(), current: 0, next: PAGE, size: memory.size() }
    }

    /// Allocates `len` bytes at a page boundary, within one region.
    pub fn take(&mut self, len: u64) -> Result<u64, MemoryError> {
        while let Some(region) = self.regions.get(self.current) {
            let start = self.next.max(region.guest).next_multiple_of(PAGE);
            if start + len <= region.guest + region.size {
                self.next = start + len;
                return Ok(start);
            }
            self.current += 1;
        }
        Err(MemoryError::Full { size: self.size, wanted: len })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_regions_share_one_memfd_and_leave_a_hole() {
        let memory = GuestMemory::create(64 << 20, Some(16 << 20)).unwrap();
        let regions = memory.regions();
        assert_eq!(regions.len(), 2);
        assert_eq!(regions[1].guest, ABOVE_THE_HOLE);
        assert_eq!(regions[1].offset, 16 << 20);
        memory.write(ABOVE_THE_HOLE + 5, b"high").unwrap();
        let mut back = [0; 4];
        memory.read(ABOVE_THE_HOLE + 5, &mut back).unwrap();
        assert_eq!(&back, b"high");
        assert!(memory.write(32 << 20, b"hole").is_err());
    }

    #[test]
    fn allocations_are_within_one_region() {
        let memory = GuestMemory::create(64 << 20, Some(1 << 20)).unwrap();
        let mut allocator = Allocator::new(&memory);
        assert_eq!(allocator.take(512 << 10).unwrap(), PAGE);
        assert_eq!(allocator.take(768 << 10).unwrap(), ABOVE_THE_HOLE);
        assert!(matches!(allocator.take(64 << 20), Err(MemoryError::Full { .. })));
    }

    #[test]
    fn untouched_memory_is_not_resident() {
        use std::os::unix::fs::MetadataExt;
        let memory = GuestMemory::create(4 << 30, None).unwrap();
        assert_eq!(memory.file.metadata().unwrap().blocks(), 0);
    }
}
