//! A guest that sends written data later.

use std::fs;

use testkit::fuse::init::InitFlags;
use virtiofs_config::EngineConfig;

use crate::fixture::{Fixture, ROOT, config, errno, walk};

#[test]
fn writeback_answers_enosys_for_data_and_holes() {
    let writeback = || EngineConfig { writeback: true, ..config() };
    let mut fixture = Fixture::new(writeback());
    assert!(fixture.guest.fuse().has(InitFlags::WRITEBACK_CACHE));
    for name in ["named", "unlinked"] {
        fs::File::create(fixture.path().join(name)).unwrap().set_len(1 << 20).unwrap();
    }
    let files = ["named", "unlinked"].map(|name| {
        let node = walk(&fixture.guest, name);
        (node, fixture.guest.fuse().open(node, libc::O_RDWR).unwrap().fh)
    });
    fixture.guest.fuse().unlink(ROOT, "unlinked").unwrap();
    // The first engine negotiates with the guest, the second replays that and has the unlinked file as an orphan.
    for _ in 0..2 {
        for (node, fh) in files {
            let seek = |whence| fixture.guest.fuse().lseek(node, fh, 0, whence);
            assert_eq!(errno(seek(libc::SEEK_DATA)), Some(libc::ENOSYS));
            assert_eq!(errno(seek(libc::SEEK_HOLE)), Some(libc::ENOSYS));
            assert_eq!(seek(libc::SEEK_END).unwrap(), 1 << 20);
        }
        fixture.kill_and_use(writeback());
    }
}
