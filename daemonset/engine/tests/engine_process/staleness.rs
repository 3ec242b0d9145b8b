//! Stale events: changes by the host to what the guest holds are counted once, by cause; changes by the guest are not.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::{Duration, Instant};

use testkit::fuse::client::Fuse;
use virtiofs_config::{Access, EngineConfig, InodeFileHandles};
use virtiofs_contract::staleness::Cause::{self, FdExhausted, Fenced, SourceRemoved, SourceReplaced};

use crate::fixture::{Fixture, ROOT, config, errno, walk};
use crate::mounted::Mounted;

/// Longer than the audit takes for the few names of a test on a busy machine.
const PATIENCE: Duration = Duration::from_secs(120);

fn descriptors() -> EngineConfig {
    EngineConfig { inode_file_handles: InodeFileHandles::Never, ..config() }
}

/// Waits until exactly these events are counted.
fn expect(fixture: &Fixture, expected: &[(Cause, u64)]) {
    let until = Instant::now() + PATIENCE;
    while fixture.stale() != expected && Instant::now() < until {
        std::thread::sleep(Duration::from_millis(20));
    }
    assert_eq!(fixture.stale(), expected, "{:?}", fixture.stale_events());
}

fn paths(fixture: &Fixture) -> Vec<String> {
    fixture.stale_events().into_iter().map(|event| event.path).collect()
}

/// Replaces a file by rename.
fn replace(path: &Path, contents: &str) {
    let beside = path.with_extension("new");
    fs::write(&beside, contents).unwrap();
    fs::rename(beside, path).unwrap();
}

fn make(fuse: &Fuse, name: &str) -> u64 {
    fuse.mknod(ROOT, name, libc::S_IFREG | 0o600, 0).unwrap().nodeid
}

#[test]
fn changes_by_others_are_counted_once_at_lookup() {
    for config in [config(), descriptors()] {
        let fixture = Fixture::new(config);
        fs::create_dir_all(fixture.path().join("d/sub")).unwrap();
        for name in ["d/replaced", "d/removed", "d/sub/deep", "moved", "kept"] {
            fixture.write(name, "old");
        }
        let fuse = fixture.guest.fuse();
        let held: Vec<_> =
            ["d/replaced", "d/removed", "d/sub/deep", "moved", "kept"].map(|p| walk(&fixture.guest, p)).into();
        let d = walk(&fixture.guest, "d");
        assert_eq!(fixture.stale(), []);

        replace(&fixture.path().join("d/replaced"), "new");
        fs::remove_file(fixture.path().join("d/removed")).unwrap();
        fs::rename(fixture.path().join("moved"), fixture.path().join("elsewhere")).unwrap();
        fs::remove_dir_all(fixture.path().join("d/sub")).unwrap();
        fs::create_dir(fixture.path().join("d/sub")).unwrap();
        for _ in 0..3 {
            assert_ne!(fuse.lookup(d, "replaced").unwrap().nodeid, held[0]);
            assert_eq!(errno(fuse.lookup(d, "removed")), Some(libc::ENOENT));
            assert_eq!(errno(fuse.lookup(ROOT, "moved")), Some(libc::ENOENT));
            assert_eq!(fuse.lookup(ROOT, "elsewhere").unwrap().nodeid, held[3]);
            fuse.lookup(d, "sub").unwrap();
            assert_eq!(fuse.lookup(ROOT, "kept").unwrap().nodeid, held[4]);
        }
        let events: Vec<_> = fixture.stale_events().into_iter().map(|event| (event.cause, event.path)).collect();
        let expected = [
            (SourceReplaced, "d/replaced"),
            (SourceRemoved, "d/removed"),
            (SourceRemoved, "moved"),
            (SourceReplaced, "d/sub"),
        ];
        assert_eq!(events, expected.map(|(cause, path)| (cause, path.to_owned())));
        assert_eq!(fixture.stale(), [(SourceReplaced, 2), (SourceRemoved, 2)]);
    }
}

