//! Each operation that must not run twice, with the engine killed before each store to the ledger: before and after the
//! record, after the system call, after each change of the ledger, after the reply, after the used ring. The guest always
//! gets one correct reply, and everything is counted once.

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use testkit::fuse::call::CallError;
use testkit::fuse::client::{Caller, Fuse};
use testkit::fuse::wire::ForgetOne;
use virtiofs_config::{EngineConfig, InodeFileHandles};
use virtiofs_contract::counters::Held;
use virtiofs_contract::staleness::Cause;

use crate::fixture::{Fixture, ROOT, config, errno};
use crate::replacement::expect_stashed;

/// A file to look up that no test changes.
const PROBE: &str = "probe";

/// More stores than any of these operations makes.
const MOST_STORES: u64 = 400;

/// An engine that is killed at a store, and the next one.
struct Dying {
    fixture: Fixture,
    config: EngineConfig,
}

impl Dying {
    fn new(config: EngineConfig) -> Self {
        let fixture = Fixture::new(config.clone());
        fixture.write(PROBE, "");
        let dying = Dying { fixture, config };
        dying.expect_hang_ups();
        dying
    }

    /// A real VMM is connected to the broker, which keeps the connection.
    fn expect_hang_ups(&self) {
        self.fixture.guest.queues().iter().for_each(|queue| queue.watch(None));
    }

    fn replace_engine(&mut self, die_at: Option<u64>) {
        self.fixture.replace_engine(self.config.clone(), die_at);
        self.expect_hang_ups();
    }

    fn held(&mut self) -> Held {
        let fuse = self.fixture.guest.fuse();
        // A node that was being ended is found when room for others is needed.
        for _ in 0..4 {
            let probe = fuse.lookup(ROOT, PROBE).unwrap().nodeid;
            fuse.forget(probe, 1).unwrap();
        }
        // Counts are written after the reply: after one more request they are up to date.
        fuse.statfs(ROOT).unwrap();
        self.fixture.engine().counters.held()
    }

    /// True if the engine is dead, or dies at once: the last stores follow the reply. On a busy machine they may be late, and
    /// only the round after the last store waits for nothing.
    fn dies_after_reply(&mut self) -> bool {
        let patience = Instant::now() + Duration::from_secs(3);
        while self.fixture.engine().is_running() && Instant::now() < patience {
            std::thread::sleep(Duration::from_micros(200));
        }
        !self.fixture.engine().is_running()
    }

    /// Has an engine serve `act` that is killed at a store, and another one finish it. True if it was killed.
    fn act<R: Send>(&mut self, die_at: u64, act: impl FnOnce(&Fuse) -> R + Send) -> (R, bool) {
        self.replace_engine(Some(die_at));
        let fuse = self.fixture.guest.fuse().clone();
        std::thread::scope(|scope| {
            let work = scope.spawn(move || act(&fuse));
            let patience = Instant::now() + Duration::from_secs(20);
            while self.fixture.engine().is_running() && !work.is_finished() && Instant::now() < patience {
                std::thread::sleep(Duration::from_micros(200));
            }
            let died = self.dies_after_reply();
            self.replace_engine(None);
            (work.join().unwrap(), died)
        })
    }
}

/// Runs an operation with a kill before each of its stores. Each round has names of its own. After `check` has dropped
/// everything, the guest must hold what it held before.
fn each_store<S, R>(
    prepare: impl Fn(&Fuse, &Path, &str) -> S,
    act: impl Fn(&Fuse, &S, &str) -> R + Sync,
    check: impl Fn(&Fuse, &Path, &S, &str, R),
) where
    S: Sync,
    R: Send,
{
    each_store_with(config(), prepare, act, check);
}

fn each_store_with<S, R>(
    config: EngineConfig,
    prepare: impl Fn(&Fuse, &Path, &str) -> S,
    act: impl Fn(&Fuse, &S, &str) -> R + Sync,
    check: impl Fn(&Fuse, &Path, &S, &str, R),
) where
    S: Sync,
    R: Send,
{
    let mut dying = Dying::new(config);
    for store in 0..MOST_STORES {
        let name = format!("round{store}");
        let before = dying.held();
        let prepared = prepare(dying.fixture.guest.fuse(), dying.fixture.path(), &name);
        let (result, died) = dying.act(store, |fuse| act(fuse, &prepared, &name));
        check(dying.fixture.guest.fuse(), dying.fixture.path(), &prepared, &name, result);
        assert_eq!(dying.held(), before, "store {store}: everything is given back");
        expect_stashed(&mut dying.fixture, 0);
        // Some checks use forgotten nodes on purpose.
        let stale: Vec<_> = dying.fixture.stale().into_iter().filter(|(cause, _)| *cause != Cause::Fenced).collect();
        assert_eq!(stale, [], "store {store}: the guest alone changes anything");
        if !died {
            assert!(store >= 8, "an operation stores more often than {store} times");
            return;
        }
    }
    panic!("the operation makes more than {MOST_STORES} stores");
}

