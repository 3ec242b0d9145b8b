//! The system call filter: allows only what serving files needs.
//!
//! There are two filters, and the kernel applies the stricter result. The first kills the process on any call that is not
//! listed. The second answers `clone3` with `ENOSYS`, because its flags are in memory, which no filter can read. glibc then
//! uses `clone`, whose flags are checked: threads are allowed, new namespaces, in which an engine would have all
//! capabilities, are not.

use std::collections::BTreeMap;

use libc::*;
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule,
    TargetArch, apply_filter,
};
use thiserror::Error;

/// Why the filter could not be installed.
#[derive(Debug, Error)]
pub(crate) enum SeccompError {
    /// The filter could not be compiled.
    #[error("compile: {0}")]
    Compile(seccompiler::BackendError),
    /// The kernel rejected it.
    #[error("install: {0}")]
    Install(seccompiler::Error),
    /// There is no filter for this processor.
    #[error("no filter is known for this processor")]
    Architecture,
}

/// Needed for every share: memory, threads, the control channel, the rings, reading files.
const READING: &[c_long] = &[
    SYS_accept4,
    SYS_brk,
    SYS_capget,
    SYS_capset,
    SYS_clock_gettime,
    SYS_clone,
    SYS_clone3,
    SYS_close,
    SYS_dup,
    SYS_epoll_create1,
    SYS_epoll_ctl,
    SYS_epoll_pwait,
    #[cfg(target_arch = "x86_64")]
    SYS_epoll_wait,
    SYS_eventfd2,
    SYS_exit,
    SYS_exit_group,
    SYS_fchdir,
    SYS_fcntl,
    SYS_fdatasync,
    SYS_fgetxattr,
    SYS_flistxattr,
    SYS_fstat,
    SYS_fstatfs,
    SYS_fsync,
    SYS_futex,
    SYS_getdents64,
    SYS_getegid,
    SYS_geteuid,
    SYS_getpid,
    SYS_getrandom,
    SYS_gettid,
    SYS_getxattr,
    SYS_listxattr,
    SYS_lseek,
    SYS_madvise,
    SYS_mmap,
    SYS_mprotect,
    SYS_mremap,
    SYS_munmap,
    SYS_name_to_handle_at,
    SYS_newfstatat,
    SYS_open_by_handle_at,
    SYS_openat,
    SYS_openat2,
    #[cfg(target_arch = "x86_64")]
    SYS_open,
    SYS_prctl,
    SYS_pread64,
    SYS_preadv,
    SYS_preadv2,
    SYS_read,
    SYS_readlinkat,
    SYS_readv,
    SYS_recvmsg,
    // A wait with a timeout that continues after the process was stopped.
    SYS_restart_syscall,
    SYS_rseq,
    SYS_rt_sigaction,
    SYS_rt_sigprocmask,
    SYS_rt_sigreturn,
    SYS_sched_getaffinity,
    SYS_sched_yield,
    SYS_sendmsg,
    SYS_set_robust_list,
    SYS_sigaltstack,
    SYS_statx,
    SYS_syncfs,
    SYS_tgkill,
    SYS_umask,
    SYS_write,
    SYS_writev,
];

/// Also needed for writable shares.
const WRITING: &[c_long] = &[
    SYS_copy_file_range,
    SYS_fallocate,
    SYS_fchmod,
    SYS_fchmodat,
    SYS_fchownat,
    SYS_fremovexattr,
    SYS_fsetxattr,
    SYS_ftruncate,
    SYS_linkat,
    SYS_mkdirat,
    SYS_mknodat,
    SYS_pwrite64,
    SYS_pwritev,
    SYS_pwritev2,
    SYS_removexattr,
    SYS_renameat2,
    SYS_setgroups,
    SYS_setresgid,
    SYS_setresuid,
    SYS_setxattr,
    SYS_symlinkat,
    SYS_unlinkat,
    SYS_utimensat,
    #[cfg(target_arch = "x86_64")]
    SYS_renameat,
];

const NEW_NAMESPACES: u64 =
    (CLONE_NEWCGROUP | CLONE_NEWIPC | CLONE_NEWNET | CLONE_NEWNS | CLONE_NEWPID | CLONE_NEWUSER | CLONE_NEWUTS) as u64;

/// Installs the filters for this thread and all threads that it starts.
pub(crate) fn install(writable: bool) -> Result<(), SeccompError> {
    let architecture = TargetArch::try_from(std::env::consts::ARCH).map_err(|_| SeccompError::Architecture)?;
    // In this order: the closed list does not allow installing another filter.
    apply_filter(&without_clone3(architecture)?).map_err(SeccompError::Install)?;
    apply_filter(&closed_list(writable, architecture)?).map_err(SeccompError::Install)?;
    Ok(())
}

