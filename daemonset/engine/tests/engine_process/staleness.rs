//! Stale events: what the host does to what a guest holds is counted, once, by its cause; what the guest does is not.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::{Duration, Instant};

use testkit::fuse::client::Fuse;
use virtiofs_config::{Access, EngineConfig, InodeFileHandles};
use virtiofs_contract::staleness::Cause::{self, FdExhausted, Fenced, SourceRemoved, SourceReplaced};

use crate::bench::{Bench, ROOT, config, errno, walk};
use crate::mounted::Mounted;

/// Longer than the audit takes for the few names of a test, however busy the machine is.
const PATIENCE: Duration = Duration::from_secs(120);

fn descriptors() -> EngineConfig {
    EngineConfig { inode_file_handles: InodeFileHandles::Never, ..config() }
}

/// Waits until the events are these, and no others.
fn expect(bench: &Bench, expected: &[(Cause, u64)]) {
    let until = Instant::now() + PATIENCE;
    while bench.stale() != expected && Instant::now() < until {
        std::thread::sleep(Duration::from_millis(20));
    }
    assert_eq!(bench.stale(), expected, "{:?}", bench.stale_events());
}

fn paths(bench: &Bench) -> Vec<String> {
    bench.stale_events().into_iter().map(|event| event.path).collect()
}

/// Writes a file anew, as careful programs do.
fn replace(path: &Path, contents: &str) {
    let beside = path.with_extension("new");
    fs::write(&beside, contents).unwrap();
    fs::rename(beside, path).unwrap();
}

fn make(fuse: &Fuse, name: &str) -> u64 {
    fuse.mknod(ROOT, name, libc::S_IFREG | 0o600, 0).unwrap().nodeid
}

#[test]
fn what_others_do_to_a_held_name_is_counted_once_when_it_is_looked_up() {
    for config in [config(), descriptors()] {
        let bench = Bench::new(config);
        fs::create_dir_all(bench.path().join("d/sub")).unwrap();
        for name in ["d/replaced", "d/removed", "d/sub/deep", "moved", "kept"] {
            bench.write(name, "old");
        }
        let fuse = bench.guest.fuse();
        let held: Vec<_> =
            ["d/replaced", "d/removed", "d/sub/deep", "moved", "kept"].map(|p| walk(&bench.guest, p)).into();
        let d = walk(&bench.guest, "d");
        assert_eq!(bench.stale(), []);

        replace(&bench.path().join("d/replaced"), "new");
        fs::remove_file(bench.path().join("d/removed")).unwrap();
        fs::rename(bench.path().join("moved"), bench.path().join("elsewhere")).unwrap();
        fs::remove_dir_all(bench.path().join("d/sub")).unwrap();
        fs::create_dir(bench.path().join("d/sub")).unwrap();
        for _ in 0..3 {
            assert_ne!(fuse.lookup(d, "replaced").unwrap().nodeid, held[0]);
            assert_eq!(errno(fuse.lookup(d, "removed")), Some(libc::ENOENT));
            assert_eq!(errno(fuse.lookup(ROOT, "moved")), Some(libc::ENOENT));
            assert_eq!(fuse.lookup(ROOT, "elsewhere").unwrap().nodeid, held[3]);
            fuse.lookup(d, "sub").unwrap();
            assert_eq!(fuse.lookup(ROOT, "kept").unwrap().nodeid, held[4]);
        }
        let events: Vec<_> = bench.stale_events().into_iter().map(|event| (event.cause, event.path)).collect();
        let expected = [
            (SourceReplaced, "d/replaced"),
            (SourceRemoved, "d/removed"),
            (SourceRemoved, "moved"),
            (SourceReplaced, "d/sub"),
        ];
        assert_eq!(events, expected.map(|(cause, path)| (cause, path.to_owned())));
        assert_eq!(bench.stale(), [(SourceReplaced, 2), (SourceRemoved, 2)]);
    }
}