/// Everything that a guest can do to its names, and what its caches do. None of it is counted, neither at once nor by the
/// audit. The host's change at the end shows that the audit has passed.
#[test]
fn changes_by_the_guest_are_not_counted() {
    let mut fixture = Fixture::new(config());
    let fuse = fixture.guest.fuse().clone();
    for name in ["unlinked", "renamed", "over", "linked", "left", "right", "forgotten", "open"] {
        make(&fuse, name);
    }
    fuse.unlink(ROOT, "unlinked").unwrap();
    make(&fuse, "unlinked");
    fuse.rename(ROOT, "renamed", ROOT, "over", 0).unwrap();
    fuse.rename(ROOT, "left", ROOT, "right", libc::RENAME_EXCHANGE).unwrap();
    let linked = walk(&fixture.guest, "linked");
    fuse.link(linked, ROOT, "second").unwrap();
    fuse.unlink(ROOT, "linked").unwrap();
    fuse.rename(ROOT, "second", ROOT, "third", 0).unwrap();
    let directory = fuse.mkdir(ROOT, "directory", 0o755).unwrap().nodeid;
    fuse.create(directory, "file", libc::O_RDWR, 0o600).unwrap();
    fuse.rename(ROOT, "directory", ROOT, "moved", 0).unwrap();
    fuse.mkdir(ROOT, "gone", 0o755).unwrap();
    fuse.rmdir(ROOT, "gone").unwrap();
    let forgotten = fuse.lookup(ROOT, "forgotten").unwrap().nodeid;
    fuse.forget(forgotten, 2).unwrap();
    fuse.lookup(ROOT, "forgotten").unwrap();
    let open = walk(&fixture.guest, "open");
    fuse.open(open, libc::O_RDWR).unwrap();
    fuse.unlink(ROOT, "open").unwrap();
    let stream = fuse.opendir(ROOT).unwrap();
    assert!(fuse.readdirplus(ROOT, stream.fh, 0, 65536).unwrap().len() > 8);
    fixture.kill();
    for name in ["unlinked", "over", "third", "left", "right", "forgotten", "moved/file"] {
        walk(&fixture.guest, name);
    }
    fixture.guest.fuse().getattr(open, None).unwrap();
    assert_eq!(fixture.stale(), []);

    fixture.write("last", "");
    fixture.guest.fuse().lookup(ROOT, "last").unwrap();
    fs::remove_file(fixture.path().join("last")).unwrap();
    expect(&fixture, &[(SourceRemoved, 1)]);
    assert_eq!(paths(&fixture), ["last"]);
}

/// A guest that caches names does not look them up again.
#[test]
fn stale_names_are_found_by_open_and_by_the_audit() {
    for config in [config(), descriptors()] {
        let fixture = Fixture::new(config);
        fs::create_dir_all(fixture.path().join("a/b")).unwrap();
        for name in ["a/b/opened", "a/b/left", "a/b/same"] {
            fixture.write(name, "old");
        }
        let nodes = ["a/b/opened", "a/b/left", "a/b/same"].map(|path| walk(&fixture.guest, path));
        replace(&fixture.path().join("a/b/opened"), "new");
        fs::remove_file(fixture.path().join("a/b/left")).unwrap();
        let fuse = fixture.guest.fuse();
        fuse.open(nodes[2], libc::O_RDONLY).unwrap();
        // It does not open any more, neither by file handle nor by descriptor.
        let _ = fuse.open(nodes[0], libc::O_RDONLY);
        expect(&fixture, &[(SourceReplaced, 1), (SourceRemoved, 1)]);
        assert_eq!(paths(&fixture)[0], "a/b/opened", "the next open comes before the walk");
        // It is not counted again at a lookup.
        assert_ne!(walk(&fixture.guest, "a/b/opened"), nodes[0]);
        assert_eq!(errno(fuse.lookup(walk(&fixture.guest, "a/b"), "left")), Some(libc::ENOENT));
        assert_eq!(fixture.stale(), [(SourceReplaced, 1), (SourceRemoved, 1)]);
    }
}

