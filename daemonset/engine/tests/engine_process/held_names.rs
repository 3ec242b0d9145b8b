//! Names that the guest holds, below a directory that the engine keeps open to confirm them.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::thread::sleep;
use std::time::{Duration, Instant};

use virtiofs_config::{EngineConfig, InodeFileHandles};
use virtiofs_contract::staleness::Cause::{SourceRemoved, SourceReplaced};

use crate::fixture::{Fixture, ROOT, config, errno, walk};
use crate::mounted::Mounted;

/// Age from which the engine confirms a file, and some time.
const SETTLED: Duration = Duration::from_millis(1200);

/// More lookups than it takes until names are confirmed.
const LOOKUPS: usize = 8;

fn descriptors() -> EngineConfig {
    EngineConfig { inode_file_handles: InodeFileHandles::Never, ..config() }
}

/// A share with these files in `d`, all of them held and looked up until they are confirmed.
struct Held {
    fixture: Fixture,
    d: u64,
    nodes: Vec<u64>,
}

impl Held {
    fn new(config: EngineConfig, names: &[&str]) -> Self {
        let fixture = Fixture::new(config);
        fs::create_dir(fixture.path().join("d")).unwrap();
        for name in names {
            fixture.write(&format!("d/{name}"), "old");
        }
        sleep(SETTLED);
        let d = walk(&fixture.guest, "d");
        let nodes = names.iter().map(|name| walk(&fixture.guest, &format!("d/{name}"))).collect();
        let mut held = Held { fixture, d, nodes };
        held.look_up(names);
        assert!(held.is_open(), "the engine keeps the directory open");
        held
    }

    fn look_up(&mut self, names: &[&str]) {
        for _ in 0..LOOKUPS {
            for (name, node) in names.iter().zip(&self.nodes) {
                assert_eq!(self.fixture.guest.fuse().lookup(self.d, name).unwrap().nodeid, *node);
            }
        }
    }

    fn at(&self, name: &str) -> PathBuf {
        self.fixture.path().join("d").join(name)
    }

    /// True if the engine has `d` open.
    fn is_open(&mut self) -> bool {
        let inode = fs::metadata(self.at("")).unwrap().ino();
        let open = fs::read_dir(format!("/proc/{}/fd", self.fixture.engine().pid())).unwrap();
        let is_d = |path: &Path| fs::metadata(path).is_ok_and(|found| found.is_dir() && found.ino() == inode);
        open.flatten().any(|descriptor| is_d(&descriptor.path()))
    }
}

/// Replaces a file by rename.
fn replace(path: &Path, contents: &str) {
    let beside = path.with_extension("new");
    fs::write(&beside, contents).unwrap();
    fs::rename(beside, path).unwrap();
}

#[test]
fn a_confirmed_name_that_is_replaced_leads_to_the_new_file() {
    for config in [config(), descriptors()] {
        let held = Held::new(config, &["f"]);
        replace(&held.at("f"), "longer");
        let fuse = held.fixture.guest.fuse();
        let found = fuse.lookup(held.d, "f").unwrap();
        assert_ne!(found.nodeid, held.nodes[0]);
        assert_eq!(found.attr.size, 6);
        assert_eq!(held.fixture.stale(), [(SourceReplaced, 1)]);
    }
}

#[test]
fn a_confirmed_name_that_is_removed_does_not_exist() {
    for config in [config(), descriptors()] {
        let held = Held::new(config, &["f", "g"]);
        fs::remove_file(held.at("f")).unwrap();
        let fuse = held.fixture.guest.fuse();
        for _ in 0..3 {
            assert_eq!(errno(fuse.lookup(held.d, "f")), Some(libc::ENOENT));
        }
        assert_eq!(fuse.lookup(held.d, "g").unwrap().nodeid, held.nodes[1]);
        assert_eq!(held.fixture.stale(), [(SourceRemoved, 1)]);
    }
}

#[test]
fn a_file_that_gets_the_number_of_a_confirmed_one_is_another_file() {
    let held = Held::new(config(), &["f"]);
    let number = fs::metadata(held.at("f")).unwrap().ino();
    // Forgetting it is not needed: by file handle nothing keeps the inode.
    fs::remove_file(held.at("f")).unwrap();
    let reused = (0..1000).find(|n| {
        fs::write(held.at(&format!("new-{n}")), "another").unwrap();
        fs::metadata(held.at(&format!("new-{n}"))).unwrap().ino() == number
    });
    let reused = reused.expect("ext4 uses the number again at once");
    fs::rename(held.at(&format!("new-{reused}")), held.at("f")).unwrap();
    let found = held.fixture.guest.fuse().lookup(held.d, "f").unwrap();
    assert_eq!((found.attr.ino, found.attr.size), (number, 7));
    assert_ne!(found.nodeid, held.nodes[0]);
    assert_eq!(errno(held.fixture.guest.fuse().getattr(held.nodes[0], None)), Some(libc::ESTALE));
}

#[test]
fn hard_links_are_confirmed_as_one_node() {
    let mut held = Held::new(config(), &["f"]);
    fs::hard_link(held.at("f"), held.at("g")).unwrap();
    let node = held.nodes[0];
    assert_eq!(walk(&held.fixture.guest, "d/g"), node);
    held.nodes = vec![node, node];
    held.look_up(&["f", "g"]);
    replace(&held.at("f"), "new");
    let fuse = held.fixture.guest.fuse();
    assert_eq!(fuse.getattr(node, None).unwrap().nlink, 1, "by its other name");
    assert_ne!(fuse.lookup(held.d, "f").unwrap().nodeid, node);
    assert_eq!(fuse.lookup(held.d, "g").unwrap().nodeid, node);
}

