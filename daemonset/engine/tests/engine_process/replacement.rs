//! Replacement of engines on the same ledger: the guest keeps what it holds.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use crate::engine::Engine;
use crate::fixture::{Fixture, ROOT, config, errno, walk};
use crate::mounted::Mounted;
use rand::{Rng, SeedableRng};
use testkit::guest::{Guest, GuestConfig};
use testkit::skip::require_that;
use testkit::workload::{Config, Limit, Workload};
use virtiofs_config::{CachePolicy, EngineConfig, InodeFileHandles};
use virtiofs_contract::preflight::Reason;

pub(crate) fn expect_stashed(fixture: &mut Fixture, files: usize) {
    fixture.engine().session().expect_stashed(files);
}

#[test]
fn nodes_files_and_directory_streams_survive() {
    let mut fixture = Fixture::new(config());
    fs::create_dir_all(fixture.path().join("a/b/c")).unwrap();
    fixture.write("a/b/c/file", "contents");
    for n in 0..300 {
        fixture.write(&format!("a/b/entry{n:03}"), "");
    }
    let (directory, file) = (walk(&fixture.guest, "a/b"), walk(&fixture.guest, "a/b/c/file"));
    let open = fixture.guest.fuse().open(file, libc::O_RDWR).unwrap();
    let stream = fixture.guest.fuse().opendir(directory).unwrap();
    let first = fixture.guest.fuse().readdir(directory, stream.fh, 0, 4096).unwrap();

    fixture.kill();

    let fuse = fixture.guest.fuse();
    assert_eq!(fuse.read(file, open.fh, 0, 100).unwrap(), b"contents");
    fuse.write(file, open.fh, 8, b", more", libc::O_RDWR).unwrap();
    assert_eq!(fuse.getattr(directory, None).unwrap().ino, fs::metadata(fixture.path().join("a/b")).unwrap().ino());
    let mut names: Vec<_> = first.iter().map(|entry| entry.name.clone()).collect();
    let mut position = first.last().unwrap().next;
    loop {
        let more = fuse.readdir(directory, stream.fh, position, 4096).unwrap();
        let Some(last) = more.last() else { break };
        position = last.next;
        names.extend(more.iter().map(|entry| entry.name.clone()));
    }
    assert_eq!(names.len(), 303, "each entry once");
    assert_eq!(walk(&fixture.guest, "a/b"), directory, "a node keeps its id");
    fuse.release(file, open.fh, 0).unwrap();
    assert_eq!(fs::read_to_string(fixture.path().join("a/b/c/file")).unwrap(), "contents, more");
}

#[test]
fn open_files_that_the_guest_unlinked_or_replaced_survive() {
    let mut fixture = Fixture::new(config());
    let fuse = fixture.guest.fuse();
    let gone = fuse.create(ROOT, "gone", libc::O_RDWR, 0o600).unwrap();
    let covered = fuse.create(ROOT, "covered", libc::O_RDWR, 0o600).unwrap();
    fuse.write(gone.entry.nodeid, gone.open.fh, 0, b"unlinked", 0).unwrap();
    fuse.write(covered.entry.nodeid, covered.open.fh, 0, b"renamed over", 0).unwrap();
    fuse.mknod(ROOT, "other", libc::S_IFREG | 0o600, 0).unwrap();
    fuse.unlink(ROOT, "gone").unwrap();
    fuse.rename(ROOT, "other", ROOT, "covered", 0).unwrap();
    expect_stashed(&mut fixture, 2);

    for round in 0..3u64 {
        fixture.kill();
        let fuse = fixture.guest.fuse();
        for (file, length) in [(&gone, 8), (&covered, 12)] {
            let (node, fh) = (file.entry.nodeid, file.open.fh);
            assert_eq!(fuse.getattr(node, None).unwrap().size, length + round);
            assert_eq!(fuse.getattr(node, None).unwrap().nlink, 0);
            fuse.write(node, fh, length + round, b"!", 0).unwrap();
            assert_eq!(fuse.read(node, fh, length, 10).unwrap(), vec![b'!'; round as usize + 1]);
        }
    }
    let fuse = fixture.guest.fuse();
    fuse.release(gone.entry.nodeid, gone.open.fh, 0).unwrap();
    fuse.release(covered.entry.nodeid, covered.open.fh, 0).unwrap();
    // Closed files are not kept.
    expect_stashed(&mut fixture, 0);
}

