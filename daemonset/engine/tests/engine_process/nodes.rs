//! Node ids while other processes change names, and the limit of nodes.

use std::fs;

use virtiofs_config::EngineConfig;

use crate::fixture::{Fixture, ROOT, config, errno, walk};

#[test]
fn a_node_is_found_below_a_directory_that_moved_twice() {
    let mut fixture = Fixture::new(config());
    fs::create_dir(fixture.path().join("d")).unwrap();
    fixture.write("d/f", "contents");
    let file = walk(&fixture.guest, "d/f");
    let at = |name: &str| fixture.path().join(name);
    fs::rename(at("d"), at("e")).unwrap();
    walk(&fixture.guest, "e");
    fs::rename(at("e"), at("d")).unwrap();
    fixture.kill();
    assert_eq!(fixture.guest.fuse().getattr(file, None).unwrap().size, 8);
}

#[test]
fn cyclic_names_are_stale() {
    let mut fixture = Fixture::new(config());
    fs::create_dir_all(fixture.path().join("p/d")).unwrap();
    let (p, d) = (walk(&fixture.guest, "p"), walk(&fixture.guest, "p/d"));
    let rename =
        |fixture: &Fixture, from: &str, to: &str| fs::rename(fixture.path().join(from), fixture.path().join(to));
    rename(&fixture, "p/d", "d").unwrap();
    rename(&fixture, "p", "d/p").unwrap();
    assert_eq!([walk(&fixture.guest, "d"), walk(&fixture.guest, "d/p")], [d, p]);
    rename(&fixture, "d", "elsewhere").unwrap();
    fixture.kill();
    for node in [p, d] {
        assert_eq!(errno(fixture.guest.fuse().getattr(node, None)), Some(libc::ESTALE));
    }
    walk(&fixture.guest, "elsewhere/p");
}

#[test]
fn two_nodes_of_a_file_are_forgotten_separately() {
    // With detection, a stale name is dropped, and with it the path to the node.
    let config = || EngineConfig { detect_staleness: false, ..config() };
    let mut fixture = Fixture::new(config());
    fixture.write("x", "contents");
    let lookup = |fixture: &Fixture, name| fixture.guest.fuse().lookup(ROOT, name).unwrap().nodeid;
    let a = lookup(&fixture, "x");
    fs::rename(fixture.path().join("x"), fixture.path().join("y")).unwrap();
    fixture.kill_and_use(config());
    let b = lookup(&fixture, "y");
    fs::rename(fixture.path().join("y"), fixture.path().join("x")).unwrap();
    fixture.guest.fuse().getattr(a, None).unwrap();
    assert_ne!(a, b, "by its own name the first one led nowhere");
    fixture.guest.fuse().forget(b, 1).unwrap();
    assert_eq!(lookup(&fixture, "x"), a);
    fixture.guest.fuse().forget(a, 1).unwrap();
    assert_eq!(fixture.guest.fuse().getattr(a, None).unwrap().size, 8, "it was looked up twice");
    assert_eq!(lookup(&fixture, "x"), a);
}

#[test]
fn a_guest_at_its_inode_limit_creates_nothing() {
    let mut fixture = Fixture::new(EngineConfig { max_inodes: 4, ..config() });
    for name in ["a", "b", "c", "d"] {
        fixture.guest.fuse().mknod(ROOT, name, libc::S_IFREG | 0o600, 0).unwrap();
    }
    let engine = fixture.engine().pid();
    let descriptors = || fs::read_dir(format!("/proc/{engine}/fd")).unwrap().count();
    let before = descriptors();
    let fuse = fixture.guest.fuse();
    for n in 0..20 {
        let name = format!("n{n}");
        assert_eq!(errno(fuse.create(ROOT, &name, libc::O_RDWR, 0o600)), Some(libc::ENFILE));
        assert_eq!(errno(fuse.mkdir(ROOT, &name, 0o700)), Some(libc::ENFILE));
        assert_eq!(errno(fuse.symlink(ROOT, &name, "target")), Some(libc::ENFILE));
        assert_eq!(errno(fuse.mknod(ROOT, &name, libc::S_IFREG | 0o600, 0)), Some(libc::ENFILE));
    }
    // Existing names get other replies.
    assert_eq!(errno(fuse.mkdir(ROOT, "a", 0o700)), Some(libc::EEXIST));
    let a = fuse.lookup(ROOT, "a").unwrap().nodeid;
    assert_eq!(fuse.link(a, ROOT, "another name").unwrap().nodeid, a);
    // An existing file for which there is no room is not left open either.
    fixture.write("unknown", "");
    for _ in 0..20 {
        assert_eq!(errno(fixture.guest.fuse().create(ROOT, "unknown", libc::O_RDWR, 0o600)), Some(libc::ENFILE));
    }
    // The root may have been kept open before.
    assert!(descriptors() <= before);
    let names = fs::read_dir(fixture.path()).unwrap().count();
    assert_eq!(names, 6, "nothing was made that was refused");
}