fn closed_list(writable: bool, architecture: TargetArch) -> Result<BpfProgram, SeccompError> {
    let more = if writable { WRITING } else { &[] };
    let mut rules: BTreeMap<_, _> = READING.iter().chain(more).map(|call| (*call, Vec::new())).collect();
    rules.insert(SYS_clone, vec![in_the_same_namespaces()?]);
    compile(rules, SeccompAction::KillProcess, SeccompAction::Allow, architecture)
}

/// Allows `clone` without new namespaces.
fn in_the_same_namespaces() -> Result<SeccompRule, SeccompError> {
    let flags = SeccompCmpOp::MaskedEq(NEW_NAMESPACES);
    let condition = SeccompCondition::new(0, SeccompCmpArgLen::Qword, flags, 0).map_err(SeccompError::Compile)?;
    SeccompRule::new(vec![condition]).map_err(SeccompError::Compile)
}

fn without_clone3(architecture: TargetArch) -> Result<BpfProgram, SeccompError> {
    let rules = BTreeMap::from([(SYS_clone3, Vec::new())]);
    compile(rules, SeccompAction::Allow, SeccompAction::Errno(ENOSYS as u32), architecture)
}

/// A filter with `matched` for the calls in `rules`, and `other` for all others.
fn compile(
    rules: BTreeMap<c_long, Vec<SeccompRule>>,
    other: SeccompAction,
    matched: SeccompAction,
    architecture: TargetArch,
) -> Result<BpfProgram, SeccompError> {
    let filter = SeccompFilter::new(rules, other, matched, architecture).map_err(SeccompError::Compile)?;
    filter.try_into().map_err(SeccompError::Compile)
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sys::signal::Signal;
    use nix::sys::wait::{WaitStatus, waitpid};
    use nix::unistd::{ForkResult, fork};

    #[test]
    fn a_read_only_engine_cannot_change_files() {
        for call in [SYS_unlinkat, SYS_renameat2, SYS_pwritev2, SYS_setresuid, SYS_ftruncate] {
            assert!(!READING.contains(&call) && WRITING.contains(&call));
        }
    }

    #[test]
    fn no_engine_may_execute_connect_or_mount() {
        for call in [SYS_execve, SYS_socket, SYS_connect, SYS_ptrace, SYS_mount, SYS_unshare, SYS_setns, SYS_chroot] {
            assert!(!READING.contains(&call) && !WRITING.contains(&call));
        }
    }

    /// How a child process ends that installs the filter and then calls `act`.
    fn end_of_a_child(act: fn()) -> WaitStatus {
        let filter = closed_list(false, TargetArch::try_from(std::env::consts::ARCH).unwrap()).unwrap();
        // SAFETY: the child only makes system calls before it ends itself; the filter was made before the fork.
        let forked = unsafe { fork() };
        match forked.unwrap() {
            ForkResult::Child => {
                if apply_filter(&filter).is_ok() {
                    act();
                }
                // SAFETY: ends the process at once.
                unsafe { _exit(7) }
            }
            ForkResult::Parent { child } => waitpid(child, None).unwrap(),
        }
    }

    fn clone_with(flags: c_int) {
        // SAFETY: like fork: no memory is shared, and the new process ends at once.
        let pid = unsafe { syscall(SYS_clone, flags | SIGCHLD, 0, 0, 0, 0) };
        if pid == 0 {
            // SAFETY: as above.
            unsafe { _exit(0) }
        }
    }

    #[test]
    fn new_namespaces_are_denied() {
        assert!(matches!(end_of_a_child(|| clone_with(0)), WaitStatus::Exited(_, 7)));
        for act in [|| clone_with(CLONE_NEWUSER), || clone_with(CLONE_NEWNS), || clone_with(CLONE_NEWPID | CLONE_FS)] {
            let end = end_of_a_child(act);
            assert!(matches!(end, WaitStatus::Signaled(_, Signal::SIGSYS, _)), "{end:?}");
        }
    }

    #[test]
    fn both_filters_compile() {
        let architecture = TargetArch::try_from(std::env::consts::ARCH).unwrap();
        for writable in [false, true] {
            assert!(!closed_list(writable, architecture).unwrap().is_empty());
        }
        assert!(!without_clone3(architecture).unwrap().is_empty());
    }
}