#[test]
fn open_files_that_the_host_removed_or_moved_survive() {
    let mut fixture = Fixture::new(config());
    for name in ["removed", "renamed", "replaced"] {
        fixture.write(name, name);
    }
    let files: Vec<_> = ["removed", "renamed", "replaced"]
        .map(|name| {
            let node = fixture.guest.fuse().lookup(ROOT, name).unwrap().nodeid;
            (name, node, fixture.guest.fuse().open(node, libc::O_RDONLY).unwrap().fh)
        })
        .into();
    // A second link keeps the file: otherwise it is freed with the engine that had it open.
    fs::hard_link(fixture.path().join("removed"), fixture.path().join("kept")).unwrap();
    fs::hard_link(fixture.path().join("replaced"), fixture.path().join("kept too")).unwrap();
    fs::remove_file(fixture.path().join("removed")).unwrap();
    fs::rename(fixture.path().join("renamed"), fixture.path().join("elsewhere")).unwrap();
    fixture.write("new", "another file");
    fs::rename(fixture.path().join("new"), fixture.path().join("replaced")).unwrap();

    fixture.kill();

    for (name, node, fh) in files {
        assert_eq!(fixture.guest.fuse().read(node, fh, 0, 100).unwrap(), name.as_bytes(), "{name}");
    }
    let replaced = fixture.guest.fuse().lookup(ROOT, "replaced").unwrap().nodeid;
    let fh = fixture.guest.fuse().open(replaced, libc::O_RDONLY).unwrap().fh;
    assert_eq!(fixture.guest.fuse().read(replaced, fh, 0, 100).unwrap(), b"another file");
}

#[test]
fn a_reused_inode_number_is_another_node() {
    let mut reused = 0;
    for round in 0..20 {
        // A session that has found a stale node keeps the files of later lookups open for a second.
        let mut fixture = Fixture::new(config());
        let (old, new) = (format!("old{round}"), format!("new{round}"));
        fixture.write(&old, "old");
        let dead = fixture.guest.fuse().lookup(ROOT, &old).unwrap();
        fs::remove_file(fixture.path().join(&old)).unwrap();
        // ext4 reuses the number at once, for whatever is made next: the files of the next engine in this test, unless the
        // engine before still had the file open.
        let is_open = round % 2 == 0;
        if !is_open {
            fixture.write(&new, "new");
        }
        fixture.kill();
        if is_open {
            fixture.write(&new, "new");
        }
        let alive = fixture.guest.fuse().lookup(ROOT, &new).unwrap();
        reused += u32::from(alive.attr.ino == dead.attr.ino);
        assert_ne!(alive.nodeid, dead.nodeid);
        assert_eq!(errno(fixture.guest.fuse().getattr(dead.nodeid, None)), Some(libc::ESTALE));
        assert_eq!(errno(fixture.guest.fuse().open(dead.nodeid, libc::O_RDONLY)), Some(libc::ESTALE));
    }
    // Else nothing was shown.
    let _ = require_that("a file system that uses inode numbers again at once, such as ext4", reused > 0);
}

#[test]
fn an_open_file_is_not_confused_with_a_reused_inode_number() {
    // Other tests make files on the same file system and may take the number first.
    let shown = (0..20).any(|_| reads_stale_after_reuse());
    let _ = require_that("a file system that uses inode numbers again at once, such as ext4", shown);
}

/// Replaces an open file while no engine runs, and reads it. False: the new file has another inode number.
fn reads_stale_after_reuse() -> bool {
    let mut fixture = Fixture::new(config());
    fixture.write("f", "first");
    let node = fixture.guest.fuse().lookup(ROOT, "f").unwrap();
    let fh = fixture.guest.fuse().open(node.nodeid, libc::O_RDONLY).unwrap().fh;
    let engine = fixture.engine();
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(engine.pid() as i32), nix::sys::signal::Signal::SIGKILL).unwrap();
    std::thread::sleep(Duration::from_millis(50));
    fs::remove_file(fixture.path().join("f")).unwrap();
    fixture.write("f", "second");
    fixture.kill();
    if fs::metadata(fixture.path().join("f")).unwrap().ino() != node.attr.ino {
        return false;
    }
    let read = fixture.guest.fuse().read(node.nodeid, fh, 0, 10);
    assert_eq!(errno(read.inspect(|bytes| println!("{}", String::from_utf8_lossy(bytes)))), Some(libc::ESTALE));
    true
}

