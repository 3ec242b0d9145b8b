//! Closing descriptors. The last close of a file on a hung file system blocks, so another thread does it.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::mpsc;
use std::thread;

use rustix::fs::{AtFlags, FileType, StatxFlags, fcntl_get_seals, statx};

/// The thread that closes files.
pub(crate) struct Closer(mpsc::Sender<OwnedFd>);

impl Closer {
    pub(crate) fn start() -> io::Result<Self> {
        let (sender, files) = mpsc::channel::<OwnedFd>();
        thread::Builder::new().name("close".into()).spawn(move || files.into_iter().for_each(drop))?;
        Ok(Closer(sender))
    }

    /// Closes a descriptor: memory and sockets at once, files and directories in the thread.
    pub(crate) fn close(&self, fd: OwnedFd) {
        if may_block(&fd) {
            // The thread receives as long as this sender exists.
            let _ = self.0.send(fd);
        }
    }
}

/// Asks the kernel only for what it has in memory.
fn may_block(fd: &OwnedFd) -> bool {
    let Ok(stat) = statx(fd, "", AtFlags::EMPTY_PATH | AtFlags::STATX_DONT_SYNC, StatxFlags::TYPE) else { return true };
    match FileType::from_raw_mode(stat.stx_mode.into()) {
        FileType::Directory => true,
        // Only files of tmpfs and hugetlbfs can have seals.
        FileType::RegularFile => fcntl_get_seals(fd).is_err(),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;

    use rustix::fs::{MemfdFlags, memfd_create};

    use super::*;

    #[test]
    fn memory_and_sockets_are_closed_at_once() {
        let memory = memfd_create("x", MemfdFlags::CLOEXEC).unwrap();
        let (reader, _writer) = io::pipe().unwrap();
        assert!(!may_block(&memory) && !may_block(&reader.into()));
        for path in ["/proc/self/maps", "/"] {
            assert!(may_block(&File::open(path).unwrap().into()), "{path}");
        }
    }
}
