//! One engine after another on the same ledger: what the guest holds goes on.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use crate::bench::{Bench, ROOT, config, errno, walk};
use crate::mounted::Mounted;
use crate::rig::Engine;
use rand::{Rng, SeedableRng};
use testkit::guest::{Guest, GuestConfig};
use testkit::workload::{Config, Limit, Workload};
use virtiofs_config::{CachePolicy, EngineConfig, InodeFileHandles};
use virtiofs_contract::preflight::Reason;

pub(crate) fn expect_parked(bench: &mut Bench, files: usize) {
    bench.engine().session().expect_parked(files);
}

#[test]
fn nodes_files_and_directory_streams_go_on() {
    let mut bench = Bench::new(config());
    fs::create_dir_all(bench.path().join("a/b/c")).unwrap();
    bench.write("a/b/c/file", "contents");
    for n in 0..300 {
        bench.write(&format!("a/b/entry{n:03}"), "");
    }
    let (directory, file) = (walk(&bench.guest, "a/b"), walk(&bench.guest, "a/b/c/file"));
    let open = bench.guest.fuse().open(file, libc::O_RDWR).unwrap();
    let stream = bench.guest.fuse().opendir(directory).unwrap();
    let first = bench.guest.fuse().readdir(directory, stream.fh, 0, 4096).unwrap();

    bench.kill();

    let fuse = bench.guest.fuse();
    assert_eq!(fuse.read(file, open.fh, 0, 100).unwrap(), b"contents");
    fuse.write(file, open.fh, 8, b", more", libc::O_RDWR).unwrap();
    assert_eq!(fuse.getattr(directory, None).unwrap().ino, fs::metadata(bench.path().join("a/b")).unwrap().ino());
    let mut names: Vec<_> = first.iter().map(|entry| entry.name.clone()).collect();
    let mut position = first.last().unwrap().next;
    loop {
        let more = fuse.readdir(directory, stream.fh, position, 4096).unwrap();
        let Some(last) = more.last() else { break };
        position = last.next;
        names.extend(more.iter().map(|entry| entry.name.clone()));
    }
    assert_eq!(names.len(), 303, "each entry once");
    assert_eq!(walk(&bench.guest, "a/b"), directory, "a node keeps its id");
    fuse.release(file, open.fh, 0).unwrap();
    assert_eq!(fs::read_to_string(bench.path().join("a/b/c/file")).unwrap(), "contents, more");
}

#[test]
fn what_the_guest_has_unlinked_or_replaced_while_open_goes_on() {
    let mut bench = Bench::new(config());
    let fuse = bench.guest.fuse();
    let gone = fuse.create(ROOT, "gone", libc::O_RDWR, 0o600).unwrap();
    let covered = fuse.create(ROOT, "covered", libc::O_RDWR, 0o600).unwrap();
    fuse.write(gone.entry.nodeid, gone.open.fh, 0, b"unlinked", 0).unwrap();
    fuse.write(covered.entry.nodeid, covered.open.fh, 0, b"renamed over", 0).unwrap();
    fuse.mknod(ROOT, "other", libc::S_IFREG | 0o600, 0).unwrap();
    fuse.unlink(ROOT, "gone").unwrap();
    fuse.rename(ROOT, "other", ROOT, "covered", 0).unwrap();
    expect_parked(&mut bench, 2);

    for round in 0..3u64 {
        bench.kill();
        let fuse = bench.guest.fuse();
        for (file, length) in [(&gone, 8), (&covered, 12)] {
            let (node, fh) = (file.entry.nodeid, file.open.fh);
            assert_eq!(fuse.getattr(node, None).unwrap().size, length + round);
            assert_eq!(fuse.getattr(node, None).unwrap().nlink, 0);
            fuse.write(node, fh, length + round, b"!", 0).unwrap();
            assert_eq!(fuse.read(node, fh, length, 10).unwrap(), vec![b'!'; round as usize + 1]);
        }
    }
    let fuse = bench.guest.fuse();
    fuse.release(gone.entry.nodeid, gone.open.fh, 0).unwrap();
    fuse.release(covered.entry.nodeid, covered.open.fh, 0).unwrap();
    // What is closed is not kept.
    expect_parked(&mut bench, 0);
}

