//! Arguments at which the library panics, and files that cannot be served as orphaned.

use std::fs::File;
use std::io::Read as _;
use std::os::unix::fs::OpenOptionsExt;

use nix::sys::stat::Mode;
use virtiofsd::passthrough::PassthroughFs;
use virtiofsd::passthrough::xattrmap::XattrMap;

use super::operation::Operation::*;
use super::pair::{Pair, Start};
use crate::orphaned::OrphanedFile;

#[test]
fn invalid_offsets_are_refused() {
    let mut pair = Pair::<PassthroughFs>::new(|_| {}, Start::default());
    for offset in [1 << 63, i64::MAX as u64, u64::MAX - 4096, u64::MAX] {
        assert_eq!(pair.through_ours(&Read { size: 4096, offset }), Err(libc::EINVAL));
        for (delayed, flags) in [(false, 0), (false, libc::O_APPEND), (true, 0)] {
            let write = Write { data: vec![0; 10], offset, delayed, kill_priv: false, flags };
            assert_eq!(pair.through_ours(&write), Err(libc::EINVAL));
        }
    }
}

#[test]
fn names_without_a_rule_are_not_supported() {
    let rules = |config: &mut virtiofsd::passthrough::Config| {
        config.xattr = true;
        config.xattrmap = Some(XattrMap::try_from(":ok:client:security.:: :ok:client:user.::").unwrap());
    };
    let mut pair = Pair::<PassthroughFs>::new(rules, Start::default());
    let set = Setxattr {
        name: c"user.a".into(),
        value: Vec::new(),
        flags: 0,
        extra: virtiofsd::filesystem::SetxattrFlags::empty(),
    };
    assert!(pair.through_ours(&set).is_ok());
    assert_eq!(pair.through_ours(&Getxattr { name: c"trusted.a".into(), size: 10 }), Err(libc::ENOTSUP));
    assert_eq!(pair.through_ours(&Listxattr { size: 100 }), Err(libc::ENOTSUP));
}

#[test]
fn only_open_files_and_directories_are_accepted() {
    let dir = tempfile::tempdir().unwrap();
    let pipe = dir.path().join("pipe");
    nix::unistd::mkfifo(&pipe, Mode::S_IRWXU).unwrap();
    let open = |path: &std::path::Path, flags| File::options().read(true).custom_flags(flags).open(path).unwrap();
    for refused in [open(&pipe, libc::O_NONBLOCK), open(&pipe, libc::O_PATH), open(dir.path(), libc::O_PATH)] {
        assert_eq!(OrphanedFile::new(refused).err().and_then(|error| error.raw_os_error()), Some(libc::EBADF));
    }
    assert!(OrphanedFile::new(open(dir.path(), libc::O_DIRECTORY)).is_ok());
}

#[test]
fn dropping_an_orphaned_file_closes_it() {
    let (mut reader, writer) = std::io::pipe().unwrap();
    let dir = tempfile::tempdir().unwrap();
    let orphan = OrphanedFile::new(File::open(dir.path()).unwrap()).unwrap();
    let held = (orphan, writer);
    drop(held);
    assert_eq!(reader.read(&mut [0]).unwrap(), 0);
}
