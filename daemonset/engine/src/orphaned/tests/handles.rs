//! File handles of the kernel.

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt};

use crate::orphaned::{kernel_file_handle, open_by_kernel_handle};

#[test]
fn an_open_file_without_a_name_opens_by_handle() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("file");
    fs::write(&path, "contents").unwrap();
    let mount = File::open(dir.path()).unwrap();
    let first = File::open(&path).unwrap();
    let handle = kernel_file_handle(&first).unwrap().unwrap();
    let (kind, bytes) = (handle.kind, &handle.bytes);
    fs::remove_file(&path).unwrap();

    let second = open_by_kernel_handle(&mount, kind, bytes, libc::O_RDWR).unwrap();
    assert_eq!(first.metadata().unwrap().ino(), second.metadata().unwrap().ino());
    assert_eq!(kernel_file_handle(&second).unwrap().unwrap(), handle);
    second.write_all_at(b"C", 0).unwrap();
    let mut seen = [0; 8];
    first.read_exact_at(&mut seen, 0).unwrap();
    assert_eq!(&seen, b"Contents");

    drop((first, second));
    let error = open_by_kernel_handle(&mount, kind, bytes, libc::O_RDONLY).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc::ESTALE));
}

#[test]
fn file_handles_differ_by_file() {
    let dir = tempfile::tempdir().unwrap();
    let handle = |name| kernel_file_handle(&File::create(dir.path().join(name)).unwrap()).unwrap().unwrap();
    assert_ne!(handle("one"), handle("two"));
    assert_eq!(handle("one"), handle("one"));
}

#[test]
fn invalid_file_handles_are_refused() {
    let mount = File::open("/").unwrap();
    for (kind, length) in [(1, 129), (1, 0), (-1, 8), (0, 8), (1, 4096)] {
        assert!(open_by_kernel_handle(&mount, kind, &vec![0; length], libc::O_RDONLY).is_err(), "{kind} {length}");
    }
    assert!(kernel_file_handle(&File::open("/proc/self/status").unwrap()).is_ok_and(|handle| handle.is_none()));
}
