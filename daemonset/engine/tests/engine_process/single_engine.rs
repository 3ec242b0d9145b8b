//! A single engine: what it serves, how it is confined, how it answers malformed requests.

use std::os::unix::fs::{MetadataExt, PermissionsExt};

use crate::engine::{self, Engine};
use tempfile::TempDir;
use testkit::fuse::call::Call;
use testkit::fuse::client::read_in;
use testkit::fuse::wire::Opcode;
use virtiofs_config::{Access, EngineConfig, InodeFileHandles, Sandbox};
use virtiofs_contract::engine::{FromEngine, QUEUES, ToEngine};
use virtiofs_contract::preflight::{Finding, HandleOutcome, Reason};
use zerocopy::IntoBytes;

const ROOT: u64 = 1;

fn source() -> TempDir {
    let directory = tempfile::tempdir().unwrap();
    std::fs::write(directory.path().join("hello"), "hello, guest\n").unwrap();
    std::fs::create_dir(directory.path().join("sub")).unwrap();
    directory
}

fn read_write() -> EngineConfig {
    EngineConfig::stock(Access::ReadWrite)
}

fn read_only() -> EngineConfig {
    EngineConfig::stock(Access::ReadOnly)
}

#[test]
fn reads_and_writes_are_counted() {
    let source = source();
    let engine = Engine::start(source.path(), read_write()).unwrap();
    let guest = engine.boot();
    let fuse = guest.fuse();

    let hello = fuse.lookup(ROOT, "hello").unwrap();
    let open = fuse.open(hello.nodeid, libc::O_RDONLY).unwrap();
    assert_eq!(fuse.read(hello.nodeid, open.fh, 0, 4096).unwrap(), b"hello, guest\n");
    let created = fuse.create(ROOT, "new", libc::O_RDWR, 0o640).unwrap();
    assert_eq!(fuse.write(created.entry.nodeid, created.open.fh, 0, b"written", libc::O_RDWR).unwrap(), 7);
    assert_eq!(fuse.lookup(ROOT, "missing").unwrap_err().errno().unwrap() as i32, libc::ENOENT);

    assert_eq!(std::fs::read(source.path().join("new")).unwrap(), b"written");
    let totals = engine.counters.totals();
    assert_eq!((totals.bytes_read, totals.bytes_written, totals.malformed), (13, 7, 0));
    assert_eq!(totals.errnos.iter().map(|e| (e.errno, e.replies)).collect::<Vec<_>>(), [(libc::ENOENT, 1)]);
    let lookups = totals.operations.iter().find(|operation| operation.opcode == 1).unwrap();
    assert_eq!((lookups.requests, lookups.errors), (2, 1));
    assert_eq!(lookups.latency.iter().sum::<u64>(), 2);
    assert!(guest.violations().is_empty());
}

#[test]
fn a_read_only_share_is_read_only_twice() {
    let source = source();
    let engine = Engine::start(source.path(), read_only()).unwrap();
    let guest = engine.boot();
    let error = guest.fuse().mkdir(ROOT, "no", 0o755).unwrap_err();
    assert_eq!(error.errno().unwrap() as i32, libc::EROFS);
    let mounts = std::fs::read_to_string(format!("/proc/{}/mountinfo", engine.pid())).unwrap();
    assert_eq!(mounts.lines().count(), 1, "nothing but the share is mounted:\n{mounts}");
    assert!(mounts.split(' ').nth(5).unwrap().split(',').any(|option| option == "ro"), "{mounts}");
}

#[test]
fn an_engine_is_confined() {
    let source = source();
    let engine = Engine::start(source.path(), read_only()).unwrap();
    assert_eq!(engine.status_field("Seccomp"), "2");
    assert_eq!(engine.status_field("NoNewPrivs"), "1");
    // CAP_DAC_READ_SEARCH alone, in every set.
    for set in ["CapEff", "CapPrm", "CapBnd"] {
        assert_eq!(u64::from_str_radix(&engine.status_field(set), 16).unwrap(), 1 << 2, "{set}");
    }
    assert_eq!(engine.preflight.capabilities, ["DAC_READ_SEARCH"]);
    assert_eq!(engine.preflight.sandbox, Sandbox::Namespace);
    for namespace in ["mnt", "net", "ipc", "uts"] {
        let of = |pid: &str| std::fs::read_link(format!("/proc/{pid}/ns/{namespace}")).unwrap();
        assert_ne!(of(&engine.pid().to_string()), of("self"), "{namespace}");
    }
    let root = std::fs::metadata(format!("/proc/{}/root/.", engine.pid())).unwrap();
    assert_eq!(root.ino(), source.path().metadata().unwrap().ino());
    assert_eq!(engine.status_field("Groups"), "");
    let limits = std::fs::read_to_string(format!("/proc/{}/limits", engine.pid())).unwrap();
    let memory = limits.lines().find(|line| line.starts_with("Max data size")).unwrap();
    assert!(!memory.contains("unlimited"), "{memory}");
}

