//! System calls that reach beyond the process.

use std::io;

use libc::*;
use virtiofs_config::Access;

use super::harness::{ALL, Outcome, Scene, Start, call};

type Probe = (&'static str, fn() -> io::Result<i64>);

fn parent() -> i64 {
    // The broker is the parent of an engine; these processes are children of the test.
    std::os::unix::process::parent_id().into()
}

fn fork_by(flags: c_int) -> io::Result<i64> {
    let pid = call(SYS_clone, &[flags.into()])?;
    if pid == 0 {
        // SAFETY: ends the process that should not exist.
        unsafe { _exit(0) }
    }
    Ok(pid)
}

fn address(at: &mut [u64; 16]) -> i64 {
    at.as_mut_ptr() as i64
}

/// Signals, processes and their control.
const PROCESSES: &[Probe] = &[
    ("tgkill of the parent", || call(SYS_tgkill, &[parent(), parent(), 0])),
    ("tkill", || call(SYS_tkill, &[parent(), 0])),
    ("kill", || call(SYS_kill, &[parent(), 0])),
    ("kill of all", || call(SYS_kill, &[-1, 0])),
    ("rt_sigqueueinfo", || call(SYS_rt_sigqueueinfo, &[parent(), 0, 0])),
    ("rt_tgsigqueueinfo", || call(SYS_rt_tgsigqueueinfo, &[parent(), parent(), 0, 0])),
    ("pidfd_open", || call(SYS_pidfd_open, &[parent(), 0])),
    ("pidfd_send_signal", || call(SYS_pidfd_send_signal, &[0, 0, 0, 0])),
    ("pidfd_getfd", || call(SYS_pidfd_getfd, &[0, 0, 0])),
    ("fork", || fork_by(SIGCHLD)),
    ("fork into a user namespace", || fork_by(SIGCHLD | CLONE_NEWUSER)),
    ("fork into a PID namespace", || fork_by(SIGCHLD | CLONE_NEWPID)),
    ("fork with shared descriptors", || fork_by(SIGCHLD | CLONE_FILES)),
    ("fork with another parent", || fork_by(SIGCHLD | CLONE_PARENT)),
    ("a thread that is traced", || {
        fork_by(CLONE_VM | CLONE_FS | CLONE_FILES | CLONE_SIGHAND | CLONE_THREAD | CLONE_PTRACE)
    }),
    ("vfork", || fork_by(SIGCHLD | CLONE_VFORK)),
    ("execve", || call(SYS_execve, &[c"/bin/true".as_ptr() as i64, 0, 0])),
    ("execveat", || call(SYS_execveat, &[-1, c"/bin/true".as_ptr() as i64, 0, 0, 0])),
    ("ptrace", || call(SYS_ptrace, &[PTRACE_TRACEME.into()])),
    ("process_vm_readv", || call(SYS_process_vm_readv, &[parent(), 0, 0, 0, 0, 0])),
    ("process_vm_writev", || call(SYS_process_vm_writev, &[parent(), 0, 0, 0, 0, 0])),
    ("kcmp", || call(SYS_kcmp, &[parent(), parent(), 0, 0, 0])),
    ("prlimit64", || call(SYS_prlimit64, &[0, RLIMIT_DATA.into(), 0, 0])),
    ("setrlimit", || call(SYS_setrlimit, &[RLIMIT_DATA.into(), 0])),
    ("setpriority", || call(SYS_setpriority, &[0, parent(), 0])),
    ("sched_setscheduler", || call(SYS_sched_setscheduler, &[parent(), 0, 0])),
    ("sched_setaffinity", || call(SYS_sched_setaffinity, &[parent(), 0, 0])),
    ("timer_create", || call(SYS_timer_create, &[0, 0, 0])),
];

/// Other kernel interfaces.
const INTERFACES: &[Probe] = &[
    ("socket", || call(SYS_socket, &[AF_UNIX.into(), SOCK_STREAM.into(), 0])),
    ("socketpair", || call(SYS_socketpair, &[AF_UNIX.into(), SOCK_STREAM.into(), 0, address(&mut [0; 16])])),
    ("connect", || call(SYS_connect, &[0, 0, 0])),
    ("bind", || call(SYS_bind, &[0, 0, 0])),
    ("sendto", || call(SYS_sendto, &[0, 0, 0, 0, 0, 0])),
    ("io_uring_setup", || call(SYS_io_uring_setup, &[1, address(&mut [0; 16])])),
    ("bpf", || call(SYS_bpf, &[0, 0, 0])),
    ("perf_event_open", || call(SYS_perf_event_open, &[0, 0, 0, 0, 0])),
    ("userfaultfd", || call(SYS_userfaultfd, &[0])),
    ("memfd_create", || call(SYS_memfd_create, &[c"x".as_ptr() as i64, 0])),
    ("keyctl", || call(SYS_keyctl, &[0, 0, 0, 0, 0])),
    ("ioctl", || call(SYS_ioctl, &[0, FIONREAD as i64, 0])),
    ("personality", || call(SYS_personality, &[0xffff_ffff])),
    ("seccomp", || call(SYS_seccomp, &[0, 0, 0])),
    ("landlock_create_ruleset", || call(SYS_landlock_create_ruleset, &[0, 0, 1])),
    ("shmget", || call(SYS_shmget, &[0, 4096, 0])),
    ("mq_open", || call(SYS_mq_open, &[0, 0, 0, 0])),
    ("add_key", || call(SYS_add_key, &[0, 0, 0, 0, 0])),
    ("mount", || call(SYS_mount, &[0, 0, 0, 0, 0])),
    ("umount2", || call(SYS_umount2, &[c"/".as_ptr() as i64, MNT_DETACH.into()])),
    ("open_tree", || call(SYS_open_tree, &[0, 0, 0])),
    ("move_mount", || call(SYS_move_mount, &[0, 0, 0, 0, 0])),
    ("mount_setattr", || call(SYS_mount_setattr, &[0, 0, 0, 0, 0])),
    ("fsopen", || call(SYS_fsopen, &[c"proc".as_ptr() as i64, 0])),
    ("unshare", || call(SYS_unshare, &[CLONE_FS.into()])),
    ("setns", || call(SYS_setns, &[0, 0])),
    ("chroot", || call(SYS_chroot, &[c"/".as_ptr() as i64])),
    ("pivot_root", || call(SYS_pivot_root, &[c"/".as_ptr() as i64, c"/".as_ptr() as i64])),
    ("swapon", || call(SYS_swapon, &[0, 0])),
    ("reboot", || call(SYS_reboot, &[0, 0, 0])),
    ("finit_module", || call(SYS_finit_module, &[0, 0, 0])),
    ("fanotify_init", || call(SYS_fanotify_init, &[0, 0])),
    ("inotify_init1", || call(SYS_inotify_init1, &[0])),
];

/// Commands of calls that are listed.
const COMMANDS: &[Probe] = &[
    ("F_SETOWN", || call(SYS_fcntl, &[0, F_SETOWN.into(), 0])),
    ("F_SETOWN_EX", || call(SYS_fcntl, &[0, 15, address(&mut [0; 16])])),
    ("F_SETSIG", || call(SYS_fcntl, &[0, 10, 0])),
    ("F_NOTIFY", || call(SYS_fcntl, &[0, F_NOTIFY.into(), 0])),
    ("F_SETLEASE", || call(SYS_fcntl, &[0, F_SETLEASE.into(), 0])),
    ("F_SETPIPE_SZ", || call(SYS_fcntl, &[1, F_SETPIPE_SZ.into(), 1 << 20])),
    ("F_ADD_SEALS", || call(SYS_fcntl, &[0, F_ADD_SEALS.into(), 0])),
    ("F_SETLK", || call(SYS_fcntl, &[0, F_SETLK.into(), address(&mut [0; 16])])),
    ("F_DUPFD", || call(SYS_fcntl, &[0, F_DUPFD.into(), 0])),
    ("F_SETFL to blocking", || call(SYS_fcntl, &[1, F_SETFL.into(), 0])),
    ("F_SETFL with O_ASYNC", || call(SYS_fcntl, &[1, F_SETFL.into(), (O_NONBLOCK | O_ASYNC).into()])),
    ("PR_SET_DUMPABLE", || call(SYS_prctl, &[PR_SET_DUMPABLE.into(), 1])),
    ("PR_SET_PTRACER", || call(SYS_prctl, &[PR_SET_PTRACER.into(), -1])),
    ("PR_SET_PDEATHSIG", || call(SYS_prctl, &[PR_SET_PDEATHSIG.into(), 0])),
    ("PR_SET_CHILD_SUBREAPER", || call(SYS_prctl, &[PR_SET_CHILD_SUBREAPER.into(), 1])),
    ("PR_SET_SECCOMP", || call(SYS_prctl, &[PR_SET_SECCOMP.into(), 1])),
    ("PR_SET_MM", || call(SYS_prctl, &[PR_SET_MM.into(), 1, 0])),
    ("PR_CAP_AMBIENT_RAISE", || call(SYS_prctl, &[PR_CAP_AMBIENT.into(), PR_CAP_AMBIENT_RAISE.into(), 2])),
    ("executable memory", || {
        let flags = i64::from(MAP_PRIVATE | MAP_ANONYMOUS);
        call(SYS_mmap, &[0, 4096, (PROT_READ | PROT_WRITE | PROT_EXEC).into(), flags, -1, 0])
    }),
    ("shared memory, which RLIMIT_DATA does not count", || {
        let flags = i64::from(MAP_SHARED | MAP_ANONYMOUS);
        call(SYS_mmap, &[0, 4096, (PROT_READ | PROT_WRITE).into(), flags, -1, 0])
    }),
    ("memory that becomes executable", || {
        let flags = i64::from(MAP_PRIVATE | MAP_ANONYMOUS);
        let memory = call(SYS_mmap, &[0, 4096, (PROT_READ | PROT_WRITE).into(), flags, -1, 0])?;
        call(SYS_mprotect, &[memory, 4096, (PROT_READ | PROT_EXEC).into()])
    }),
];

#[test]
fn calls_that_reach_beyond_the_engine_end_it() {
    let Some(scene) = Scene::new() else { return };
    for start in ALL {
        for access in [Access::ReadOnly, Access::ReadWrite] {
            for (what, probe) in [PROCESSES, INTERFACES, COMMANDS].concat() {
                assert_eq!(scene.probe(start, access, probe), Outcome::Killed, "{what} ({start:?}, {access:?})");
            }
        }
    }
}

#[test]
fn calls_that_serve_files_are_allowed() {
    let Some(scene) = Scene::new() else { return };
    let own = || i64::from(std::process::id());
    let probes: &[(&str, &dyn Fn() -> io::Result<i64>)] = &[
        ("a thread", &|| std::thread::spawn(|| 7).join().map_err(|_| io::Error::other("panic"))),
        ("a named thread", &|| {
            let thread = std::thread::Builder::new().name("named".into()).spawn(|| 7)?;
            thread.join().map_err(|_| io::Error::other("panic"))
        }),
        ("a signal to itself", &|| call(SYS_tgkill, &[own(), own(), 0])),
        ("F_DUPFD_CLOEXEC", &|| call(SYS_fcntl, &[0, F_DUPFD_CLOEXEC.into(), 0])),
        ("F_SETFL to non-blocking", &|| call(SYS_fcntl, &[1, F_SETFL.into(), O_NONBLOCK.into()])),
        ("memory", &|| Ok(vec![1u8; 64 << 20].iter().map(|byte| i64::from(*byte)).sum())),
        ("reading capabilities", &|| caps::read(None, caps::CapSet::Bounding).map(|_| 0).map_err(io::Error::other)),
    ];
    for start in ALL {
        for (what, probe) in probes {
            assert_eq!(scene.probe(start, Access::ReadOnly, probe), Outcome::Reached, "{what} ({start:?})");
        }
    }
}

#[test]
fn calls_with_flags_in_memory_do_not_exist() {
    let Some(scene) = Scene::new() else { return };
    let clone3 = || call(SYS_clone3, &[address(&mut [0; 16]), 64]);
    let openat2 = || call(SYS_openat2, &[AT_FDCWD.into(), c".".as_ptr() as i64, address(&mut [0; 16]), 24]);
    for access in [Access::ReadOnly, Access::ReadWrite] {
        assert_eq!(scene.probe(Start::Root, access, clone3), Outcome::Denied(ENOSYS), "{access:?}");
    }
    assert_eq!(scene.probe(Start::Root, Access::ReadOnly, openat2), Outcome::Denied(ENOSYS));
    assert_eq!(scene.probe(Start::Root, Access::ReadWrite, openat2), Outcome::Reached);
}

/// The x32 and i386 calls of a 64-bit process have other numbers.
#[cfg(target_arch = "x86_64")]
#[test]
fn calls_of_other_abis_end_the_engine() {
    let Some(scene) = Scene::new() else { return };
    const X32: i64 = 0x4000_0000;
    for number in [SYS_getpid, SYS_openat, SYS_tgkill, 512 + 1] {
        let probe = || call(X32 | number, &[]);
        assert_eq!(scene.probe(Start::Root, Access::ReadWrite, probe), Outcome::Killed, "x32 {number}");
    }
    let i386 = || {
        const GETPID: i64 = 20;
        let mut value = GETPID;
        // SAFETY: the call has no arguments; the registers that it changes are named.
        unsafe {
            std::arch::asm!("int 0x80", inout("rax") value, out("r8") _, out("r9") _, out("r10") _, out("r11") _)
        };
        Ok(value)
    };
    assert_eq!(scene.probe(Start::Root, Access::ReadWrite, i386), Outcome::Killed, "i386");
}