fn make(fuse: &Fuse, name: &str) -> u64 {
    fuse.mknod(ROOT, name, libc::S_IFREG | 0o600, 0).unwrap().nodeid
}

fn nothing(_: &Fuse, _: &Path, _: &str) {}

#[test]
fn lookup() {
    each_store(
        |_, source, name| fs::write(source.join(name), "x").unwrap(),
        |fuse, (), name| fuse.lookup(ROOT, name).unwrap().nodeid,
        |fuse, _, (), _, node| {
            fuse.getattr(node, None).unwrap();
            fuse.forget(node, 1).unwrap();
        },
    );
}

#[test]
fn forget_and_batch_forget() {
    for batch in [false, true] {
        each_store(
            |fuse, _, name| {
                let nodes = [make(fuse, name), make(fuse, &format!("{name}b"))];
                fuse.lookup(ROOT, name).unwrap();
                nodes
            },
            |fuse, nodes, _| {
                if batch {
                    fuse.batch_forget(&nodes.map(|nodeid| ForgetOne { nodeid, nlookup: 1 })).unwrap();
                } else {
                    nodes.iter().for_each(|node| fuse.forget(*node, 1).unwrap());
                }
                // FORGET has no reply; this request is served after it.
                fuse.statfs(ROOT).unwrap();
            },
            |fuse, _, nodes, _, ()| {
                fuse.getattr(nodes[0], None).expect("it was looked up twice and forgotten once");
                assert_eq!(errno(fuse.getattr(nodes[1], None)), Some(libc::ESTALE));
                fuse.forget(nodes[0], 1).unwrap();
            },
        );
    }
}

#[test]
fn names_are_created_once() {
    type Make = fn(&Fuse, &str) -> Result<u64, CallError>;
    let ways: [Make; 4] = [
        |fuse, name| Ok(fuse.mkdir(ROOT, name, 0o700)?.nodeid),
        |fuse, name| Ok(fuse.mknod(ROOT, name, libc::S_IFREG | 0o600, 0)?.nodeid),
        |fuse, name| Ok(fuse.symlink(ROOT, name, "target")?.nodeid),
        |fuse, name| {
            let created = fuse.create(ROOT, name, libc::O_RDWR | libc::O_EXCL, 0o600)?;
            fuse.write(created.entry.nodeid, created.open.fh, 0, b"written", 0)?;
            fuse.release(created.entry.nodeid, created.open.fh, 0)?;
            Ok(created.entry.nodeid)
        },
    ];
    for way in ways {
        each_store(
            nothing,
            |fuse, (), name| way(fuse, name).unwrap(),
            |fuse, source, (), name, node| {
                assert!(source.join(name).symlink_metadata().is_ok());
                assert_eq!(errno(way(fuse, name)), Some(libc::EEXIST), "there it is");
                fuse.forget(node, 1).unwrap();
            },
        );
    }
}

#[test]
fn labels_are_set_on_files_made_by_the_first_run() {
    // Stored as a user attribute: the real one needs a host with security labels.
    let map = Some(":map::user.virtiofs.:".into());
    let config = || EngineConfig { security_label: true, xattr_map: map.clone(), ..config() };
    let label = ("security.selinux".to_owned(), b"system_u:object_r:label_t:s0".to_vec());
    type Make = fn(&Fuse, &str) -> u64;
    let ways: [Make; 2] = [
        |fuse, name| fuse.mkdir(ROOT, name, 0o700).unwrap().nodeid,
        |fuse, name| {
            let created = fuse.create(ROOT, name, libc::O_RDWR, 0o600).unwrap();
            fuse.release(created.entry.nodeid, created.open.fh, 0).unwrap();
            created.entry.nodeid
        },
    ];
    for way in ways {
        let caller = || Caller { label: Some(label.clone()), ..Caller::default() };
        each_store_with(
            config(),
            nothing,
            |fuse, (), name| way(&fuse.as_caller(caller()), name),
            |fuse, _, (), _, node| {
                assert_eq!(fuse.getxattr(node, "security.selinux").unwrap(), label.1);
                fuse.forget(node, 1).unwrap();
            },
        );
    }
}