#[test]
fn attributes_of_a_confirmed_node_are_current() {
    for config in [config(), descriptors()] {
        let held = Held::new(config, &["f"]);
        let fuse = held.fixture.guest.fuse();
        fs::write(held.at("f"), "contents").unwrap();
        assert_eq!(fuse.getattr(held.nodes[0], None).unwrap().size, 8);
        fs::rename(held.at("f"), held.fixture.path().join("elsewhere")).unwrap();
        fs::write(held.at("f"), "x").unwrap();
        assert_eq!(fuse.getattr(held.nodes[0], None).unwrap().size, 8, "the node is the file, whatever its name");
    }
}

/// A removed directory that is open could still be opened by its file handle. The guest would not learn that it is stale.
#[test]
fn a_directory_that_is_kept_open_becomes_stale_all_the_same() {
    type Attempt = (&'static str, fn(&Held) -> Option<i32>);
    let attempts: [Attempt; 7] = [
        ("lookup", |held| errno(held.fixture.guest.fuse().lookup(held.d, "f"))),
        ("lookup of another name", |held| errno(held.fixture.guest.fuse().lookup(held.d, "other"))),
        ("getattr", |held| errno(held.fixture.guest.fuse().getattr(held.d, None))),
        ("opendir", |held| errno(held.fixture.guest.fuse().opendir(held.d))),
        ("create", |held| errno(held.fixture.guest.fuse().create(held.d, "new", libc::O_RDWR, 0o600))),
        ("mkdir", |held| errno(held.fixture.guest.fuse().mkdir(held.d, "new", 0o700))),
        ("unlink", |held| errno(held.fixture.guest.fuse().unlink(held.d, "f"))),
    ];
    for (what, attempt) in attempts {
        let held = Held::new(config(), &["f"]);
        fs::remove_dir_all(held.at("")).unwrap();
        fs::create_dir(held.at("")).unwrap();
        fs::write(held.at("f"), "new").unwrap();
        assert_eq!(attempt(&held), Some(libc::ESTALE), "{what}");
        assert_ne!(walk(&held.fixture.guest, "d/f"), held.nodes[0]);
        assert_eq!(fs::read_to_string(held.at("f")).unwrap(), "new", "{what}");
    }
}

#[test]
fn a_file_system_that_is_mounted_on_a_confirmed_name_is_found() {
    let fixture = Fixture::new(config());
    fs::create_dir_all(fixture.path().join("d/sub")).unwrap();
    fixture.write("d/sub/f", "below");
    sleep(SETTLED);
    let (d, sub) = (walk(&fixture.guest, "d"), walk(&fixture.guest, "d/sub"));
    let fuse = fixture.guest.fuse();
    for _ in 0..LOOKUPS {
        assert_eq!(fuse.lookup(d, "sub").unwrap().nodeid, sub);
    }
    let mounted = Mounted::tmpfs(&fixture.path().join("d/sub"));
    fixture.write("d/sub/g", "above");
    // In a mount namespace of its own the engine does not see the mount.
    let seen = fuse.lookup(d, "sub").unwrap().nodeid;
    assert_eq!(errno(fuse.lookup(seen, "g")).is_none(), seen != sub);
    drop(mounted);
    assert_eq!(fuse.lookup(d, "sub").unwrap().nodeid, sub);
    fuse.lookup(sub, "f").unwrap();
}

#[test]
fn the_guest_changes_names_in_a_directory_that_is_kept_open() {
    let mut held = Held::new(config(), &["f", "g"]);
    let fuse = held.fixture.guest.fuse().clone();
    let (d, f, g) = (held.d, held.nodes[0], held.nodes[1]);
    fuse.rename(d, "f", d, "g", 0).unwrap();
    assert_eq!(fuse.lookup(d, "g").unwrap().nodeid, f);
    assert_eq!(errno(fuse.lookup(d, "f")), Some(libc::ENOENT));
    assert_eq!(errno(fuse.getattr(g, None)), Some(libc::ESTALE));
    let made = fuse.mkdir(d, "sub", 0o700).unwrap().nodeid;
    assert_eq!(errno(fuse.unlink(d, "sub")), Some(libc::EISDIR));
    assert_eq!(errno(fuse.rmdir(d, "g")), Some(libc::ENOTDIR));
    fuse.rmdir(d, "sub").unwrap();
    assert_eq!(errno(fuse.rmdir(d, "sub")), Some(libc::ENOENT));
    assert_eq!(errno(fuse.lookup(made, "x")), Some(libc::ENOENT), "a directory that the guest removed is empty");
    fuse.unlink(d, "g").unwrap();
    assert_eq!(errno(fuse.unlink(d, "g")), Some(libc::ENOENT));
    assert_eq!(fs::read_dir(held.at("")).unwrap().count(), 0);
    assert_eq!(held.fixture.stale(), []);
    held.fixture.kill();
    assert_eq!(errno(held.fixture.guest.fuse().lookup(ROOT, "g")), Some(libc::ENOENT));
}

#[test]
fn a_directory_that_is_not_used_is_closed() {
    let mut held = Held::new(config(), &["f"]);
    let until = Instant::now() + Duration::from_secs(60);
    while held.is_open() {
        assert!(Instant::now() < until, "the directory is still open");
        sleep(Duration::from_millis(50));
    }
    held.look_up(&["f"]);
    assert!(held.is_open(), "it is used again");
}
