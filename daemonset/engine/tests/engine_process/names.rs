//! Names, and how deep they lead.

use std::fs;

use testkit::fuse::call::CallError;
use virtiofs_config::EngineConfig;

use crate::fixture::{Fixture, ROOT, config, errno, walk};

/// Names that are no component of a path.
const LEADING_OUT: [&[u8]; 8] = [b"", b".", b"..", b"/", b"a/b", b"../outside", b"/etc/passwd", b"d/../../outside"];

/// An operation that takes a name.
type Operation = (&'static str, fn(&Fixture, u64, &[u8]) -> Result<(), CallError>);

const OPERATIONS: &[Operation] = &[
    ("lookup", |fixture, at, name| fixture.guest.fuse().lookup(at, name).map(drop)),
    ("mkdir", |fixture, at, name| fixture.guest.fuse().mkdir(at, name, 0o755).map(drop)),
    ("mknod", |fixture, at, name| fixture.guest.fuse().mknod(at, name, libc::S_IFREG | 0o644, 0).map(drop)),
    ("create", |fixture, at, name| fixture.guest.fuse().create(at, name, libc::O_RDWR, 0o644).map(drop)),
    ("symlink", |fixture, at, name| fixture.guest.fuse().symlink(at, name, "x").map(drop)),
    ("link", |fixture, at, name| {
        let file = fixture.guest.fuse().lookup(ROOT, "file")?.nodeid;
        fixture.guest.fuse().link(file, at, name).map(drop)
    }),
    ("unlink", |fixture, at, name| fixture.guest.fuse().unlink(at, name)),
    ("rmdir", |fixture, at, name| fixture.guest.fuse().rmdir(at, name)),
    ("rename from", |fixture, at, name| fixture.guest.fuse().rename(at, name, ROOT, "new", 0)),
    ("rename to", |fixture, at, name| fixture.guest.fuse().rename(ROOT, "file", at, name, 0)),
    ("exchange", |fixture, at, name| fixture.guest.fuse().rename(ROOT, "file", at, name, libc::RENAME_EXCHANGE)),
    ("whiteout", |fixture, at, name| fixture.guest.fuse().rename(at, name, ROOT, "new", libc::RENAME_WHITEOUT)),
];

/// A source in a directory with a file `outside`.
fn beside_a_file() -> Fixture {
    let directory = tempfile::tempdir().unwrap();
    let source = directory.path().join("source");
    fs::create_dir_all(source.join("d")).unwrap();
    fs::write(source.join("file"), "data").unwrap();
    fs::write(directory.path().join("outside"), "outside").unwrap();
    Fixture::on(directory, source, config())
}

fn names_in(directory: &std::path::Path) -> Vec<std::ffi::OsString> {
    let mut names: Vec<_> = fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    names.sort();
    names
}

#[test]
fn no_operation_takes_a_name_that_leads_out_of_its_directory() {
    let fixture = beside_a_file();
    let d = walk(&fixture.guest, "d");
    for (what, operation) in OPERATIONS {
        for name in LEADING_OUT {
            for at in [ROOT, d] {
                let refused = errno(operation(&fixture, at, name));
                assert_eq!(refused, Some(libc::EINVAL), "{what} {:?}", String::from_utf8_lossy(name));
            }
        }
    }
    assert_eq!(names_in(fixture.path()), ["d", "file"]);
    assert!(names_in(&fixture.path().join("d")).is_empty());
    assert_eq!(names_in(fixture.path().parent().unwrap()), ["outside", "source"]);
    assert_eq!(fs::read_to_string(fixture.path().join("file")).unwrap(), "data");
}

#[test]
fn too_long_names_are_errors_in_every_operation() {
    let fixture = beside_a_file();
    for length in [256, 4096, 5000, 60_000] {
        let name = vec![b'n'; length];
        for (what, operation) in OPERATIONS {
            let refused = errno(operation(&fixture, ROOT, &name));
            assert_eq!(refused, Some(libc::ENAMETOOLONG), "{what} of {length} bytes");
        }
        let target = errno(fixture.guest.fuse().symlink(ROOT, "s", &name));
        let expected = (length >= 4096).then_some(libc::ENAMETOOLONG);
        assert_eq!(target, expected, "a link to {length} bytes");
        let _ = fs::remove_file(fixture.path().join("s"));
    }
    assert_eq!(names_in(fixture.path()), ["d", "file"]);
}

#[test]
fn names_of_any_other_bytes_are_served_by_the_next_engine_too() {
    let mut fixture = beside_a_file();
    let names: [&[u8]; 7] = [b"x (deleted)", b"\xff\xfe", b"line\nline", b" ", b"...", b"\\040", &[b'n'; 255]];
    let nodes: Vec<u64> = names
        .iter()
        .map(|name| {
            let made = fixture.guest.fuse().create(ROOT, name, libc::O_RDWR, 0o644).unwrap();
            fixture.guest.fuse().write(made.entry.nodeid, made.open.fh, 0, name, 0).unwrap();
            made.entry.nodeid
        })
        .collect();
    fixture.kill();
    for (name, node) in names.iter().zip(nodes) {
        assert_eq!(fixture.guest.fuse().getattr(node, None).unwrap().size, name.len() as u64);
        assert_eq!(fixture.guest.fuse().lookup(ROOT, name).unwrap().nodeid, node);
        fixture.guest.fuse().unlink(ROOT, name).unwrap();
    }
}

/// Deeper than a path can name. An optimised build goes deeper than a stack could follow, which takes two minutes here.
#[test]
fn a_deep_directory_is_found_by_the_next_engine() {
    const DEPTH: usize = if cfg!(debug_assertions) { 5_000 } else { 100_000 };
    let mut fixture = Fixture::new(EngineConfig { detect_staleness: false, ..config() });
    let mut nodes = vec![ROOT];
    for depth in 0..DEPTH {
        nodes.push(fixture.guest.fuse().mkdir(nodes[depth], "d", 0o755).unwrap().nodeid);
    }
    fixture.kill_and_use(EngineConfig { detect_staleness: false, ..config() });
    let deepest = fixture.guest.fuse().getattr(nodes[DEPTH], None).unwrap();
    assert_eq!(deepest.mode & libc::S_IFMT, libc::S_IFDIR);
    // From below: nothing else can remove so deep a tree.
    for depth in (0..DEPTH).rev() {
        fixture.guest.fuse().rmdir(nodes[depth], "d").unwrap();
        fixture.guest.fuse().forget(nodes[depth + 1], 1).unwrap();
    }
    assert!(names_in(fixture.path()).is_empty());
}