#[test]
fn names_are_removed_once() {
    each_store(
        |fuse, _, name| make(fuse, name),
        |fuse, _, name| fuse.unlink(ROOT, name).unwrap(),
        |fuse, _, node, name, ()| {
            assert_eq!(errno(fuse.unlink(ROOT, name)), Some(libc::ENOENT));
            fuse.forget(*node, 1).unwrap();
        },
    );
    each_store(
        |fuse, _, name| fuse.mkdir(ROOT, name, 0o700).unwrap().nodeid,
        |fuse, _, name| fuse.rmdir(ROOT, name).unwrap(),
        |fuse, source, node, name, ()| {
            assert!(!source.join(name).exists());
            fuse.forget(*node, 1).unwrap();
        },
    );
}

#[test]
fn an_open_file_survives_its_unlink() {
    each_store(
        |fuse, _, name| fuse.create(ROOT, name, libc::O_RDWR, 0o600).unwrap(),
        |fuse, _, name| fuse.unlink(ROOT, name).unwrap(),
        |fuse, _, file, _, ()| {
            let (node, fh) = (file.entry.nodeid, file.open.fh);
            fuse.write(node, fh, 0, b"still here", 0).unwrap();
            assert_eq!(fuse.read(node, fh, 0, 100).unwrap(), b"still here");
            fuse.release(node, fh, 0).unwrap();
            fuse.forget(node, 1).unwrap();
        },
    );
}

#[test]
fn names_are_renamed_once() {
    // To a free name, over another file, and exchanged with one.
    for (other, flags) in [(false, 0), (true, 0), (true, libc::RENAME_EXCHANGE), (false, libc::RENAME_NOREPLACE)] {
        each_store(
            |fuse, source, name| {
                let node = make(fuse, name);
                let target = other.then(|| make(fuse, &format!("{name}to")));
                fs::write(source.join(name), "moved").unwrap();
                (node, target)
            },
            |fuse, _, name| fuse.rename(ROOT, name, ROOT, format!("{name}to"), flags).unwrap(),
            |fuse, source, (node, target), name, ()| {
                assert_eq!(fs::read(source.join(format!("{name}to"))).unwrap(), b"moved");
                assert_eq!(source.join(name).exists(), flags == libc::RENAME_EXCHANGE);
                assert_eq!(fuse.lookup(ROOT, format!("{name}to")).unwrap().nodeid, *node);
                fuse.forget(*node, 2).unwrap();
                target.iter().for_each(|target| fuse.forget(*target, 1).unwrap());
            },
        );
    }
}

#[test]
fn links_are_created_once() {
    each_store(
        |fuse, _, name| make(fuse, name),
        |fuse, node, name| fuse.link(*node, ROOT, format!("{name}link")).unwrap().nodeid,
        |fuse, _, node, _, linked| {
            assert_eq!((linked, fuse.getattr(*node, None).unwrap().nlink), (*node, 2));
            fuse.forget(*node, 2).unwrap();
        },
    );
}

#[test]
fn data_is_appended_once() {
    let append = libc::O_WRONLY | libc::O_APPEND;
    each_store(
        |fuse, source, name| {
            fs::write(source.join(name), "begin").unwrap();
            let node = fuse.lookup(ROOT, name).unwrap().nodeid;
            (node, fuse.open(node, append).unwrap().fh)
        },
        |fuse, (node, fh), _| fuse.write(*node, *fh, 5, b" and end", append).unwrap(),
        |fuse, source, (node, fh), name, written| {
            assert_eq!((written, fs::read(source.join(name)).unwrap()), (8, b"begin and end".to_vec()));
            fuse.release(*node, *fh, 0).unwrap();
            fuse.forget(*node, 1).unwrap();
        },
    );
}

#[test]
fn ranges_are_inserted_and_collapsed_once() {
    for (mode, size) in [(libc::FALLOC_FL_INSERT_RANGE, 16384), (libc::FALLOC_FL_COLLAPSE_RANGE, 8192)] {
        each_store(
            |fuse, source, name| {
                fs::write(source.join(name), vec![7; 12288]).unwrap();
                let node = fuse.lookup(ROOT, name).unwrap().nodeid;
                (node, fuse.open(node, libc::O_RDWR).unwrap().fh)
            },
            |fuse, (node, fh), _| fuse.fallocate(*node, *fh, mode, 4096, 4096).unwrap(),
            |fuse, source, (node, fh), name, ()| {
                assert_eq!(fs::metadata(source.join(name)).unwrap().len(), size);
                fuse.release(*node, *fh, 0).unwrap();
                fuse.forget(*node, 1).unwrap();
            },
        );
    }
}

