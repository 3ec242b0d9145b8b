//! What a guest's kernel receives, on which the promises of docs/SEMANTICS.md rest.

use testkit::fuse::init::InitFlags;
use virtiofs_config::{CachePolicy, EngineConfig};

use crate::fixture::{Fixture, ROOT, config};

/// `FOPEN_KEEP_CACHE` of fuse(4): cached contents stay valid across opens.
const KEEP_CACHE: u32 = 1 << 1;

#[test]
fn locks_are_kept_inside_each_guest() {
    let fixture = Fixture::new(config());
    let fuse = fixture.guest.fuse();
    // Linux offers both, and keeps locks itself unless the file server agrees.
    assert!(InitFlags::linux_6_12().contains(InitFlags::POSIX_LOCKS | InitFlags::FLOCK_LOCKS));
    assert!(!fuse.has(InitFlags::POSIX_LOCKS) && !fuse.has(InitFlags::FLOCK_LOCKS));
}

#[test]
fn an_open_drops_cached_contents_unless_they_never_change() {
    for (cache, kept) in [(CachePolicy::Auto, false), (CachePolicy::Always, true)] {
        let fixture = Fixture::new(EngineConfig { cache, ..config() });
        fixture.write("file", "contents");
        let fuse = fixture.guest.fuse();
        let node = fuse.lookup(ROOT, "file").unwrap().nodeid;
        let opened = fuse.open(node, libc::O_RDONLY).unwrap();
        assert_eq!(opened.open_flags & KEEP_CACHE != 0, kept, "{cache:?}");
    }
}

#[test]
fn names_and_attributes_of_shared_content_are_trusted_for_a_second() {
    let fixture = Fixture::new(config());
    fixture.write("file", "contents");
    let entry = fixture.guest.fuse().lookup(ROOT, "file").unwrap();
    assert_eq!((entry.entry_valid, entry.attr_valid), (1, 1));
}