#[test]
fn what_the_host_removes_renames_or_replaces_while_open_goes_on() {
    let mut bench = Bench::new(config());
    for name in ["removed", "renamed", "replaced"] {
        bench.write(name, name);
    }
    let files: Vec<_> = ["removed", "renamed", "replaced"]
        .map(|name| {
            let node = bench.guest.fuse().lookup(ROOT, name).unwrap().nodeid;
            (name, node, bench.guest.fuse().open(node, libc::O_RDONLY).unwrap().fh)
        })
        .into();
    // What nobody else has open is gone for good with the engine that had it: a second link keeps it.
    fs::hard_link(bench.path().join("removed"), bench.path().join("kept")).unwrap();
    fs::hard_link(bench.path().join("replaced"), bench.path().join("kept too")).unwrap();
    fs::remove_file(bench.path().join("removed")).unwrap();
    fs::rename(bench.path().join("renamed"), bench.path().join("elsewhere")).unwrap();
    bench.write("new", "another file");
    fs::rename(bench.path().join("new"), bench.path().join("replaced")).unwrap();

    bench.kill();

    for (name, node, fh) in files {
        assert_eq!(bench.guest.fuse().read(node, fh, 0, 100).unwrap(), name.as_bytes(), "{name}");
    }
    let replaced = bench.guest.fuse().lookup(ROOT, "replaced").unwrap().nodeid;
    let fh = bench.guest.fuse().open(replaced, libc::O_RDONLY).unwrap().fh;
    assert_eq!(bench.guest.fuse().read(replaced, fh, 0, 100).unwrap(), b"another file");
}

#[test]
fn another_file_never_gets_a_dead_nodes_id() {
    let mut bench = Bench::new(config());
    let mut reused = 0;
    for round in 0..20 {
        let (old, new) = (format!("old{round}"), format!("new{round}"));
        bench.write(&old, "old");
        let dead = bench.guest.fuse().lookup(ROOT, &old).unwrap();
        fs::remove_file(bench.path().join(&old)).unwrap();
        bench.kill();
        // ext4 hands the number out again at once.
        bench.write(&new, "new");
        let alive = bench.guest.fuse().lookup(ROOT, &new).unwrap();
        reused += u32::from(alive.attr.ino == dead.attr.ino);
        assert_ne!(alive.nodeid, dead.nodeid);
        assert_eq!(errno(bench.guest.fuse().getattr(dead.nodeid, None)), Some(libc::ESTALE));
        assert_eq!(errno(bench.guest.fuse().open(dead.nodeid, libc::O_RDONLY)), Some(libc::ESTALE));
    }
    println!("{reused} of 20 inode numbers were used again");
}

#[test]
fn an_open_file_is_not_mistaken_for_its_successor_of_the_same_number() {
    let mut bench = Bench::new(config());
    bench.write("f", "first");
    let node = bench.guest.fuse().lookup(ROOT, "f").unwrap();
    let fh = bench.guest.fuse().open(node.nodeid, libc::O_RDONLY).unwrap().fh;
    let engine = bench.engine();
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(engine.pid() as i32), nix::sys::signal::Signal::SIGKILL).unwrap();
    std::thread::sleep(Duration::from_millis(50));
    fs::remove_file(bench.path().join("f")).unwrap();
    bench.write("f", "second");
    bench.kill();
    let same_number = fs::metadata(bench.path().join("f")).unwrap().ino() == node.attr.ino;
    println!("same number: {same_number}");
    let read = bench.guest.fuse().read(node.nodeid, fh, 0, 10);
    assert_eq!(errno(read.inspect(|bytes| println!("{}", String::from_utf8_lossy(bytes)))), Some(libc::ESTALE));
}

#[test]
fn hard_links_renames_and_forgotten_nodes() {
    let mut bench = Bench::new(config());
    fs::create_dir_all(bench.path().join("d/e")).unwrap();
    bench.write("d/e/one", "linked");
    fs::hard_link(bench.path().join("d/e/one"), bench.path().join("two")).unwrap();
    let fuse = bench.guest.fuse();
    let d = fuse.lookup(ROOT, "d").unwrap().nodeid;
    let e = fuse.lookup(d, "e").unwrap().nodeid;
    let one = fuse.lookup(e, "one").unwrap().nodeid;
    assert_eq!(fuse.lookup(ROOT, "two").unwrap().nodeid, one, "one file, one node");
    fuse.rename(d, "e", ROOT, "moved", 0).unwrap();
    fuse.unlink(ROOT, "two").unwrap();

    bench.kill();

    let fuse = bench.guest.fuse();
    assert_eq!(fuse.getattr(one, None).unwrap().nlink, 1);
    assert_eq!(fuse.lookup(e, "one").unwrap().nodeid, one);
    assert_eq!(fuse.lookup(ROOT, "moved").unwrap().nodeid, e);
    assert_eq!(errno(fuse.lookup(d, "e")), Some(libc::ENOENT));
    fs::hard_link(bench.path().join("moved/one"), bench.path().join("three")).unwrap();
    bench.kill();
    assert_eq!(bench.guest.fuse().lookup(ROOT, "three").unwrap().nodeid, one, "found by its identity");
    let held = bench.engine().counters.held();
    assert_eq!((held.inodes, held.handles), (3, 0));
    bench.guest.fuse().forget(one, 5).unwrap();
    bench.guest.fuse().getattr(ROOT, None).unwrap();
    assert_eq!(bench.engine().counters.held().inodes, 2);
    assert_eq!(errno(bench.guest.fuse().getattr(one, None)), Some(libc::ESTALE), "forgotten is unknown");
}

