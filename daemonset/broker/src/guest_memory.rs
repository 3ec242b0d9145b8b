//! Reads ring indexes from guest memory, and nothing else.
//!
//! It uses `pread` on the file of the region and never a mapping: if the VMM shrinks the file, the read is short instead
//! of a SIGBUS.

use std::io;

use rustix::fs::fstat;
use rustix::io::pread;
use thiserror::Error;

use crate::descriptor::Descriptor;
use crate::record::SessionRecord;

/// Offset of `idx` in a used and in an available ring (virtio 1.2, sections 2.7.8 and 2.7.6).
const IDX: u64 = 2;

/// Why a ring's position cannot be read.
#[derive(Debug, Error)]
pub(crate) enum PositionError {
    #[error("ring {0} lies in no memory region")]
    NotMapped(usize),
    #[error("guest memory ends before the used ring")]
    TooShort,
    #[error("guest memory: {0}")]
    Io(io::Error),
}

from_cause!(PositionError::Io(io::Error));

/// The used index of a ring: every request before it is finished, and none from it on.
pub(crate) fn used_index(record: &SessionRecord<Descriptor>, ring: usize) -> Result<u16, PositionError> {
    let address = record.rings[ring].address.ok_or(PositionError::NotMapped(ring))?;
    index_at(record, ring, address.used)
}

/// True if the guest has requests that are not finished.
pub(crate) fn has_requests(record: &SessionRecord<Descriptor>, ring: usize) -> bool {
    let Some(address) = record.rings[ring].address else { return false };
    match (index_at(record, ring, address.available), index_at(record, ring, address.used)) {
        (Ok(available), Ok(used)) => available != used,
        _ => false,
    }
}

/// True if every file of guest memory is at least as long as its regions. A VMM that shortens one kills its engines.
pub(crate) fn is_whole(record: &SessionRecord<Descriptor>) -> bool {
    record.regions.iter().all(|region| {
        let size = fstat(&region.file).map_or(0, |stat| stat.st_size);
        u64::try_from(size).is_ok_and(|size| region.layout.offset + region.layout.size <= size)
    })
}

fn index_at(record: &SessionRecord<Descriptor>, ring: usize, part: u64) -> Result<u16, PositionError> {
    let at = part.checked_add(IDX).ok_or(PositionError::NotMapped(ring))?;
    let region = record.region_of(at, 2).ok_or(PositionError::NotMapped(ring))?;
    let offset = region.layout.offset + (at - region.layout.user_addr);
    let mut bytes = [0u8; 2];
    match pread(&region.file, &mut bytes, offset).map_err(io::Error::from)? {
        2 => Ok(u16::from_le_bytes(bytes)),
        _ => Err(PositionError::TooShort),
    }
}

/// The position at which a stopped ring continues: the used index, which the guest sees. The engine's position is used
/// only if the used index cannot belong to this ring, because the guest reused the memory before or during a reboot.
pub(crate) fn position(engine: Option<u16>, used: Option<u16>, size: u16, recorded: u16) -> u16 {
    match (engine, used) {
        (Some(engine), Some(used)) if engine.wrapping_sub(used) <= size => used,
        (Some(engine), _) => engine,
        (None, Some(used)) => used,
        (None, None) => recorded,
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::fd::OwnedFd;
    use std::os::unix::fs::FileExt;

    use rustix::fs::{MemfdFlags, memfd_create};

    use super::*;
    use crate::descriptor::Numbering;
    use crate::disposal::Foreign;
    use crate::record::Ring;
    use crate::vhost_user::codec::{Layout, Region, Request, RingAddress};

    fn record_on(file: &File, used: u64) -> SessionRecord<Descriptor> {
        let layout = Layout { guest_addr: 0, size: 0x2000, user_addr: 0x7f00_0000_0000, offset: 0x1000 };
        let fd: OwnedFd = file.try_clone().unwrap().into();
        let table = Request::SetMemTable(vec![Region { layout, file: Foreign::new(fd, Default::default()) }]);
        let admitted = Numbering::default().admit(&[], &[], table).unwrap();
        let Request::SetMemTable(regions) = admitted else { panic!() };
        let address = RingAddress { descriptors: 0, used, available: 0 };
        let ring = Ring { size: 4, address: Some(address), ..Ring::default() };
        SessionRecord { regions, rings: [ring, Ring::default()], ..SessionRecord::default() }
    }

    #[test]
    fn used_index_is_read_from_its_region() {
        let file = File::from(memfd_create("guest", MemfdFlags::CLOEXEC).unwrap());
        file.set_len(0x3000).unwrap();
        file.write_all_at(&0xabcdu16.to_le_bytes(), 0x1000 + 0x800 + 2).unwrap();
        let record = record_on(&file, 0x7f00_0000_0800);
        assert_eq!(used_index(&record, 0).unwrap(), 0xabcd);
        assert!(matches!(used_index(&record, 1), Err(PositionError::NotMapped(1))));
        assert!(matches!(used_index(&record_on(&file, 0x7f00_0000_1fff), 0), Err(PositionError::NotMapped(0))));
        assert!(matches!(used_index(&record_on(&file, u64::MAX), 0), Err(PositionError::NotMapped(0))));
        assert!(is_whole(&record));
        file.set_len(0x1000).unwrap();
        assert!(matches!(used_index(&record, 0), Err(PositionError::TooShort)));
        assert!(!is_whole(&record));
    }

    #[test]
    fn used_index_wins_unless_it_is_impossible() {
        let size = 128;
        let table = [
            (Some(7), Some(7), 7),
            (Some(9), Some(7), 7),
            (Some(3), Some(65530), 65530),
            (Some(500), Some(0), 500),
            (Some(7), Some(8), 7),
            (Some(7), None, 7),
            (None, Some(8), 8),
            (None, None, 42),
        ];
        for (engine, used, expected) in table {
            assert_eq!(position(engine, used, size, 42), expected, "{engine:?} {used:?}");
        }
    }
}
