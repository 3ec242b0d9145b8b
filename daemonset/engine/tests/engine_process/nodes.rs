//! What a node's id means to the guest, whatever others do to its names, and up to the limit.

use std::fs;

use virtiofs_config::EngineConfig;

use crate::bench::{Bench, ROOT, config, errno, walk};

#[test]
fn a_node_is_found_below_a_directory_that_was_moved_and_moved_back() {
    let mut bench = Bench::new(config());
    fs::create_dir(bench.path().join("d")).unwrap();
    bench.write("d/f", "contents");
    let file = walk(&bench.guest, "d/f");
    let at = |name: &str| bench.path().join(name);
    fs::rename(at("d"), at("e")).unwrap();
    walk(&bench.guest, "e");
    fs::rename(at("e"), at("d")).unwrap();
    bench.kill();
    assert_eq!(bench.guest.fuse().getattr(file, None).unwrap().size, 8);
}

#[test]
fn names_that_lead_in_a_circle_lead_nowhere() {
    let mut bench = Bench::new(config());
    fs::create_dir_all(bench.path().join("p/d")).unwrap();
    let (p, d) = (walk(&bench.guest, "p"), walk(&bench.guest, "p/d"));
    let rename = |bench: &Bench, from: &str, to: &str| fs::rename(bench.path().join(from), bench.path().join(to));
    rename(&bench, "p/d", "d").unwrap();
    rename(&bench, "p", "d/p").unwrap();
    assert_eq!([walk(&bench.guest, "d"), walk(&bench.guest, "d/p")], [d, p]);
    rename(&bench, "d", "elsewhere").unwrap();
    bench.kill();
    for node in [p, d] {
        assert_eq!(errno(bench.guest.fuse().getattr(node, None)), Some(libc::ESTALE));
    }
    walk(&bench.guest, "elsewhere/p");
}

#[test]
fn two_nodes_of_one_file_are_forgotten_one_by_one() {
    // Where staleness is looked for, a name that led nowhere is forgotten, and with it the way to the node.
    let config = || EngineConfig { detect_staleness: false, ..config() };
    let mut bench = Bench::new(config());
    bench.write("x", "contents");
    let lookup = |bench: &Bench, name| bench.guest.fuse().lookup(ROOT, name).unwrap().nodeid;
    let a = lookup(&bench, "x");
    fs::rename(bench.path().join("x"), bench.path().join("y")).unwrap();
    bench.kill_and_use(config());
    let b = lookup(&bench, "y");
    fs::rename(bench.path().join("y"), bench.path().join("x")).unwrap();
    bench.guest.fuse().getattr(a, None).unwrap();
    assert_ne!(a, b, "by its own name the first one led nowhere");
    bench.guest.fuse().forget(b, 1).unwrap();
    assert_eq!(lookup(&bench, "x"), a);
    bench.guest.fuse().forget(a, 1).unwrap();
    assert_eq!(bench.guest.fuse().getattr(a, None).unwrap().size, 8, "it was told twice");
    assert_eq!(lookup(&bench, "x"), a);
}

#[test]
fn a_guest_that_holds_all_it_may_makes_nothing_and_leaves_nothing_open() {
    let mut bench = Bench::new(EngineConfig { max_inodes: 4, ..config() });
    for name in ["a", "b", "c", "d"] {
        bench.guest.fuse().mknod(ROOT, name, libc::S_IFREG | 0o600, 0).unwrap();
    }
    let engine = bench.engine().pid();
    let descriptors = || fs::read_dir(format!("/proc/{engine}/fd")).unwrap().count();
    let before = descriptors();
    let fuse = bench.guest.fuse();
    for n in 0..20 {
        let name = format!("n{n}");
        assert_eq!(errno(fuse.create(ROOT, &name, libc::O_RDWR, 0o600)), Some(libc::ENFILE));
        assert_eq!(errno(fuse.mkdir(ROOT, &name, 0o700)), Some(libc::ENFILE));
        assert_eq!(errno(fuse.symlink(ROOT, &name, "target")), Some(libc::ENFILE));
        assert_eq!(errno(fuse.mknod(ROOT, &name, libc::S_IFREG | 0o600, 0)), Some(libc::ENFILE));
    }
    // There is an answer other than that, for what is there.
    assert_eq!(errno(fuse.mkdir(ROOT, "a", 0o700)), Some(libc::EEXIST));
    let a = fuse.lookup(ROOT, "a").unwrap().nodeid;
    assert_eq!(fuse.link(a, ROOT, "another name").unwrap().nodeid, a);
    // A file that is there and that the guest may not be told of is not left open either.
    bench.write("unknown", "");
    for _ in 0..20 {
        assert_eq!(errno(bench.guest.fuse().create(ROOT, "unknown", libc::O_RDWR, 0o600)), Some(libc::ENFILE));
    }
    assert_eq!(descriptors(), before);
    let names = fs::read_dir(bench.path()).unwrap().count();
    assert_eq!(names, 6, "nothing was made that was refused");
}