/// Everything a guest can do to its own names, and what its caches do. Neither at once nor in the audit is any of
/// it counted; the host's change at the end shows that the audit has passed.
#[test]
fn what_the_guest_does_itself_is_not_counted() {
    let mut bench = Bench::new(config());
    let fuse = bench.guest.fuse().clone();
    for name in ["unlinked", "renamed", "over", "linked", "left", "right", "forgotten", "open"] {
        make(&fuse, name);
    }
    fuse.unlink(ROOT, "unlinked").unwrap();
    make(&fuse, "unlinked");
    fuse.rename(ROOT, "renamed", ROOT, "over", 0).unwrap();
    fuse.rename(ROOT, "left", ROOT, "right", libc::RENAME_EXCHANGE).unwrap();
    let linked = walk(&bench.guest, "linked");
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
    let open = walk(&bench.guest, "open");
    fuse.open(open, libc::O_RDWR).unwrap();
    fuse.unlink(ROOT, "open").unwrap();
    let stream = fuse.opendir(ROOT).unwrap();
    assert!(fuse.readdirplus(ROOT, stream.fh, 0, 65536).unwrap().len() > 8);
    bench.kill();
    for name in ["unlinked", "over", "third", "left", "right", "forgotten", "moved/file"] {
        walk(&bench.guest, name);
    }
    bench.guest.fuse().getattr(open, None).unwrap();
    assert_eq!(bench.stale(), []);

    bench.write("last", "");
    bench.guest.fuse().lookup(ROOT, "last").unwrap();
    fs::remove_file(bench.path().join("last")).unwrap();
    expect(&bench, &[(SourceRemoved, 1)]);
    assert_eq!(paths(&bench), ["last"]);
}

/// A guest that caches names asks for none of them again.
#[test]
fn an_open_by_a_cached_name_is_enough_and_so_is_time() {
    for config in [config(), descriptors()] {
        let bench = Bench::new(config);
        fs::create_dir_all(bench.path().join("a/b")).unwrap();
        for name in ["a/b/opened", "a/b/left", "a/b/same"] {
            bench.write(name, "old");
        }
        let nodes = ["a/b/opened", "a/b/left", "a/b/same"].map(|path| walk(&bench.guest, path));
        replace(&bench.path().join("a/b/opened"), "new");
        fs::remove_file(bench.path().join("a/b/left")).unwrap();
        let fuse = bench.guest.fuse();
        fuse.open(nodes[2], libc::O_RDONLY).unwrap();
        // By its file handle it does not open any more, by its descriptor it does: stale it is both ways.
        let _ = fuse.open(nodes[0], libc::O_RDONLY);
        expect(&bench, &[(SourceReplaced, 1), (SourceRemoved, 1)]);
        assert_eq!(paths(&bench)[0], "a/b/opened", "the next open comes before the walk");
        // What was counted is not counted again by whoever looks.
        assert_ne!(walk(&bench.guest, "a/b/opened"), nodes[0]);
        assert_eq!(errno(fuse.lookup(walk(&bench.guest, "a/b"), "left")), Some(libc::ENOENT));
        assert_eq!(bench.stale(), [(SourceReplaced, 1), (SourceRemoved, 1)]);
    }
}

#[test]
fn a_directory_that_was_replaced_is_found_by_an_open_below_it() {
    let bench = Bench::new(descriptors());
    fs::create_dir_all(bench.path().join("top/middle")).unwrap();
    bench.write("top/middle/file", "old");
    let node = walk(&bench.guest, "top/middle/file");
    fs::rename(bench.path().join("top"), bench.path().join("aside")).unwrap();
    fs::create_dir_all(bench.path().join("top/middle")).unwrap();
    bench.write("top/middle/file", "new");
    bench.guest.fuse().open(node, libc::O_RDONLY).unwrap();
    // The file itself stands where it stood, below what is now called `aside`.
    expect(&bench, &[(SourceReplaced, 1)]);
    assert_eq!(paths(&bench), ["top"]);
}

