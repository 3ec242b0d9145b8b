//! Every operation of the client against stock virtiofsd: the guest sees what the host has.

mod common;

use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt, symlink};
use std::time::{Duration, UNIX_EPOCH};

use common::Stock;
use nix::errno::Errno;
use testkit::fuse::client::{Caller, SetAttr};
use testkit::fuse::init::InitFlags;
use testkit::fuse::wire::{ForgetOne, ROOT};

#[test]
fn a_file_is_created_written_read_and_removed() {
    let stock = Stock::start(&[]);
    let guest = stock.guest();
    let fuse = guest.fuse();
    let made = fuse.create(ROOT, "file", libc::O_RDWR, 0o640).unwrap();
    let (node, fh) = (made.entry.nodeid, made.open.fh);
    let data: Vec<u8> = (0..300_000_u32).map(|i| i as u8).collect();
    assert_eq!(fuse.write(node, fh, 0, &data, libc::O_RDWR).unwrap(), 300_000);
    assert_eq!(fs::read(stock.share().join("file")).unwrap(), data);
    assert_eq!(fuse.read(node, fh, 1000, 5000).unwrap(), data[1000..6000]);
    assert_eq!(fuse.read(node, fh, 299_990, 4096).unwrap(), data[299_990..]);
    assert_eq!(fuse.read(node, fh, 400_000, 4096).unwrap(), b"");
    assert_eq!(fuse.getattr(node, Some(fh)).unwrap().size, 300_000);
    fuse.fsync(node, fh, false).unwrap();
    fuse.flush(node, fh).unwrap();
    fuse.release(node, fh, libc::O_RDWR).unwrap();
    fuse.unlink(ROOT, "file").unwrap();
    assert!(!stock.share().join("file").exists());
    let again = fuse.unlink(ROOT, "file").unwrap_err();
    assert_eq!(again.errno(), Some(Errno::ENOENT));
}

#[test]
fn names_are_looked_up_and_forgotten() {
    let stock = Stock::start(&[]);
    fs::create_dir(stock.share().join("dir")).unwrap();
    fs::write(stock.share().join("dir/a"), "a").unwrap();
    let guest = stock.guest();
    let fuse = guest.fuse();
    let dir = fuse.lookup(ROOT, "dir").unwrap();
    let first = fuse.lookup(dir.nodeid, "a").unwrap();
    let second = fuse.lookup(dir.nodeid, "a").unwrap();
    assert_eq!(first.nodeid, second.nodeid);
    let missing = fuse.lookup(dir.nodeid, "b").unwrap_err();
    assert_eq!(missing.errno(), Some(Errno::ENOENT));
    fuse.forget(first.nodeid, 1).unwrap();
    assert!(fuse.getattr(first.nodeid, None).is_ok(), "one lookup remains");
    fuse.batch_forget(&[ForgetOne { nodeid: first.nodeid, nlookup: 1 }]).unwrap();
    let gone = fuse.getattr(first.nodeid, None).unwrap_err();
    assert_eq!(gone.errno(), Some(Errno::EBADF), "reply of stock virtiofsd");
}

#[test]
fn directories_are_listed_in_steps() {
    let stock = Stock::start(&[]);
    for i in 0..500 {
        fs::write(stock.share().join(format!("file-{i:03}")), "").unwrap();
    }
    let guest = stock.guest();
    let fuse = guest.fuse();
    let fh = fuse.opendir(ROOT).unwrap().fh;
    for plus in [false, true] {
        let mut names = Vec::new();
        let mut position = 0;
        loop {
            let entries = match plus {
                false => fuse.readdir(ROOT, fh, position, 4096).unwrap(),
                true => fuse.readdirplus(ROOT, fh, position, 4096).unwrap(),
            };
            let Some(last) = entries.last() else { break };
            position = last.next;
            names.extend(entries.into_iter().map(|entry| entry.name));
        }
        names.sort();
        names.retain(|name| name.starts_with(b"file-"));
        assert_eq!(names.len(), 500);
        assert_eq!(names[499], b"file-499");
    }
    fuse.fsyncdir(ROOT, fh, false).unwrap();
    fuse.releasedir(ROOT, fh).unwrap();
}