#[test]
fn the_next_engine_may_cache_otherwise_and_hold_inodes_otherwise() {
    let mut bench = Bench::new(EngineConfig { inode_file_handles: InodeFileHandles::Never, ..config() });
    bench.write("f", "contents");
    let node = bench.guest.fuse().lookup(ROOT, "f").unwrap().nodeid;
    let fh = bench.guest.fuse().open(node, libc::O_RDONLY).unwrap().fh;
    for (cache, handles) in [
        (CachePolicy::Always, InodeFileHandles::Prefer),
        (CachePolicy::Never, InodeFileHandles::Never),
        (CachePolicy::Auto, InodeFileHandles::Mandatory),
    ] {
        // As a share resolves: without a cache, listings come without attributes. A mount keeps what it has.
        let readdirplus = cache != CachePolicy::Never;
        bench.kill_and_use(EngineConfig { cache, inode_file_handles: handles, readdirplus, ..config() });
        assert_eq!(bench.guest.fuse().read(node, fh, 0, 100).unwrap(), b"contents", "{cache:?} {handles:?}");
    }
}

#[test]
fn what_only_a_new_mount_can_change_is_refused() {
    let mut bench = Bench::new(config());
    let source = bench.path().to_owned();
    let engine = bench.take_engine();
    let refused = engine.killed(&source, EngineConfig { killpriv: true, ..config() });
    assert_eq!(refused.err().unwrap().reason, Reason::RemountRequired);
}

#[test]
fn supplementary_groups_and_flags_of_the_mount_are_known_to_the_next_engine() {
    let mut bench = Bench::new(config());
    let directory = bench.path().join("team");
    fs::create_dir(&directory).unwrap();
    std::os::unix::fs::chown(&directory, Some(0), Some(815)).unwrap();
    fs::set_permissions(&directory, std::os::unix::fs::PermissionsExt::from_mode(0o770)).unwrap();
    bench.kill();
    let caller = testkit::fuse::client::Caller { uid: 4711, gid: 4711, groups: vec![815], ..Default::default() };
    let team = bench.guest.fuse().lookup(ROOT, "team").unwrap().nodeid;
    bench.guest.fuse().as_caller(caller).mkdir(team, "mine", 0o755).unwrap();
    assert_eq!(fs::metadata(directory.join("mine")).unwrap().uid(), 4711);
    bench.guest.fuse().setxattr(team, "user.colour", b"blue", 0).unwrap();
    assert_eq!(bench.guest.fuse().getxattr(team, "user.colour").unwrap(), b"blue");
}

#[test]
fn a_guest_that_mounts_again_starts_from_nothing() {
    let mut bench = Bench::new(config());
    bench.write("f", "x");
    let before = bench.guest.fuse().lookup(ROOT, "f").unwrap().nodeid;
    bench.guest.reboot().unwrap();
    assert_eq!(errno(bench.guest.fuse().getattr(before, None)), Some(libc::ESTALE));
    bench.kill();
    assert_eq!(errno(bench.guest.fuse().getattr(before, None)), Some(libc::ESTALE));
    bench.guest.fuse().lookup(ROOT, "f").unwrap();
}

#[test]
fn what_lies_on_submounts_goes_on() {
    let source = tempfile::tempdir().unwrap();
    let mounts = ["one", "two"].map(|name| Mounted::tmpfs(&source.path().join(name)));
    // The same numbers on each: only the file system tells them apart.
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
        let told = guest.fuse().lookup(ROOT, "one").unwrap().attr.flags & 1 != 0;
        assert_eq!(told, announced, "mount points are told to guests that are to know them");
        let open = files.map(|file| guest.fuse().open(file, libc::O_RDONLY).unwrap().fh);
        let engine = engine.killed(source.path(), config()).unwrap();
        guest.reconnect_to(&engine.socket()).unwrap();
        for ((file, fh), name) in files.into_iter().zip(open).zip(["one", "two"]) {
            assert_eq!(guest.fuse().read(file, fh, 0, 10).unwrap(), name.as_bytes());
            assert_eq!(walk(&guest, &format!("{name}/directory/file")), file);
        }
    }
}

/// Random work against a model, while the engine is killed at random moments.
fn under_kills(seed: u64, kills: u32, config: &EngineConfig) {
    let mut bench = Bench::new(config.clone());
    let source = bench.path().to_owned();
    let stop = AtomicBool::new(false);
    let mut rng = rand::rngs::StdRng::seed_from_u64(seed);
    let engine = bench.take_engine();
    let guest = &bench.guest;
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
            // A real VMM is connected to the broker, which does not hang up.
            guest.queues().iter().for_each(|queue| queue.watch(None));
            std::thread::sleep(Duration::from_micros(rng.random_range(200..20_000)));
            // A request that outlives five engines is answered EIO; on a slow disk one does.
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
    engine.session().expect_parked(0);
    assert_eq!(engine.counters.totals().stale, [], "seed {seed}: nobody but the guest has changed anything");
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
fn random_work_under_kills_with_descriptors_instead_of_handles() {
    for seed in 10..12 {
        under_kills(seed, 60, &EngineConfig { inode_file_handles: InodeFileHandles::Never, ..config() });
    }
}
