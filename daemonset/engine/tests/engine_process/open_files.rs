//! Open files stay usable whatever other processes do to their names, and are released when the guest closes them.

use std::fs;

use virtiofs_config::{EngineConfig, InodeFileHandles};

use crate::fixture::{Fixture, ROOT, config, errno};
use crate::replacement::expect_stashed;

fn open(fixture: &Fixture, name: &str) -> (u64, u64) {
    let node = fixture.guest.fuse().lookup(ROOT, name).unwrap().nodeid;
    (node, fixture.guest.fuse().open(node, libc::O_RDWR).unwrap().fh)
}

#[test]
fn removed_open_files_survive_a_hand_over() {
    let mut fixture = Fixture::new(config());
    for name in ["removed", "replaced", "kept"] {
        fixture.write(name, name);
    }
    let files = ["removed", "replaced", "kept"].map(|name| (name, open(&fixture, name)));
    fs::remove_file(fixture.path().join("removed")).unwrap();
    fixture.write("new", "another file");
    fs::rename(fixture.path().join("new"), fixture.path().join("replaced")).unwrap();

    for _ in 0..2 {
        fixture.hand_over();
        expect_stashed(&mut fixture, 2);
        for (name, (node, fh)) in files {
            assert_eq!(fixture.guest.fuse().read(node, fh, 0, 100).unwrap(), name.as_bytes(), "{name}");
        }
    }
    for (_, (node, fh)) in files {
        fixture.guest.fuse().release(node, fh, 0).unwrap();
    }
    expect_stashed(&mut fixture, 0);
}

#[test]
fn removed_open_files_survive_a_kill_once_noticed() {
    let mut fixture = Fixture::new(config());
    for name in ["asked by name", "asked by node", "name taken"] {
        fixture.write(name, name);
    }
    let files = ["asked by name", "asked by node", "name taken"].map(|name| (name, open(&fixture, name)));
    for (name, _) in files {
        fs::remove_file(fixture.path().join(name)).unwrap();
    }
    fixture.write("name taken", "another file");
    assert_eq!(errno(fixture.guest.fuse().lookup(ROOT, "asked by name")), Some(libc::ENOENT));
    assert_eq!(fixture.guest.fuse().getattr(files[1].1.0, None).unwrap().nlink, 0);
    fixture.guest.fuse().lookup(ROOT, "name taken").unwrap();

    fixture.kill();

    for (name, (node, fh)) in files {
        assert_eq!(fixture.guest.fuse().read(node, fh, 0, 100).unwrap(), name.as_bytes(), "{name}");
    }
}

#[test]
fn any_engine_releases_a_stashed_file() {
    // Each file is stashed when it is opened.
    let config = || EngineConfig { inode_file_handles: InodeFileHandles::Never, ..config() };
    let mut fixture = Fixture::new(config());
    fixture.write("f", "contents");
    let (node, fh) = open(&fixture, "f");
    expect_stashed(&mut fixture, 1);
    fixture.kill_and_use(config());
    assert_eq!(fixture.guest.fuse().read(node, fh, 0, 100).unwrap(), b"contents");
    fixture.guest.fuse().release(node, fh, 0).unwrap();
    expect_stashed(&mut fixture, 0);
}

#[test]
fn a_file_stashed_for_a_failed_unlink_is_released() {
    let mut fixture = Fixture::new(config());
    fixture.write("f", "contents");
    let (node, fh) = open(&fixture, "f");
    assert_eq!(errno(fixture.guest.fuse().rmdir(ROOT, "f")), Some(libc::ENOTDIR));
    fixture.kill();
    assert_eq!(fixture.guest.fuse().read(node, fh, 0, 100).unwrap(), b"contents");
    fixture.guest.fuse().release(node, fh, 0).unwrap();
    expect_stashed(&mut fixture, 0);
}

#[test]
fn the_last_link_is_recognised_after_a_move_by_the_host() {
    let mut fixture = Fixture::new(config());
    for (name, moved) in [("unlinked", "unlinked there"), ("covered", "covered there")] {
        fixture.write(name, name);
        fs::write(fixture.path().join(format!("{name} by")), "another file").unwrap();
        let (node, fh) = open(&fixture, name);
        fs::rename(fixture.path().join(name), fixture.path().join(moved)).unwrap();
        assert_eq!(fixture.guest.fuse().lookup(ROOT, moved).unwrap().nodeid, node);
        if name == "unlinked" {
            fixture.guest.fuse().unlink(ROOT, moved).unwrap();
        } else {
            fixture.guest.fuse().lookup(ROOT, "covered by").unwrap();
            fixture.guest.fuse().rename(ROOT, "covered by", ROOT, moved, 0).unwrap();
        }
        fixture.kill();
        assert_eq!(fixture.guest.fuse().read(node, fh, 0, 100).unwrap(), name.as_bytes(), "{name}");
        fixture.guest.fuse().release(node, fh, 0).unwrap();
    }
    expect_stashed(&mut fixture, 0);
}

#[test]
fn opens_of_orphaned_files_leave_descriptors_for_the_engine() {
    // The library counts files that are opened by name; this limit leaves descriptors for it.
    let few = || EngineConfig { open_files: Some(500), ..config() };
    let mut fixture = Fixture::new(few());
    fixture.write("kept", "contents");
    let gone = fixture.guest.fuse().create(ROOT, "gone", libc::O_RDWR, 0o600).unwrap();
    fixture.guest.fuse().unlink(ROOT, "gone").unwrap();
    fixture.kill_and_use(few());
    let node = gone.entry.nodeid;
    // A thread that may come by a cached name is refused once.
    assert_eq!(errno(fixture.guest.fuse().open(node, libc::O_RDWR)), Some(libc::ESTALE));
    let opened: Vec<u64> = std::iter::from_fn(|| fixture.guest.fuse().open(node, libc::O_RDWR).ok())
        .map(|open| open.fh)
        .take(500)
        .collect();
    assert!((200..500).contains(&opened.len()), "{}", opened.len());
    assert_eq!(errno(fixture.guest.fuse().open(node, libc::O_RDWR)), Some(libc::ENFILE));
    let (kept, fh) = open(&fixture, "kept");
    assert_eq!(fixture.guest.fuse().read(kept, fh, 0, 100).unwrap(), b"contents", "others can still be opened");
    for fh in opened.into_iter().chain([gone.open.fh]) {
        fixture.guest.fuse().release(node, fh, 0).unwrap();
    }
    expect_stashed(&mut fixture, 0);
}

/// Without `directIo` the host's file is an ordinary one, whatever the guest opens it with, before and after another
/// engine opens it again.
#[test]
fn direct_io_that_is_off_is_off_for_created_files_too() {
    let mut fixture = Fixture::new(config());
    let contents = vec![b'x'; 5000];
    let flags = libc::O_RDWR | libc::O_DIRECT;
    let made = fixture.guest.fuse().create(ROOT, "made", flags | libc::O_EXCL, 0o600).unwrap();
    fixture.write("found", "");
    let found = fixture.guest.fuse().lookup(ROOT, "found").unwrap().nodeid;
    let opened = fixture.guest.fuse().open(found, flags).unwrap();
    let files = [(made.entry.nodeid, made.open.fh), (found, opened.fh)];
    for round in 0..2 {
        for (node, fh) in files {
            assert_eq!(fixture.guest.fuse().write(node, fh, 1, &contents, flags).unwrap(), 5000, "round {round}");
        }
        fixture.kill();
    }
}
