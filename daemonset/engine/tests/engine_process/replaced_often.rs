//! A file that the host replaces by rename at a high rate while programs of the guest open it: no program sees an error.

use std::fs;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use testkit::fuse::call::CallError;
use testkit::fuse::client::Fuse;
use virtiofs_config::{EngineConfig, InodeFileHandles};

use crate::fixture::{Fixture, ROOT, config};

/// Number of files that a program opens.
const OPENS: usize = 400;
/// Length of each file that replaces another.
const LENGTH: usize = 64;
/// A second attempt to open that takes longer is not taken for one (`session_fs/recent_lookups.rs`). On a busy machine this
/// process may not run for so long.
const SECOND_ATTEMPT: Duration = Duration::from_millis(900);

/// How often programs saw `ESTALE`, and how often the kernel had to repeat an open.
#[derive(Debug, Default)]
struct Opens {
    repeated: usize,
    stale: usize,
    late: usize,
}

/// Opens the file as Linux does: the node of the name in the cache, and upon `ESTALE` once more what LOOKUP finds, which
/// is sent twice for a name that leads to another node now (`do_filp_open`, `fuse_dentry_revalidate`).
struct Kernel {
    fuse: Fuse,
    cached: Option<u64>,
    opens: Opens,
}

impl Kernel {
    fn of(fixture: &Fixture) -> Self {
        Kernel { fuse: fixture.guest.fuse().clone(), cached: None, opens: Opens::default() }
    }

    fn lookup(&mut self) -> u64 {
        let node = self.fuse.lookup(ROOT, "f").unwrap().nodeid;
        if let Some(before) = self.cached.replace(node) {
            self.fuse.forget(before, 1).unwrap();
        }
        node
    }

    fn open(&mut self, flags: i32) -> Result<(u64, u64), CallError> {
        let start = Instant::now();
        let node = match self.cached {
            Some(node) => node,
            None => self.lookup(),
        };
        match self.fuse.open(node, flags) {
            Err(error) if is_stale(&error) => self.opens.repeated += 1,
            opened => return Ok((node, opened?.fh)),
        }
        self.lookup();
        let node = self.lookup();
        let opened = self.fuse.open(node, flags);
        if let Err(error) = &opened {
            assert!(is_stale(error), "{error}");
            let late = start.elapsed() > SECOND_ATTEMPT;
            *(if late { &mut self.opens.late } else { &mut self.opens.stale }) += 1;
        }
        Ok((node, opened?.fh))
    }

    /// Opens and reads the file. The contents must be those of one file that had the name.
    fn read(&mut self) {
        let Ok((node, fh)) = self.open(libc::O_RDONLY) else { return };
        let contents = self.fuse.read(node, fh, 0, 2 * LENGTH as u32).unwrap();
        assert!(contents.len() == LENGTH && contents.iter().all(|byte| *byte == contents[0]), "{contents:?}");
        self.fuse.release(node, fh, libc::O_RDONLY).unwrap();
    }

    /// Empties the file and writes it. The file may have lost its name before.
    fn write(&mut self) {
        let Ok((node, fh)) = self.open(libc::O_WRONLY | libc::O_TRUNC) else { return };
        self.fuse.write(node, fh, 0, &[b'w'; LENGTH], 0).unwrap();
        self.fuse.release(node, fh, libc::O_WRONLY).unwrap();
    }
}

fn is_stale(error: &CallError) -> bool {
    error.errno().map(|errno| errno as i32) == Some(libc::ESTALE)
}

/// Replaces the file until it is stopped.
fn replace(directory: &Path, stop: &AtomicBool, replaced: &AtomicU64) {
    for byte in (b'a'..=b'z').cycle().take_while(|_| !stop.load(Ordering::Relaxed)) {
        fs::write(directory.join("beside"), [byte; LENGTH]).unwrap();
        fs::rename(directory.join("beside"), directory.join("f")).unwrap();
        replaced.fetch_add(1, Ordering::Relaxed);
    }
}

/// Runs `program` while the host replaces the file.
fn under_replacement(config: EngineConfig, program: impl FnOnce(&Fixture)) -> u64 {
    let fixture = Fixture::new(config);
    fs::write(fixture.path().join("f"), [b'a'; LENGTH]).unwrap();
    let (stop, replaced) = (AtomicBool::new(false), AtomicU64::new(0));
    thread::scope(|scope| {
        let host = scope.spawn(|| replace(fixture.path(), &stop, &replaced));
        program(&fixture);
        stop.store(true, Ordering::Relaxed);
        host.join().unwrap();
    });
    replaced.into_inner()
}

fn modes() -> [EngineConfig; 3] {
    let with = |inode_file_handles| EngineConfig { inode_file_handles, ..config() };
    [with(InodeFileHandles::Prefer), with(InodeFileHandles::Mandatory), with(InodeFileHandles::Never)]
}

#[test]
fn programs_open_a_file_that_is_replaced_at_a_high_rate() {
    for config in modes() {
        let mode = config.inode_file_handles;
        let mut opens = Opens::default();
        let replaced = under_replacement(config, |fixture| {
            let mut kernel = Kernel::of(fixture);
            for turn in 0..OPENS {
                if turn % 4 == 0 { kernel.write() } else { kernel.read() }
            }
            opens = kernel.opens;
        });
        println!("{mode:?}: {OPENS} opens, {replaced} replacements, {opens:?}");
        assert!(opens.repeated > 10, "{mode:?}: the file was hardly replaced: {replaced}, {opens:?}");
        assert_eq!(opens.stale, 0, "{mode:?}: {opens:?} of {OPENS} in {replaced} replacements");
    }
}