#[test]
fn names_are_moved_exchanged_and_linked() {
    let stock = Stock::start(&[]);
    let share = stock.share();
    let guest = stock.guest();
    let fuse = guest.fuse();
    let dir = fuse.mkdir(ROOT, "dir", 0o755).unwrap().nodeid;
    fs::write(share.join("a"), "A").unwrap();
    fs::write(share.join("b"), "B").unwrap();
    let a = fuse.lookup(ROOT, "a").unwrap().nodeid;
    fuse.rename(ROOT, "a", ROOT, "b", libc::RENAME_EXCHANGE).unwrap();
    assert_eq!(fs::read(share.join("a")).unwrap(), b"B");
    let taken = fuse.rename(ROOT, "a", ROOT, "b", libc::RENAME_NOREPLACE);
    assert_eq!(taken.unwrap_err().errno(), Some(Errno::EEXIST));
    fuse.rename(ROOT, "b", dir, "c", 0).unwrap();
    assert_eq!(fs::read(share.join("dir/c")).unwrap(), b"A");
    assert_eq!(fuse.link(a, ROOT, "d").unwrap().attr.nlink, 2);
    assert_eq!(fuse.getattr(a, None).unwrap().nlink, 2);
    let full = fuse.rmdir(ROOT, "dir").unwrap_err();
    assert_eq!(full.errno(), Some(Errno::ENOTEMPTY));
    fuse.unlink(dir, "c").unwrap();
    fuse.rmdir(ROOT, "dir").unwrap();
}

#[test]
fn special_files_and_symlinks_are_made() {
    let stock = Stock::start(&[]);
    symlink("/somewhere", stock.share().join("there")).unwrap();
    let guest = stock.guest();
    let fuse = guest.fuse();
    let there = fuse.lookup(ROOT, "there").unwrap().nodeid;
    assert_eq!(fuse.readlink(there).unwrap(), b"/somewhere");
    let link = fuse.symlink(ROOT, "link", "tar get").unwrap();
    assert_eq!(fuse.readlink(link.nodeid).unwrap(), b"tar get");
    let made = fs::read_link(stock.share().join("link")).unwrap();
    assert_eq!(made.to_str(), Some("tar get"));
    fuse.mknod(ROOT, "fifo", libc::S_IFIFO | 0o600, 0).unwrap();
    let fifo = fs::metadata(stock.share().join("fifo")).unwrap();
    assert!(fifo.file_type().is_fifo());
}

#[test]
fn attributes_are_set() {
    let stock = Stock::start(&[]);
    let path = stock.share().join("file");
    fs::write(&path, "0123456789").unwrap();
    let guest = stock.guest();
    let fuse = guest.fuse();
    let node = fuse.lookup(ROOT, "file").unwrap().nodeid;
    let set = SetAttr {
        mode: Some(0o4711),
        uid: Some(1000),
        gid: Some(1001),
        size: Some(4),
        mtime: Some((1_000_000_000, 5)),
        ..SetAttr::default()
    };
    let attr = fuse.setattr(node, &set).unwrap();
    assert_eq!((attr.size, attr.uid, attr.gid), (4, 1000, 1001));
    let host = fs::metadata(&path).unwrap();
    assert_eq!(host.len(), 4);
    assert_eq!(host.mtime(), 1_000_000_000);
    assert_eq!(host.permissions().mode() & 0o777, 0o711);
    let modified = host.modified().unwrap().duration_since(UNIX_EPOCH);
    assert_eq!(modified.unwrap(), Duration::new(1_000_000_000, 5));
    assert!(fuse.statfs(ROOT).unwrap().blocks > 0);
    fuse.syncfs(ROOT).unwrap();
    fuse.access(node, 0).unwrap();
}