#[test]
fn an_engine_has_only_its_own_descriptors() {
    let source = source();
    let engine = Engine::start(source.path(), read_write()).unwrap();
    let _guest = engine.boot();
    let known =
        ["/", "anon_inode:[eventfd]", "anon_inode:[eventpoll]", "/memfd:", "socket:[", "pipe:[", "/dev/", "/tmp/"];
    // Standard output and error are inherited from the test.
    let ours: Vec<_> = (0..3).filter_map(|fd| std::fs::read_link(format!("/proc/self/fd/{fd}")).ok()).collect();
    for fd in std::fs::read_dir(format!("/proc/{}/fd", engine.pid())).unwrap() {
        let fd = fd.unwrap();
        let target = std::fs::read_link(fd.path()).unwrap();
        if fd.file_name().to_str().unwrap().parse::<u32>().unwrap() < 3 && ours.contains(&target) {
            continue;
        }
        let target = target.display().to_string();
        let allowed = known.iter().any(|known| target == *known || (known.len() > 1 && target.starts_with(known)))
            || target.ends_with("/fd")
            || target.ends_with("/mountinfo");
        assert!(allowed, "{target}");
    }
}

#[test]
fn preflight_reports_what_works() {
    let source = source();
    let found = engine::preflight(source.path(), read_only()).unwrap();
    assert_eq!(found.inode_file_handles, InodeFileHandles::Prefer);
    assert_eq!((found.mounts.len(), found.mounts[0].path.as_str()), (1, "."));
    assert_eq!(found.mounts[0].file_handles, HandleOutcome::Works);
    assert!(found.findings.is_empty(), "{:?}", found.findings);
    assert!(found.guest_open_files < found.open_files);
}

#[test]
fn an_empty_source_has_file_handles() {
    let found = engine::preflight(tempfile::tempdir().unwrap().path(), read_only()).unwrap();
    assert_eq!(found.inode_file_handles, InodeFileHandles::Prefer);
    assert_eq!(found.mounts[0].file_handles, HandleOutcome::DirectoryOnly);
}

#[test]
fn preflight_of_a_source_without_file_handles() {
    let (source, expected) = (std::path::Path::new("/proc/self"), Reason::FileHandlesUnavailable);
    let config = EngineConfig { sandbox: Sandbox::Chroot, ..read_only() };
    let found = engine::preflight(source, config.clone()).unwrap();
    assert_eq!(found.inode_file_handles, InodeFileHandles::Never);
    assert_eq!(found.findings[0].reason, expected, "{:?}", found.findings);
    let demanded = EngineConfig { inode_file_handles: InodeFileHandles::Mandatory, ..config };
    assert_eq!(engine::preflight(source, demanded).unwrap_err().reason, Reason::FileHandlesRequired);
}

#[test]
fn a_chroot_serves() {
    let source = source();
    let engine = Engine::start(source.path(), EngineConfig { sandbox: Sandbox::Chroot, ..read_write() }).unwrap();
    assert_eq!(engine.preflight.sandbox, Sandbox::Chroot);
    assert_eq!(engine.preflight.mounts[0].file_handles, HandleOutcome::Works);
    let guest = engine.boot();
    let sub = guest.fuse().lookup(ROOT, "sub").unwrap();
    guest.fuse().mkdir(sub.nodeid, "deeper", 0o700).unwrap();
    assert!(source.path().join("sub/deeper").is_dir());
}

#[test]
fn root_is_refused_without_a_sandbox() {
    let refused = engine::preflight(source().path(), EngineConfig { sandbox: Sandbox::None, ..read_only() });
    let finding = refused.unwrap_err();
    assert_eq!(finding.reason, Reason::SandboxUnavailable);
    assert!(finding.message.contains("sandbox"), "{finding}");
}

/// Tries a read-only share as root without CAP_SETGID and in these supplementary groups.
fn preflight_in_groups(groups: &[u32]) -> Result<virtiofs_contract::preflight::Preflight, Finding> {
    let source = source();
    std::thread::scope(|scope| {
        let limited = || {
            // SAFETY: the raw system call applies to this thread only (setgroups of the C library to all threads); pointer
            // and length describe one slice.
            let set = unsafe { libc::syscall(libc::SYS_setgroups, groups.len(), groups.as_ptr()) };
            assert_eq!(set, 0);
            caps::drop(None, caps::CapSet::Bounding, caps::Capability::CAP_SETGID).unwrap();
            engine::preflight(source.path(), read_only())
        };
        scope.spawn(limited).join().unwrap()
    })
}

