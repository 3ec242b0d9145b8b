//! File descriptors that a VMM sent: their checks, and the numbers by which the record refers to them.

mod disk_file;

use std::collections::BTreeMap;
use std::fmt;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError, Weak};

use rustix::fs::{FileType, OFlags, fcntl_get_seals, fcntl_getfl, fstat, fstatfs, readlink};
use thiserror::Error;

use disk_file::is_on_disk;

use crate::disposal::Foreign;
use crate::vhost_user::codec::{Layout, Region, Request};

/// `HUGETLBFS_MAGIC` and `TMPFS_MAGIC` of linux/magic.h; a memfd is a file of one of them.
const MEMORY_FILE_SYSTEMS: [u64; 2] = [0x9584_58f6, 0x0102_1994];

/// An open file of a VMM. Clones refer to the same file and number.
#[derive(Clone)]
pub(crate) struct Descriptor(Arc<OpenFile>);

struct OpenFile {
    number: u32,
    fd: Foreign,
    /// Device and inode.
    identity: (u64, u64),
}

impl Descriptor {
    /// The number by which the record refers to it.
    pub(crate) fn number(&self) -> u32 {
        self.0.number
    }
}

impl AsFd for Descriptor {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.fd.as_fd()
    }
}

impl PartialEq for Descriptor {
    fn eq(&self, other: &Self) -> bool {
        self.0.number == other.0.number
    }
}

impl Eq for Descriptor {}

impl fmt::Debug for OpenFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "#{}", self.number)
    }
}

impl fmt::Debug for Descriptor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "#{}", self.0.number)
    }
}

/// Why a descriptor is invalid.
#[derive(Debug, Error)]
pub(crate) enum InvalidDescriptor {
    #[error(
        "guest memory must be a memfd or a file on tmpfs, hugetlbfs or a disk that is mounted here (ext4, xfs, btrfs), open \
         for reading and writing"
    )]
    NotMemory,
    #[error("memory region {layout:x?} ends beyond its file of {size} bytes")]
    TooShort { layout: Layout, size: u64 },
    #[error("kick, call and err must be eventfds, not {0}")]
    NotEventFd(String),
    #[error("descriptor: {0}")]
    Io(io::Error),
}

from_cause!(InvalidDescriptor::Io(io::Error));

impl From<rustix::io::Errno> for InvalidDescriptor {
    fn from(errno: rustix::io::Errno) -> Self {
        InvalidDescriptor::Io(errno.into())
    }
}

/// Numbers the descriptors of one session.
#[derive(Debug, Default)]
pub(crate) struct Numbering {
    last: u32,
    registry: Arc<Registry>,
}

/// The descriptors of one session, for whoever ends it without its thread.
#[derive(Debug, Default)]
pub(crate) struct Registry(Mutex<Vec<Weak<OpenFile>>>);

impl Registry {
    fn add(&self, file: &Arc<OpenFile>) {
        let mut files = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        files.retain(|file| file.strong_count() > 0);
        files.push(Arc::downgrade(file));
    }

    /// Releases all files, whoever still holds the descriptors.
    pub(crate) fn revoke(&self, null: BorrowedFd<'_>) {
        let files = std::mem::take(&mut *self.0.lock().unwrap_or_else(PoisonError::into_inner));
        files.iter().filter_map(Weak::upgrade).for_each(|file| file.fd.revoke(null));
    }
}

impl Numbering {
    pub(crate) fn registry(&self) -> Arc<Registry> {
        self.registry.clone()
    }