#[test]
fn a_file_of_several_names_loses_them_one_by_one() {
    let bench = Bench::new(config());
    bench.write("one", "contents");
    for name in ["two", "three"] {
        fs::hard_link(bench.path().join("one"), bench.path().join(name)).unwrap();
    }
    let nodes = ["one", "two", "three"].map(|name| walk(&bench.guest, name));
    assert!(nodes.iter().all(|node| *node == nodes[0]));
    fs::remove_file(bench.path().join("one")).unwrap();
    bench.guest.fuse().open(nodes[0], libc::O_RDONLY).unwrap();
    expect(&bench, &[(SourceRemoved, 1)]);
    replace(&bench.path().join("two"), "another");
    assert_ne!(walk(&bench.guest, "two"), nodes[0]);
    assert_eq!(bench.stale(), [(SourceReplaced, 1), (SourceRemoved, 1)]);
    assert_eq!(walk(&bench.guest, "three"), nodes[0]);
    assert_eq!(paths(&bench), ["one", "two"]);
}

#[test]
fn an_exchange_is_nobodys_fault_and_counts_go_on() {
    let mut bench = Bench::new(config());
    fs::create_dir(bench.path().join("d")).unwrap();
    for name in ["d/before", "d/during", "d/kept"] {
        bench.write(name, "x");
    }
    let [before, during, kept] = ["d/before", "d/during", "d/kept"].map(|path| walk(&bench.guest, path));
    fs::remove_file(bench.path().join("d/before")).unwrap();
    assert_eq!(errno(bench.guest.fuse().lookup(walk(&bench.guest, "d"), "before")), Some(libc::ENOENT));
    assert_eq!(bench.stale(), [(SourceRemoved, 1)]);
    replace(&bench.path().join("d/during"), "y");

    for _ in 0..3 {
        bench.kill();
        let fuse = bench.guest.fuse();
        fuse.getattr(kept, None).unwrap();
        assert_eq!(errno(fuse.getattr(before, None)), Some(libc::ESTALE), "no name leads to it");
        assert_eq!(errno(fuse.getattr(during, None)), Some(libc::ESTALE));
        assert_eq!(bench.stale(), [(SourceReplaced, 1), (SourceRemoved, 1)], "found by the first that looked");
    }
}

#[test]
fn numbers_that_mean_nothing_are_fenced() {
    let bench = Bench::new(config());
    bench.write("f", "x");
    let node = bench.guest.fuse().lookup(ROOT, "f").unwrap().nodeid;
    bench.guest.fuse().forget(node, 1).unwrap();
    for id in [node, 4711, (9 << 32) | 1, u64::MAX] {
        assert_eq!(errno(bench.guest.fuse().getattr(id, None)), Some(libc::ESTALE));
    }
    assert_eq!(bench.stale(), [(Fenced, 4)]);
    assert_eq!(paths(&bench), ["", "", "", ""]);
}

#[test]
fn a_guest_that_holds_more_than_there_are_descriptors_is_counted() {
    let bench = Bench::new(EngineConfig { open_files: Some(400), ..descriptors() });
    for n in 0..400 {
        bench.write(&format!("f{n}"), "");
    }
    let refused = (0..400).filter(|n| errno(bench.guest.fuse().lookup(ROOT, format!("f{n}"))).is_some()).count();
    assert!((1..400).contains(&refused), "{refused} of 400");
    assert_eq!(bench.stale(), [(FdExhausted, refused as u64)]);
    let event = bench.stale_events().pop().unwrap();
    assert_eq!((event.cause, event.path.as_str()), (FdExhausted, "f399"));
}