#[test]
fn setgid_is_not_needed_without_supplementary_groups() {
    assert_eq!(preflight_in_groups(&[]).unwrap().sandbox, Sandbox::Namespace);
    let finding = preflight_in_groups(&[4711]).unwrap_err();
    assert!(finding.remedy.contains("CAP_SETGID"), "{finding:?}");
}

#[test]
fn too_few_open_files_are_refused() {
    let finding =
        engine::preflight(source().path(), EngineConfig { open_files: Some(100), ..read_only() }).unwrap_err();
    assert_eq!(finding.reason, Reason::OpenFileLimitTooLow);
    assert!(finding.message.contains("100"), "{finding}");
}

#[test]
fn files_are_created_as_the_guests_user() {
    let source = source();
    std::fs::set_permissions(source.path(), std::fs::Permissions::from_mode(0o777)).unwrap();
    let engine = Engine::start(source.path(), read_write()).unwrap();
    let guest = engine.boot();
    let caller = testkit::fuse::client::Caller { uid: 4711, gid: 815, ..Default::default() };
    guest.fuse().as_caller(caller).mkdir(ROOT, "mine", 0o755).unwrap();
    let made = source.path().join("mine").metadata().unwrap();
    assert_eq!((made.uid(), made.gid()), (4711, 815));
}

#[test]
fn malformed_requests_are_answered() {
    let source = source();
    let engine = Engine::start(source.path(), read_write()).unwrap();
    let guest = engine.boot();
    let fuse = guest.fuse();
    let hello = fuse.lookup(ROOT, "hello").unwrap();
    let open = fuse.open(hello.nodeid, libc::O_RDWR).unwrap();
    let errno =
        |result: Result<_, testkit::fuse::call::CallError>| result.err().and_then(|e| e.errno()).map(|e| e as i32);

    assert_eq!(errno(fuse.read(hello.nodeid, open.fh, 1 << 63, 4096).map(drop)), Some(libc::EINVAL));
    assert_eq!(errno(fuse.read(hello.nodeid, open.fh, u64::MAX, 1).map(drop)), Some(libc::EINVAL));
    assert_eq!(errno(fuse.write(hello.nodeid, open.fh, 1 << 63, b"x", 0).map(drop)), Some(libc::EINVAL));
    for name in ["", ".", "..", "a/b", "/"] {
        assert_eq!(errno(fuse.lookup(ROOT, name).map(drop)), Some(libc::EINVAL), "{name:?}");
        assert_eq!(errno(fuse.unlink(ROOT, name)), Some(libc::EINVAL), "{name:?}");
    }
    // A request that is shorter than its arguments.
    let cut = [0u8; 4];
    assert_eq!(
        errno(fuse.call(&Call::new(Opcode::Read, hello.nodeid, &[&cut]).receiving(64)).map(drop)),
        Some(libc::EIO)
    );
    assert_eq!(engine.counters.totals().malformed, 1);
    // READ, READDIR and READDIRPLUS without room for a header.
    for op in [Opcode::Read, Opcode::Readdir, Opcode::Readdirplus] {
        let arguments = read_in(open.fh, 0, 4096);
        let arguments = [arguments.as_bytes()];
        fuse.call(&Call::new(op, hello.nodeid, &arguments).unanswered()).unwrap();
    }
    assert_eq!(fuse.read(hello.nodeid, open.fh, 0, 5).unwrap(), b"hello");
}

#[test]
fn a_quiesced_engine_begins_no_request_and_loses_none() {
    let source = source();
    let engine = Engine::start(source.path(), read_write()).unwrap();
    let guest = engine.boot();
    for _ in 0..200 {
        engine.control.send(&ToEngine::Quiesce, &[]).unwrap();
        for ring in 0..QUEUES as u16 {
            assert_eq!(engine.control.receive::<FromEngine>().unwrap().0, FromEngine::Quiesced { ring });
        }
        let before = engine.counters.totals().requests();
        let pending = guest.fuse().start(&Call::new(Opcode::Statfs, ROOT, &[]).receiving(80)).unwrap();
        std::thread::yield_now();
        assert_eq!(engine.counters.totals().requests(), before);
        engine.control.send(&ToEngine::Resume, &[]).unwrap();
        assert_eq!(engine.control.receive::<FromEngine>().unwrap().0, FromEngine::Resumed);
        pending.wait().unwrap();
    }
    assert!(guest.violations().is_empty());
}

#[test]
fn an_engine_ends_with_its_vmm_or_broker() {
    let source = source();
    let mut engine = Engine::start(source.path(), read_only()).unwrap();
    drop(engine.boot());
    assert!(engine.ends(), "the VMM has left");

    let mut engine = Engine::start(source.path(), read_only()).unwrap();
    let _guest = engine.boot();
    engine.control = virtiofs_contract::channel::PacketChannel::pair().unwrap().0;
    assert!(engine.ends(), "the broker has closed its channel");
}