    /// Checks the descriptors of a request. A memory file of a region that is `known` already becomes the same descriptor: a VMM
    /// may send one memfd for two regions, and sends all of them again with every change. An eventfd that is among `events`
    /// becomes the same descriptor, too: systemd stores one open file once.
    pub(crate) fn admit(
        &mut self,
        known: &[Region<Descriptor>],
        events: &[Descriptor],
        request: Request<Foreign>,
    ) -> Result<Request<Descriptor>, InvalidDescriptor> {
        Ok(match request {
            Request::SetMemTable(regions) => Request::SetMemTable(self.table(known, regions)?),
            Request::AddMemReg(region) => Request::AddMemReg(self.region(known, region)?),
            Request::SetVringKick { ring, fd } => Request::SetVringKick { ring, fd: self.event(events, fd)? },
            Request::SetVringCall { ring, fd } => Request::SetVringCall { ring, fd: self.event(events, fd)? },
            Request::SetVringErr { ring, fd } => Request::SetVringErr { ring, fd: self.event(events, fd)? },
            Request::GetFeatures => Request::GetFeatures,
            Request::SetFeatures(features) => Request::SetFeatures(features),
            Request::SetOwner => Request::SetOwner,
            Request::ResetOwner => Request::ResetOwner,
            Request::SetVringNum { ring, num } => Request::SetVringNum { ring, num },
            Request::SetVringAddr { ring, address } => Request::SetVringAddr { ring, address },
            Request::SetVringBase { ring, base } => Request::SetVringBase { ring, base },
            Request::GetVringBase { ring } => Request::GetVringBase { ring },
            Request::GetProtocolFeatures => Request::GetProtocolFeatures,
            Request::SetProtocolFeatures(features) => Request::SetProtocolFeatures(features),
            Request::GetQueueNum => Request::GetQueueNum,
            Request::SetVringEnable { ring, enable } => Request::SetVringEnable { ring, enable },
            Request::ResetDevice => Request::ResetDevice,
            Request::GetMaxMemSlots => Request::GetMaxMemSlots,
            Request::RemMemReg(layout) => Request::RemMemReg(layout),
        })
    }

    fn table(
        &mut self,
        known: &[Region<Descriptor>],
        regions: Vec<Region<Foreign>>,
    ) -> Result<Vec<Region<Descriptor>>, InvalidDescriptor> {
        let mut known = known.to_vec();
        let mut table = Vec::with_capacity(regions.len());
        for region in regions {
            let region = self.region(&known, region)?;
            known.push(region.clone());
            table.push(region);
        }
        Ok(table)
    }

    fn region(
        &mut self,
        known: &[Region<Descriptor>],
        region: Region<Foreign>,
    ) -> Result<Region<Descriptor>, InvalidDescriptor> {
        let layout = region.layout;
        let identity = check_memory(region.file.as_fd(), &layout)?;
        let same = known.iter().map(|region| &region.file).find(|file| file.0.identity == identity);
        let file = same.cloned().unwrap_or_else(|| self.keep(region.file, identity));
        Ok(Region { layout, file })
    }

    fn event(&mut self, events: &[Descriptor], fd: Option<Foreign>) -> Result<Option<Descriptor>, InvalidDescriptor> {
        let Some(fd) = fd else { return Ok(None) };
        check_event(fd.as_fd())?;
        // QEMU and cloud-hypervisor create them non-blocking. A VMM that fills one and makes it blocking hangs its own
        // engine; the broker does not write to it.
        rustix::io::ioctl_fionbio(&fd, true)?;
        let same = events.iter().find(|known| is_same_file(known.as_fd(), fd.as_fd())).cloned();
        // All eventfds share one anonymous inode, so it does not identify them.
        Ok(Some(same.unwrap_or_else(|| self.keep(fd, (0, 0)))))
    }

    /// Takes the descriptors of a restored session under their numbers.
    pub(crate) fn restore(
        &mut self,
        held: BTreeMap<u32, OwnedFd>,
    ) -> Result<BTreeMap<u32, Descriptor>, InvalidDescriptor> {
        let mut restored = BTreeMap::new();
        for (number, fd) in held {
            let stat = fstat(&fd)?;
            let regular = FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile;
            let identity = if regular { (stat.st_dev, stat.st_ino) } else { (0, 0) };
            self.last = self.last.max(number);
            let file = Arc::new(OpenFile { number, fd: Foreign::new(fd, Arc::default()), identity });
            self.registry.add(&file);
            restored.insert(number, Descriptor(file));
        }
        Ok(restored)
    }