#[test]
fn hard_links_renames_and_forgotten_nodes() {
    let mut fixture = Fixture::new(config());
    fs::create_dir_all(fixture.path().join("d/e")).unwrap();
    fixture.write("d/e/one", "linked");
    fs::hard_link(fixture.path().join("d/e/one"), fixture.path().join("two")).unwrap();
    let fuse = fixture.guest.fuse();
    let d = fuse.lookup(ROOT, "d").unwrap().nodeid;
    let e = fuse.lookup(d, "e").unwrap().nodeid;
    let one = fuse.lookup(e, "one").unwrap().nodeid;
    assert_eq!(fuse.lookup(ROOT, "two").unwrap().nodeid, one, "one file, one node");
    fuse.rename(d, "e", ROOT, "moved", 0).unwrap();
    fuse.unlink(ROOT, "two").unwrap();

    fixture.kill();

    let fuse = fixture.guest.fuse();
    assert_eq!(fuse.getattr(one, None).unwrap().nlink, 1);
    assert_eq!(fuse.lookup(e, "one").unwrap().nodeid, one);
    assert_eq!(fuse.lookup(ROOT, "moved").unwrap().nodeid, e);
    assert_eq!(errno(fuse.lookup(d, "e")), Some(libc::ENOENT));
    fs::hard_link(fixture.path().join("moved/one"), fixture.path().join("three")).unwrap();
    fixture.kill();
    assert_eq!(fixture.guest.fuse().lookup(ROOT, "three").unwrap().nodeid, one, "found by its identity");
    let held = fixture.engine().counters.held();
    assert_eq!((held.inodes, held.handles), (3, 0));
    fixture.guest.fuse().forget(one, 5).unwrap();
    fixture.guest.fuse().getattr(ROOT, None).unwrap();
    assert_eq!(fixture.engine().counters.held().inodes, 2);
    assert_eq!(errno(fixture.guest.fuse().getattr(one, None)), Some(libc::ESTALE), "forgotten is unknown");
}

#[test]
fn cache_and_inode_handles_may_change() {
    let mut fixture = Fixture::new(EngineConfig { inode_file_handles: InodeFileHandles::Never, ..config() });
    fixture.write("f", "contents");
    let node = fixture.guest.fuse().lookup(ROOT, "f").unwrap().nodeid;
    let fh = fixture.guest.fuse().open(node, libc::O_RDONLY).unwrap().fh;
    for (cache, handles) in [
        (CachePolicy::Always, InodeFileHandles::Prefer),
        (CachePolicy::Never, InodeFileHandles::Never),
        (CachePolicy::Auto, InodeFileHandles::Mandatory),
    ] {
        // As shares are resolved: no READDIRPLUS without a cache. A mount keeps what it has.
        let readdirplus = cache != CachePolicy::Never;
        fixture.kill_and_use(EngineConfig { cache, inode_file_handles: handles, readdirplus, ..config() });
        assert_eq!(fixture.guest.fuse().read(node, fh, 0, 100).unwrap(), b"contents", "{cache:?} {handles:?}");
    }
}

#[test]
fn changes_that_need_a_new_mount_are_refused() {
    let mut fixture = Fixture::new(config());
    let source = fixture.path().to_owned();
    let engine = fixture.take_engine();
    let refused = engine.killed(&source, EngineConfig { killpriv: true, ..config() });
    assert_eq!(refused.err().unwrap().reason, Reason::RemountRequired);
}

#[test]
fn negotiated_features_survive() {
    let mut fixture = Fixture::new(config());
    let directory = fixture.path().join("team");
    fs::create_dir(&directory).unwrap();
    std::os::unix::fs::chown(&directory, Some(0), Some(815)).unwrap();
    fs::set_permissions(&directory, std::os::unix::fs::PermissionsExt::from_mode(0o770)).unwrap();
    fixture.kill();
    let caller = testkit::fuse::client::Caller { uid: 4711, gid: 4711, groups: vec![815], ..Default::default() };
    let team = fixture.guest.fuse().lookup(ROOT, "team").unwrap().nodeid;
    fixture.guest.fuse().as_caller(caller).mkdir(team, "mine", 0o755).unwrap();
    assert_eq!(fs::metadata(directory.join("mine")).unwrap().uid(), 4711);
    fixture.guest.fuse().setxattr(team, "user.colour", b"blue", 0).unwrap();
    assert_eq!(fixture.guest.fuse().getxattr(team, "user.colour").unwrap(), b"blue");
}