#[test]
fn extended_attributes_are_set_and_removed() {
    let stock = Stock::start(&[]);
    let guest = stock.guest();
    let fuse = guest.fuse();
    let node = fuse.mkdir(ROOT, "dir", 0o755).unwrap().nodeid;
    fuse.setxattr(node, "user.one", b"1", libc::XATTR_CREATE).unwrap();
    let twice = fuse.setxattr(node, "user.one", b"2", libc::XATTR_CREATE);
    assert_eq!(twice.unwrap_err().errno(), Some(Errno::EEXIST));
    let large = vec![7; 2000];
    fuse.setxattr(node, "user.two", &large, 0).unwrap();
    assert_eq!(fuse.getxattr(node, "user.two").unwrap(), large);
    assert_eq!(fuse.getxattr_len(node, "user.two").unwrap(), 2000);
    let mut names = fuse.listxattr(node).unwrap();
    names.retain(|name| name.starts_with(b"user."));
    names.sort();
    assert_eq!(names, [b"user.one".to_vec(), b"user.two".to_vec()]);
    fuse.removexattr(node, "user.one").unwrap();
    let gone = fuse.getxattr(node, "user.one").unwrap_err();
    assert_eq!(gone.errno(), Some(Errno::ENODATA));
}

#[test]
fn holes_are_punched_found_and_copied() {
    let stock = Stock::start(&[]);
    let guest = stock.guest();
    let fuse = guest.fuse();
    let made = fuse.create(ROOT, "file", libc::O_RDWR, 0o600).unwrap();
    let (node, fh) = (made.entry.nodeid, made.open.fh);
    fuse.write(node, fh, 0, &[1; 65536], libc::O_RDWR).unwrap();
    let punch = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
    fuse.fallocate(node, fh, punch, 16384, 16384).unwrap();
    assert_eq!(fuse.lseek(node, fh, 0, libc::SEEK_HOLE).unwrap(), 16384);
    assert_eq!(fuse.lseek(node, fh, 16384, libc::SEEK_DATA).unwrap(), 32768);
    let other = fuse.create(ROOT, "copy", libc::O_RDWR, 0o600).unwrap();
    let to = (other.entry.nodeid, other.open.fh, 100);
    let copied = fuse.copy_file_range((node, fh, 10_000), to, 8192).unwrap();
    assert!(copied > 0);
    let back = fuse.read(to.0, to.1, 100, copied).unwrap();
    assert_eq!(back, fuse.read(node, fh, 10_000, copied).unwrap());
}

#[test]
fn files_belong_to_the_caller_and_its_groups_count() {
    let stock = Stock::start(&[]);
    let dir = stock.share().join("dir");
    fs::create_dir(&dir).unwrap();
    std::os::unix::fs::chown(&dir, Some(0), Some(3000)).unwrap();
    fs::set_permissions(&dir, fs::Permissions::from_mode(0o770)).unwrap();
    let guest = stock.guest();
    assert!(guest.fuse().has(InitFlags::CREATE_SUPP_GROUP));
    let caller = Caller { uid: 1000, gid: 1000, groups: vec![3000], umask: 0o077, ..Caller::default() };
    let user = guest.fuse().as_caller(caller.clone());
    let node = user.lookup(ROOT, "dir").unwrap().nodeid;
    user.create(node, "mine", libc::O_RDWR, 0o666).unwrap();
    let host = fs::metadata(dir.join("mine")).unwrap();
    assert_eq!((host.uid(), host.gid()), (1000, 1000));
    assert_eq!(host.mode() & 0o777, 0o600);
    let stranger = guest.fuse().as_caller(Caller { groups: Vec::new(), ..caller });
    let refused = stranger.create(node, "theirs", libc::O_RDWR, 0o666);
    assert_eq!(refused.unwrap_err().errno(), Some(Errno::EACCES));
}

#[test]
fn missing_features_of_stock_are_reported() {
    let stock = Stock::start(&[]);
    let guest = stock.guest();
    let refused = guest.fuse().tmpfile(ROOT, libc::O_RDWR, 0o600).unwrap_err();
    assert_eq!(refused.errno(), Some(Errno::ENOSYS));
}

#[test]
fn whole_files_are_accessed_by_path() {
    let stock = Stock::start(&[]);
    fs::create_dir_all(stock.share().join("a/b")).unwrap();
    let guest = stock.guest();
    let data = vec![9; 300_000];
    guest.fuse().write_file("a/b/c", &data).unwrap();
    assert_eq!(fs::read(stock.share().join("a/b/c")).unwrap(), data);
    assert_eq!(guest.fuse().read_file("a/b/c").unwrap(), data);
    assert_eq!(guest.fuse().list_directory("a/b").unwrap(), [b"c".to_vec()]);
    assert_eq!(guest.fuse().walk("a/x").unwrap_err().errno(), Some(Errno::ENOENT));
}