    fn keep(&mut self, fd: Foreign, identity: (u64, u64)) -> Descriptor {
        self.last += 1;
        let file = Arc::new(OpenFile { number: self.last, fd, identity });
        self.registry.add(&file);
        Descriptor(file)
    }
}

/// Checks the descriptors of a restored session as those of a VMM's messages.
pub(crate) fn check_restored<'a>(
    regions: &[Region<Descriptor>],
    events: impl IntoIterator<Item = &'a Descriptor>,
) -> Result<(), InvalidDescriptor> {
    regions.iter().try_for_each(|region| check_memory(region.file.as_fd(), &region.layout).map(drop))?;
    events.into_iter().try_for_each(|event| check_event(event.as_fd()))
}

/// True if both are one open file, as kcmp(2) says. False if it is not permitted.
fn is_same_file(a: BorrowedFd<'_>, b: BorrowedFd<'_>) -> bool {
    const KCMP_FILE: libc::c_long = 0;
    let own = libc::c_long::from(std::process::id());
    let [a, b] = [a, b].map(|fd| libc::c_long::from(fd.as_raw_fd()));
    // SAFETY: the call compares two numbers of this process and touches no memory.
    unsafe { libc::syscall(libc::SYS_kcmp, own, own, KCMP_FILE, a, b) == 0 }
}

/// Another file could block the read of the used index (FUSE), or be shorter than its mapping.
///
/// The first checks need no file system. Only memfds and files of tmpfs and hugetlbfs have seals (`memfd_file_seals_ptr`
/// in mm/memfd.c), sealed or not; for them, the later checks do no I/O. For files on disks that are found without I/O,
/// they take no longer than a disk does. A FUSE server could block fstat or fstatfs.
fn check_memory(fd: BorrowedFd<'_>, layout: &Layout) -> Result<(u64, u64), InvalidDescriptor> {
    let read_write = fcntl_getfl(fd)? & OFlags::ACCMODE == OFlags::RDWR;
    if !read_write || !is_memory_file(fd)? && !is_on_disk(fd) {
        return Err(InvalidDescriptor::NotMemory);
    }
    let stat = fstat(fd)?;
    let size = u64::try_from(stat.st_size).unwrap_or(0);
    if layout.offset.checked_add(layout.size).is_none_or(|end| end > size) {
        return Err(InvalidDescriptor::TooShort { layout: *layout, size });
    }
    Ok((stat.st_dev, stat.st_ino))
}

/// True for a memfd and a regular file of tmpfs or hugetlbfs.
fn is_memory_file(fd: BorrowedFd<'_>) -> Result<bool, InvalidDescriptor> {
    if fcntl_get_seals(fd).is_err() {
        return Ok(false);
    }
    let regular = FileType::from_raw_mode(fstat(fd)?.st_mode) == FileType::RegularFile;
    Ok(regular && MEMORY_FILE_SYSTEMS.contains(&(fstatfs(fd)?.f_type as u64)))
}

/// With a pipe or a socket, a VMM could block the writer.
fn check_event(fd: BorrowedFd<'_>) -> Result<(), InvalidDescriptor> {
    let link = Path::new("/proc/self/fd").join(fd.as_raw_fd().to_string());
    let target = readlink(link, Vec::new())?;
    if target.as_bytes() == b"anon_inode:[eventfd]" {
        Ok(())
    } else {
        Err(InvalidDescriptor::NotEventFd(target.to_string_lossy().into_owned()))
    }
}

#[cfg(test)]
mod tests {
    use std::fs::{File, OpenOptions};

    use rustix::event::{EventfdFlags, eventfd};
    use rustix::fs::{MemfdFlags, memfd_create};

    use super::*;

    fn foreign(fd: impl Into<OwnedFd>) -> Foreign {
        Foreign::new(fd.into(), Arc::default())
    }

    fn memory(size: u64) -> OwnedFd {
        let file = File::from(memfd_create("guest", MemfdFlags::CLOEXEC).unwrap());
        file.set_len(size).unwrap();
        file.into()
    }

