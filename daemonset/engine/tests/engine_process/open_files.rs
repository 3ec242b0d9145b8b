//! What the guest has open goes on, whatever others do to its names, and is let go of when the guest closes it.

use std::fs;

use virtiofs_config::{EngineConfig, InodeFileHandles};

use crate::bench::{Bench, ROOT, config, errno};
use crate::succession::expect_parked;

fn open(bench: &Bench, name: &str) -> (u64, u64) {
    let node = bench.guest.fuse().lookup(ROOT, name).unwrap().nodeid;
    (node, bench.guest.fuse().open(node, libc::O_RDWR).unwrap().fh)
}

#[test]
fn what_others_remove_goes_on_when_engines_are_exchanged_at_rest() {
    let mut bench = Bench::new(config());
    for name in ["removed", "replaced", "kept"] {
        bench.write(name, name);
    }
    let files = ["removed", "replaced", "kept"].map(|name| (name, open(&bench, name)));
    fs::remove_file(bench.path().join("removed")).unwrap();
    bench.write("new", "another file");
    fs::rename(bench.path().join("new"), bench.path().join("replaced")).unwrap();

    for _ in 0..2 {
        bench.hand_over();
        expect_parked(&mut bench, 2);
        for (name, (node, fh)) in files {
            assert_eq!(bench.guest.fuse().read(node, fh, 0, 100).unwrap(), name.as_bytes(), "{name}");
        }
    }
    for (_, (node, fh)) in files {
        bench.guest.fuse().release(node, fh, 0).unwrap();
    }
    expect_parked(&mut bench, 0);
}

#[test]
fn what_others_remove_outlives_a_kill_once_the_engine_has_noticed() {
    let mut bench = Bench::new(config());
    for name in ["asked by name", "asked by node", "name taken"] {
        bench.write(name, name);
    }
    let files = ["asked by name", "asked by node", "name taken"].map(|name| (name, open(&bench, name)));
    for (name, _) in files {
        fs::remove_file(bench.path().join(name)).unwrap();
    }
    bench.write("name taken", "another file");
    assert_eq!(errno(bench.guest.fuse().lookup(ROOT, "asked by name")), Some(libc::ENOENT));
    assert_eq!(bench.guest.fuse().getattr(files[1].1.0, None).unwrap().nlink, 0);
    bench.guest.fuse().lookup(ROOT, "name taken").unwrap();

    bench.kill();

    for (name, (node, fh)) in files {
        assert_eq!(bench.guest.fuse().read(node, fh, 0, 100).unwrap(), name.as_bytes(), "{name}");
    }
}

#[test]
fn a_parked_file_is_given_back_by_whichever_engine_closes_it() {
    // Each file is parked when it is opened.
    let config = || EngineConfig { inode_file_handles: InodeFileHandles::Never, ..config() };
    let mut bench = Bench::new(config());
    bench.write("f", "contents");
    let (node, fh) = open(&bench, "f");
    expect_parked(&mut bench, 1);
    bench.kill_and_use(config());
    assert_eq!(bench.guest.fuse().read(node, fh, 0, 100).unwrap(), b"contents");
    bench.guest.fuse().release(node, fh, 0).unwrap();
    expect_parked(&mut bench, 0);
}

#[test]
fn a_file_parked_for_an_unlink_that_was_refused_is_given_back() {
    let mut bench = Bench::new(config());
    bench.write("f", "contents");
    let (node, fh) = open(&bench, "f");
    assert_eq!(errno(bench.guest.fuse().rmdir(ROOT, "f")), Some(libc::ENOTDIR));
    bench.kill();
    assert_eq!(bench.guest.fuse().read(node, fh, 0, 100).unwrap(), b"contents");
    bench.guest.fuse().release(node, fh, 0).unwrap();
    expect_parked(&mut bench, 0);
}

#[test]
fn a_name_that_others_have_moved_does_not_hide_that_the_last_one_goes() {
    let mut bench = Bench::new(config());
    for (name, moved) in [("unlinked", "unlinked there"), ("covered", "covered there")] {
        bench.write(name, name);
        fs::write(bench.path().join(format!("{name} by")), "another file").unwrap();
        let (node, fh) = open(&bench, name);
        fs::rename(bench.path().join(name), bench.path().join(moved)).unwrap();
        assert_eq!(bench.guest.fuse().lookup(ROOT, moved).unwrap().nodeid, node);
        if name == "unlinked" {
            bench.guest.fuse().unlink(ROOT, moved).unwrap();
        } else {
            bench.guest.fuse().lookup(ROOT, "covered by").unwrap();
            bench.guest.fuse().rename(ROOT, "covered by", ROOT, moved, 0).unwrap();
        }
        bench.kill();
        assert_eq!(bench.guest.fuse().read(node, fh, 0, 100).unwrap(), name.as_bytes(), "{name}");
        bench.guest.fuse().release(node, fh, 0).unwrap();
    }
    expect_parked(&mut bench, 0);
}

#[test]
fn files_without_a_name_are_not_opened_until_the_engine_has_no_descriptor_left() {
    // What is opened by name is counted by the library, and this is what is left for it.
    let few = || EngineConfig { open_files: Some(500), ..config() };
    let mut bench = Bench::new(few());
    bench.write("kept", "contents");
    let gone = bench.guest.fuse().create(ROOT, "gone", libc::O_RDWR, 0o600).unwrap();
    bench.guest.fuse().unlink(ROOT, "gone").unwrap();
    bench.kill_and_use(few());
    let node = gone.entry.nodeid;
    let opened: Vec<u64> =
        std::iter::from_fn(|| bench.guest.fuse().open(node, libc::O_RDWR).ok()).map(|open| open.fh).take(500).collect();
    assert!((200..500).contains(&opened.len()), "{}", opened.len());
    assert_eq!(errno(bench.guest.fuse().open(node, libc::O_RDWR)), Some(libc::ENFILE));
    let (kept, fh) = open(&bench, "kept");
    assert_eq!(bench.guest.fuse().read(kept, fh, 0, 100).unwrap(), b"contents", "others can still be opened");
    for fh in opened.into_iter().chain([gone.open.fh]) {
        bench.guest.fuse().release(node, fh, 0).unwrap();
    }
    expect_parked(&mut bench, 0);
}