#[test]
fn an_open_below_a_replaced_directory_finds_it() {
    let fixture = Fixture::new(descriptors());
    fs::create_dir_all(fixture.path().join("top/middle")).unwrap();
    fixture.write("top/middle/file", "old");
    let node = walk(&fixture.guest, "top/middle/file");
    fs::rename(fixture.path().join("top"), fixture.path().join("aside")).unwrap();
    fs::create_dir_all(fixture.path().join("top/middle")).unwrap();
    fixture.write("top/middle/file", "new");
    fixture.guest.fuse().open(node, libc::O_RDONLY).unwrap();
    // The file itself has not moved: its directory is now called `aside`.
    expect(&fixture, &[(SourceReplaced, 1)]);
    assert_eq!(paths(&fixture), ["top"]);
}

#[test]
fn each_stale_hard_link_is_counted() {
    let fixture = Fixture::new(config());
    fixture.write("one", "contents");
    for name in ["two", "three"] {
        fs::hard_link(fixture.path().join("one"), fixture.path().join(name)).unwrap();
    }
    let nodes = ["one", "two", "three"].map(|name| walk(&fixture.guest, name));
    assert!(nodes.iter().all(|node| *node == nodes[0]));
    fs::remove_file(fixture.path().join("one")).unwrap();
    fixture.guest.fuse().open(nodes[0], libc::O_RDONLY).unwrap();
    expect(&fixture, &[(SourceRemoved, 1)]);
    replace(&fixture.path().join("two"), "another");
    assert_ne!(walk(&fixture.guest, "two"), nodes[0]);
    assert_eq!(fixture.stale(), [(SourceReplaced, 1), (SourceRemoved, 1)]);
    assert_eq!(walk(&fixture.guest, "three"), nodes[0]);
    assert_eq!(paths(&fixture), ["one", "two"]);
}

#[test]
fn a_replacement_of_the_engine_keeps_the_counts() {
    let mut fixture = Fixture::new(config());
    fs::create_dir(fixture.path().join("d")).unwrap();
    for name in ["d/before", "d/during", "d/kept"] {
        fixture.write(name, "x");
    }
    let [before, during, kept] = ["d/before", "d/during", "d/kept"].map(|path| walk(&fixture.guest, path));
    fs::remove_file(fixture.path().join("d/before")).unwrap();
    assert_eq!(errno(fixture.guest.fuse().lookup(walk(&fixture.guest, "d"), "before")), Some(libc::ENOENT));
    assert_eq!(fixture.stale(), [(SourceRemoved, 1)]);
    replace(&fixture.path().join("d/during"), "y");

    for _ in 0..3 {
        fixture.kill();
        let fuse = fixture.guest.fuse();
        fuse.getattr(kept, None).unwrap();
        assert_eq!(errno(fuse.getattr(before, None)), Some(libc::ESTALE), "no name leads to it");
        assert_eq!(errno(fuse.getattr(during, None)), Some(libc::ESTALE));
        assert_eq!(fixture.stale(), [(SourceReplaced, 1), (SourceRemoved, 1)], "found at the first lookup");
    }
}

#[test]
fn unknown_ids_are_fenced() {
    let fixture = Fixture::new(config());
    fixture.write("f", "x");
    let node = fixture.guest.fuse().lookup(ROOT, "f").unwrap().nodeid;
    fixture.guest.fuse().forget(node, 1).unwrap();
    for id in [node, 4711, (9 << 32) | 1, u64::MAX] {
        assert_eq!(errno(fixture.guest.fuse().getattr(id, None)), Some(libc::ESTALE));
    }
    assert_eq!(fixture.stale(), [(Fenced, 4)]);
    assert_eq!(paths(&fixture), ["", "", "", ""]);
}

#[test]
fn missing_descriptors_are_counted() {
    let fixture = Fixture::new(EngineConfig { open_files: Some(400), ..descriptors() });
    for n in 0..400 {
        fixture.write(&format!("f{n}"), "");
    }
    let refused = (0..400).filter(|n| errno(fixture.guest.fuse().lookup(ROOT, format!("f{n}"))).is_some()).count();
    assert!((1..400).contains(&refused), "{refused} of 400");
    assert_eq!(fixture.stale(), [(FdExhausted, refused as u64)]);
    let event = fixture.stale_events().pop().unwrap();
    assert_eq!((event.cause, event.path.as_str()), (FdExhausted, "f399"));
}