    fn layout(size: u64, offset: u64) -> Layout {
        Layout { guest_addr: 0, size, user_addr: 0, offset }
    }

    fn admit(request: Request<Foreign>) -> Result<Request<Descriptor>, InvalidDescriptor> {
        Numbering::default().admit(&[], &[], request)
    }

    fn add(file: OwnedFd, layout: Layout) -> Request<Foreign> {
        Request::AddMemReg(Region { layout, file: foreign(file) })
    }

    #[test]
    fn memfd_of_the_declared_size_is_memory() {
        assert!(admit(add(memory(8192), layout(4096, 4096))).is_ok());
        for (size, offset) in [(4097, 4096), (8193, 0), (1, 8192), (u64::MAX, 1)] {
            let refused = admit(add(memory(8192), layout(size, offset)));
            assert!(matches!(refused, Err(InvalidDescriptor::TooShort { .. })), "{size} {offset}");
        }
    }

    #[test]
    fn other_files_are_not_memory() {
        let read_only = OpenOptions::new()
            .read(true)
            .open(format!("/proc/self/fd/{}", memory(8192).as_raw_fd()))
            .unwrap_or_else(|_| File::open("/dev/null").unwrap());
        let other_file_system = File::open("/proc/self/maps").unwrap();
        let (pipe, _writer) = io::pipe().unwrap();
        let event = eventfd(0, EventfdFlags::CLOEXEC).unwrap();
        for fd in [read_only.into(), other_file_system.into(), pipe.into(), event] {
            assert!(matches!(admit(add(fd, layout(1, 0))), Err(InvalidDescriptor::NotMemory)));
        }
    }

    #[test]
    fn only_eventfds_are_accepted() {
        let event = eventfd(0, EventfdFlags::CLOEXEC).unwrap();
        assert!(admit(Request::SetVringKick { ring: 0, fd: Some(foreign(event)) }).is_ok());
        assert!(admit(Request::SetVringCall { ring: 0, fd: None }).is_ok());
        let (_reader, pipe) = io::pipe().unwrap();
        let refused = admit(Request::SetVringErr { ring: 0, fd: Some(foreign(pipe)) });
        assert!(matches!(refused, Err(InvalidDescriptor::NotEventFd(_))));
    }

    #[test]
    fn eventfd_sent_twice_is_one_descriptor() {
        let file = eventfd(0, EventfdFlags::CLOEXEC).unwrap();
        let mut numbering = Numbering::default();
        let mut number = |known: &[Descriptor], fd: &OwnedFd| {
            let request = Request::SetVringCall { ring: 0, fd: Some(foreign(fd.try_clone().unwrap())) };
            match numbering.admit(&[], known, request).unwrap() {
                Request::SetVringCall { fd: Some(fd), .. } => fd,
                other => panic!("{other:?}"),
            }
        };
        let known = [number(&[], &file)];
        assert_eq!(number(&known, &file).number(), 1);
        assert_eq!(number(&known, &eventfd(0, EventfdFlags::CLOEXEC).unwrap()).number(), 2);
    }

    #[test]
    fn file_sent_twice_is_one_descriptor() {
        let file = memory(8192);
        let region = |file: OwnedFd, offset| Region { layout: layout(4096, offset), file: foreign(file) };
        let twice = Request::SetMemTable(vec![
            region(file.try_clone().unwrap(), 0),
            region(file.try_clone().unwrap(), 4096),
            region(memory(4096), 0),
        ]);
        let mut numbering = Numbering::default();
        let Ok(Request::SetMemTable(regions)) = numbering.admit(&[], &[], twice) else { panic!() };
        let numbers: Vec<u32> = regions.iter().map(|region| region.file.number()).collect();
        assert_eq!(numbers, [1, 1, 2]);
        let again = numbering.admit(&regions, &[], add(file, layout(4096, 0))).unwrap();
        assert!(matches!(again, Request::AddMemReg(region) if region.file.number() == 1));
    }
}