/// A copy behind the end of its own file makes the file longer: a second run would find more to copy, or that the ranges
/// overlap.
#[test]
fn ranges_of_a_file_are_copied_within_it_once() {
    for to in [10, 100] {
        each_store(
            |fuse, source, name| {
                fs::write(source.join(name), b"0123456789").unwrap();
                let node = fuse.lookup(ROOT, name).unwrap().nodeid;
                (node, fuse.open(node, libc::O_RDWR).unwrap().fh)
            },
            |fuse, (node, fh), _| fuse.copy_file_range((*node, *fh, 4), (*node, *fh, to), 60).unwrap(),
            |fuse, source, (node, fh), name, copied| {
                assert_eq!(copied, 6);
                let content = fs::read(source.join(name)).unwrap();
                assert_eq!((content.len() as u64, &content[to as usize..]), (to + 6, &b"456789"[..]));
                fuse.release(*node, *fh, 0).unwrap();
                fuse.forget(*node, 1).unwrap();
            },
        );
    }
}

#[test]
fn attributes_are_set_and_removed_once() {
    each_store(
        |fuse, _, name| make(fuse, name),
        |fuse, node, _| fuse.setxattr(*node, "user.a", b"1", libc::XATTR_CREATE).unwrap(),
        |fuse, _, node, _, ()| {
            assert_eq!(errno(fuse.setxattr(*node, "user.a", b"2", libc::XATTR_CREATE)), Some(libc::EEXIST));
            fuse.forget(*node, 1).unwrap();
        },
    );
    each_store(
        |fuse, _, name| {
            let node = make(fuse, name);
            fuse.setxattr(node, "user.a", b"1", 0).unwrap();
            node
        },
        |fuse, node, _| fuse.removexattr(*node, "user.a").unwrap(),
        |fuse, _, node, _, ()| {
            assert_eq!(errno(fuse.removexattr(*node, "user.a")), Some(libc::ENODATA));
            fuse.forget(*node, 1).unwrap();
        },
    );
}

#[test]
fn files_are_opened_and_closed_once() {
    // Without file handles each file is stashed when it is opened.
    for inode_file_handles in [InodeFileHandles::Prefer, InodeFileHandles::Never] {
        each_store_with(
            EngineConfig { inode_file_handles, ..config() },
            |fuse, _, name| make(fuse, name),
            |fuse, node, _| fuse.open(*node, libc::O_RDWR).unwrap().fh,
            |fuse, _, node, _, fh| {
                fuse.write(*node, fh, 0, b"x", 0).unwrap();
                fuse.release(*node, fh, 0).unwrap();
                fuse.forget(*node, 1).unwrap();
            },
        );
    }
    each_store(
        |fuse, _, name| {
            let node = make(fuse, name);
            (node, fuse.open(node, libc::O_RDWR).unwrap().fh)
        },
        |fuse, (node, fh), _| fuse.release(*node, *fh, 0).unwrap(),
        |fuse, _, (node, fh), _, ()| {
            assert_eq!(errno(fuse.read(*node, *fh, 0, 1)), Some(libc::EBADF));
            fuse.forget(*node, 1).unwrap();
        },
    );
}

#[test]
fn directory_entries_are_counted_once() {
    each_store(
        |fuse, source, name| {
            fs::create_dir(source.join(name)).unwrap();
            for n in 0..4 {
                fs::write(source.join(name).join(format!("entry{n}")), "").unwrap();
            }
            let node = fuse.lookup(ROOT, name).unwrap().nodeid;
            (node, fuse.opendir(node).unwrap().fh)
        },
        |fuse, (node, fh), _| fuse.readdirplus(*node, *fh, 0, 4096).unwrap(),
        |fuse, _, (node, fh), _, entries| {
            let listed: Vec<_> = entries.iter().filter_map(|entry| entry.found).map(|found| found.nodeid).collect();
            assert_eq!(listed.iter().filter(|node| **node != 0).count(), 4);
            listed.iter().filter(|node| **node != 0).for_each(|node| fuse.forget(*node, 1).unwrap());
            fuse.releasedir(*node, *fh).unwrap();
            fuse.forget(*node, 1).unwrap();
        },
    );
}