/// Another limit with the same error number: nothing becomes stale by it.
#[test]
fn the_inode_limit_is_not_counted_as_missing_descriptors() {
    let fixture = Fixture::new(EngineConfig { max_inodes: 2, ..config() });
    let fuse = fixture.guest.fuse();
    for name in ["a", "b", "c"] {
        fixture.write(name, "");
    }
    let held = [fuse.lookup(ROOT, "a").unwrap().nodeid, fuse.lookup(ROOT, "b").unwrap().nodeid];
    assert_eq!(errno(fuse.lookup(ROOT, "c")), Some(libc::ENFILE));
    assert_eq!([fuse.lookup(ROOT, "a").unwrap().nodeid, fuse.lookup(ROOT, "b").unwrap().nodeid], held);
    assert_eq!(fixture.stale(), []);
}

#[test]
fn nothing_is_counted_with_detection_off() {
    let fixture = Fixture::new(EngineConfig { detect_staleness: false, ..config() });
    fixture.write("f", "x");
    fixture.guest.fuse().lookup(ROOT, "f").unwrap();
    replace(&fixture.path().join("f"), "y");
    fixture.guest.fuse().lookup(ROOT, "f").unwrap();
    assert_eq!(errno(fixture.guest.fuse().getattr(4711, None)), Some(libc::ESTALE));
    assert_eq!(fixture.stale(), []);
}

/// Two file systems whose inodes have the same numbers: nodes of one are not nodes of the other.
#[test]
fn nodes_of_another_root_are_stale() {
    let directory = tempfile::tempdir().unwrap();
    let mounts = ["old", "new"].map(|name| Mounted::tmpfs(&directory.path().join(name)));
    for (mount, contents) in mounts.iter().zip(["old", "new"]) {
        fs::create_dir(mount.0.join("d")).unwrap();
        fs::write(mount.0.join("d/file"), contents).unwrap();
    }
    fs::write(mounts[0].0.join("only"), "").unwrap();
    let number = |mount: &Mounted| fs::metadata(mount.0.join("d/file")).unwrap().ino();
    assert_eq!(number(&mounts[0]), number(&mounts[1]), "the inode numbers are the same");

    for access in [Access::ReadWrite, Access::ReadOnly] {
        let config = || EngineConfig { access, ..config() };
        let beside = tempfile::tempdir().unwrap();
        let mut fixture = Fixture::on(beside, mounts[0].0.clone(), config());
        let old = ["d", "d/file", "only"].map(|path| walk(&fixture.guest, path));
        let open = fixture.guest.fuse().open(old[1], libc::O_RDONLY).unwrap().fh;

        fixture.kill_and_serve(&mounts[1].0, config());
        let fuse = fixture.guest.fuse();
        for node in old {
            assert_eq!(errno(fuse.getattr(node, None)), Some(libc::ESTALE));
        }
        assert_eq!(errno(fuse.read(old[1], open, 0, 10)), Some(libc::ESTALE));
        let file = walk(&fixture.guest, "d/file");
        assert_ne!(file, old[1]);
        let fh = fuse.open(file, libc::O_RDONLY).unwrap().fh;
        assert_eq!(fuse.read(file, fh, 0, 10).unwrap(), b"new");
        assert_eq!(errno(fuse.lookup(ROOT, "only")), Some(libc::ENOENT));
        fuse.getattr(ROOT, None).unwrap();

        // Also under the next engine of the same root.
        fixture.kill_and_use(config());
        let fuse = fixture.guest.fuse();
        assert_eq!(walk(&fixture.guest, "d/file"), file);
        assert_eq!(fuse.read(file, fh, 0, 10).unwrap(), b"new");
        assert_eq!(errno(fuse.getattr(old[1], None)), Some(libc::ESTALE));
        assert_eq!(
            fixture.stale(),
            [],
            "an exchange is not the source's fault: that its root is another one is counted once"
        );
        fuse.forget(old[1], 1).unwrap();
        fuse.release(old[1], open, 0).unwrap();
    }
}