/// Another limit with the same errno, which no file handles cure: nothing that is held becomes stale by it.
#[test]
fn a_guest_that_may_hold_no_more_inodes_is_not_short_of_descriptors() {
    let bench = Bench::new(EngineConfig { max_inodes: 2, ..config() });
    let fuse = bench.guest.fuse();
    for name in ["a", "b", "c"] {
        bench.write(name, "");
    }
    let held = [fuse.lookup(ROOT, "a").unwrap().nodeid, fuse.lookup(ROOT, "b").unwrap().nodeid];
    assert_eq!(errno(fuse.lookup(ROOT, "c")), Some(libc::ENFILE));
    assert_eq!([fuse.lookup(ROOT, "a").unwrap().nodeid, fuse.lookup(ROOT, "b").unwrap().nodeid], held);
    assert_eq!(bench.stale(), []);
}

#[test]
fn with_detection_off_nothing_is_counted() {
    let bench = Bench::new(EngineConfig { detect_staleness: false, ..config() });
    bench.write("f", "x");
    bench.guest.fuse().lookup(ROOT, "f").unwrap();
    replace(&bench.path().join("f"), "y");
    bench.guest.fuse().lookup(ROOT, "f").unwrap();
    assert_eq!(errno(bench.guest.fuse().getattr(4711, None)), Some(libc::ESTALE));
    assert_eq!(bench.stale(), []);
}

/// Two file systems whose inodes have the same numbers: what the guest was told of the one is nothing of the other.
#[test]
fn on_another_root_the_guest_finds_its_way_anew() {
    let directory = tempfile::tempdir().unwrap();
    let mounts = ["old", "new"].map(|name| Mounted::tmpfs(&directory.path().join(name)));
    for (mount, contents) in mounts.iter().zip(["old", "new"]) {
        fs::create_dir(mount.0.join("d")).unwrap();
        fs::write(mount.0.join("d/file"), contents).unwrap();
    }
    fs::write(mounts[0].0.join("only"), "").unwrap();
    let number = |mount: &Mounted| fs::metadata(mount.0.join("d/file")).unwrap().ino();
    assert_eq!(number(&mounts[0]), number(&mounts[1]), "the numbers alone tell nothing");

    for access in [Access::ReadWrite, Access::ReadOnly] {
        let config = || EngineConfig { access, ..config() };
        let beside = tempfile::tempdir().unwrap();
        let mut bench = Bench::on(beside, mounts[0].0.clone(), config());
        let old = ["d", "d/file", "only"].map(|path| walk(&bench.guest, path));
        let open = bench.guest.fuse().open(old[1], libc::O_RDONLY).unwrap().fh;

        bench.kill_and_serve(&mounts[1].0, config());
        let fuse = bench.guest.fuse();
        for node in old {
            assert_eq!(errno(fuse.getattr(node, None)), Some(libc::ESTALE));
        }
        assert_eq!(errno(fuse.read(old[1], open, 0, 10)), Some(libc::ESTALE));
        let file = walk(&bench.guest, "d/file");
        assert_ne!(file, old[1]);
        let fh = fuse.open(file, libc::O_RDONLY).unwrap().fh;
        assert_eq!(fuse.read(file, fh, 0, 10).unwrap(), b"new");
        assert_eq!(errno(fuse.lookup(ROOT, "only")), Some(libc::ENOENT));
        fuse.getattr(ROOT, None).unwrap();

        // And it stays so under the next engine of the same root.
        bench.kill_and_use(config());
        let fuse = bench.guest.fuse();
        assert_eq!(walk(&bench.guest, "d/file"), file);
        assert_eq!(fuse.read(file, fh, 0, 10).unwrap(), b"new");
        assert_eq!(errno(fuse.getattr(old[1], None)), Some(libc::ESTALE));
        assert_eq!(
            bench.stale(),
            [],
            "an exchange is not the source's fault: that its root is another one is counted once"
        );
        fuse.forget(old[1], 1).unwrap();
        fuse.release(old[1], open, 0).unwrap();
    }
}