#[test]
fn a_new_mount_starts_empty() {
    let mut fixture = Fixture::new(config());
    fixture.write("f", "x");
    let before = fixture.guest.fuse().lookup(ROOT, "f").unwrap().nodeid;
    fixture.guest.reboot().unwrap();
    assert_eq!(errno(fixture.guest.fuse().getattr(before, None)), Some(libc::ESTALE));
    fixture.kill();
    assert_eq!(errno(fixture.guest.fuse().getattr(before, None)), Some(libc::ESTALE));
    fixture.guest.fuse().lookup(ROOT, "f").unwrap();
}

#[test]
fn files_on_submounts_survive() {
    let source = tempfile::tempdir().unwrap();
    let mounts = ["one", "two"].map(|name| Mounted::tmpfs(&source.path().join(name)));
    // The same inode numbers on each file system.
    for mount in &mounts {
        fs::create_dir(mount.0.join("directory")).unwrap();
        fs::write(mount.0.join("directory/file"), mount.0.file_name().unwrap().as_encoded_bytes()).unwrap();
    }
    for announced in [true, false] {
        let config = || EngineConfig { announce_submounts: announced, ..config() };
        let engine = Engine::start(source.path(), config()).unwrap();
        let guest = Guest::boot(GuestConfig { busy_poll: true, ..engine.guest_config() }).unwrap();
        let files = ["one", "two"].map(|name| walk(&guest, &format!("{name}/directory/file")));
        assert_ne!(files[0], files[1]);
        let seen = guest.fuse().lookup(ROOT, "one").unwrap().attr.flags & 1 != 0;
        assert_eq!(seen, announced, "mount points are announced if that was agreed");
        let open = files.map(|file| guest.fuse().open(file, libc::O_RDONLY).unwrap().fh);
        let engine = engine.killed(source.path(), config()).unwrap();
        guest.reconnect_to(&engine.socket()).unwrap();
        for ((file, fh), name) in files.into_iter().zip(open).zip(["one", "two"]) {
            assert_eq!(guest.fuse().read(file, fh, 0, 10).unwrap(), name.as_bytes());
            assert_eq!(walk(&guest, &format!("{name}/directory/file")), file);
        }
    }
}

/// Random work against a model while the engine is killed at random times.
fn under_kills(seed: u64, kills: u32, config: &EngineConfig) {
    let mut fixture = Fixture::new(config.clone());
    let source = fixture.path().to_owned();
    let stop = AtomicBool::new(false);
    let mut rng = rand::rngs::StdRng::seed_from_u64(seed);
    let engine = fixture.take_engine();
    let guest = &fixture.guest;
    guest.queues().iter().for_each(|queue| queue.watch(None));
    let (report, engine) = std::thread::scope(|scope| {
        let work = scope.spawn(|| {
            let mut workload = Workload::start(Config::new(seed).lanes(2).host(&source), &[guest.fuse()]);
            workload.run(Limit::until(&stop));
            workload.finish()
        });
        let (mut engine, mut answered) = (engine, 0);
        if kills == 0 {
            std::thread::sleep(Duration::from_millis(1500));
        }
        for _ in 0..kills {
            // A real VMM is connected to the broker, which keeps the connection.
            guest.queues().iter().for_each(|queue| queue.watch(None));
            std::thread::sleep(Duration::from_micros(rng.random_range(200..20_000)));
            // A request during which five engines were killed is answered EIO; that happens on a slow disk.
            while engine.counters.totals().requests() == answered && !work.is_finished() {
                std::thread::sleep(Duration::from_micros(200));
            }
            answered = engine.counters.totals().requests();
            engine = engine.killed(&source, config.clone()).unwrap();
            guest.reconnect_to(&engine.socket()).unwrap();
        }
        stop.store(true, Ordering::Relaxed);
        (work.join().unwrap(), engine)
    });
    assert!(report.is_clean(), "seed {seed}: {report:#?}");
    assert!(guest.violations().is_empty());
    engine.session().expect_stashed(0);
    assert_eq!(engine.counters.totals().stale, [], "seed {seed}: only the guest has changed anything");
}

#[test]
fn random_work_without_kills() {
    for seed in 0..6 {
        under_kills(seed, 0, &config());
    }
}

#[test]
fn random_work_under_kills() {
    for seed in 0..4 {
        under_kills(seed, 60, &config());
    }
}

#[test]
fn random_work_under_kills_with_descriptors() {
    for seed in 10..12 {
        under_kills(seed, 60, &EngineConfig { inode_file_handles: InodeFileHandles::Never, ..config() });
    }
}
