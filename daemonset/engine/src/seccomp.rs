//! The system call filter: allows only what serving files needs.
//!
//! Several filters are installed, and the kernel applies the strictest result. The last one kills the process on any call
//! that is not listed, and on listed calls whose arguments would reach beyond the engine: it may signal only itself, start
//! only threads, and map no executable memory and none that its limit does not count. The others answer with an error what the C library or the virtiofsd library
//! tries first and can do without. Arguments in memory cannot be read by a filter: `clone3` is therefore answered with
//! `ENOSYS`, so that glibc uses `clone`, and so is `openat2` for a read-only share, so that the library uses `openat`.
//!
//! The calls of reading and writing data have no rules for arguments: the kernel then allows them by a bitmap, without
//! running the filters.

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

/// What glibc passes to `clone` for a thread, and what it may add to it.
const THREAD: u64 = (CLONE_VM | CLONE_FS | CLONE_FILES | CLONE_SIGHAND | CLONE_THREAD | CLONE_SYSVSEM) as u64;
const THREAD_OPTIONS: u64 =
    (CLONE_SETTLS | CLONE_PARENT_SETTID | CLONE_CHILD_SETTID | CLONE_CHILD_CLEARTID | CLONE_DETACHED) as u64;

/// Flags of `open` that create or change a file, or permit to. Each is one bit (`O_TMPFILE` has another one too).
const WRITING_FLAGS: [c_int; 5] = [O_WRONLY, O_RDWR, O_CREAT, O_TRUNC, O_TMPFILE & !O_DIRECTORY];

/// Prevents files from being opened for writing, by this thread and all threads that it starts. For read-only shares, and
/// before the library is started: it finds out at its start that there is no `openat2`.
pub(crate) fn forbid_writing() -> Result<(), SeccompError> {
    let architecture = architecture()?;
    let no_openat2 = BTreeMap::from([(SYS_openat2, Vec::new())]);
    apply(&compile(no_openat2, SeccompAction::Allow, SeccompAction::Errno(ENOSYS as u32), architecture)?)?;
    let for_writing = |flags: u8| WRITING_FLAGS.map(|flag| rule(&[(flags, Masked(flag as u64), flag as u64)]));
    let rules = BTreeMap::from([
        (SYS_openat, for_writing(2).into_iter().collect::<Result<_, _>>()?),
        (SYS_open_by_handle_at, for_writing(2).into_iter().collect::<Result<_, _>>()?),
    ]);
    apply(&compile(rules, SeccompAction::Allow, SeccompAction::Errno(EROFS as u32), architecture)?)
}

/// Installs the filters for this thread and all threads that it starts.
pub(crate) fn install(writable: bool) -> Result<(), SeccompError> {
    let architecture = architecture()?;
    // In this order: the closed list does not allow installing another filter.
    let no_clone3 = BTreeMap::from([(SYS_clone3, Vec::new())]);
    apply(&compile(no_clone3, SeccompAction::Allow, SeccompAction::Errno(ENOSYS as u32), architecture)?)?;
    apply(&closed_list(writable, std::process::id(), architecture)?)
}

fn architecture() -> Result<TargetArch, SeccompError> {
    TargetArch::try_from(std::env::consts::ARCH).map_err(|_| SeccompError::Architecture)
}

fn apply(filter: &BpfProgram) -> Result<(), SeccompError> {
    apply_filter(filter).map_err(SeccompError::Install)
}

/// The filter that kills. `process`: this process's number in its own PID namespace.
fn closed_list(writable: bool, process: u32, architecture: TargetArch) -> Result<BpfProgram, SeccompError> {
    let more = if writable { WRITING } else { &[] };
    let mut rules: BTreeMap<_, _> = READING.iter().chain(more).map(|call| (*call, Vec::new())).collect();
    rules.extend(by_argument(process)?);
    compile(rules, SeccompAction::KillProcess, SeccompAction::Allow, architecture)
}

/// Listed calls that are allowed with some arguments only.
fn by_argument(process: u32) -> Result<BTreeMap<c_long, Vec<SeccompRule>>, SeccompError> {
    let command = |command: c_int| (1, Equal, command as u64);
    let option = |option: c_int| (0, Equal, option as u64);
    // A shared eventfd stays non-blocking, and no signal is sent when it is ready.
    let non_blocking = (2, Masked((O_NONBLOCK | O_ASYNC) as u64), O_NONBLOCK as u64);
    let not_executable = (2, Masked(PROT_EXEC as u64), 0);
    // RLIMIT_DATA counts private memory only.
    let (mapped, kind) = (MAP_ANONYMOUS as u64, (MAP_ANONYMOUS | MAP_TYPE) as u64);
    let of_a_file = (3, Masked(mapped), 0);
    let private = (3, Masked(kind), (MAP_ANONYMOUS | MAP_PRIVATE) as u64);
    Ok(BTreeMap::from([
        (SYS_clone, vec![rule(&[(0, MaskedLong(!THREAD_OPTIONS), THREAD)])?]),
        (SYS_tgkill, vec![rule(&[(0, Equal, process.into())])?]),
        (
            SYS_fcntl,
            vec![
                rule(&[command(F_DUPFD_CLOEXEC)])?,
                rule(&[command(F_GETFD)])?,
                rule(&[command(F_SETFD)])?,
                rule(&[command(F_GETFL)])?,
                rule(&[command(F_SETFL), non_blocking])?,
            ],
        ),
        (
            SYS_prctl,
            vec![
                rule(&[option(PR_SET_NAME)])?,
                // The library reads its capabilities before it changes the effective ones.
                rule(&[option(PR_CAPBSET_READ)])?,
                rule(&[option(PR_CAP_AMBIENT), (1, Equal, PR_CAP_AMBIENT_IS_SET as u64)])?,
            ],
        ),
        (SYS_mmap, vec![rule(&[not_executable, of_a_file])?, rule(&[not_executable, private])?]),
        (SYS_mprotect, vec![rule(&[not_executable])?]),
    ]))
}

/// How an argument is compared.
#[derive(Clone, Copy)]
enum Comparison {
    /// Its lower half.
    Equal,
    /// These bits of its lower half.
    Masked(u64),
    /// These bits.
    MaskedLong(u64),
}

use Comparison::{Equal, Masked, MaskedLong};

/// A rule that is met if all arguments, by number, compare equal to their values.
fn rule(conditions: &[(u8, Comparison, u64)]) -> Result<SeccompRule, SeccompError> {
    let condition = |(argument, comparison, value): &(u8, Comparison, u64)| {
        let (length, operator) = match comparison {
            Equal => (SeccompCmpArgLen::Dword, SeccompCmpOp::Eq),
            Masked(mask) => (SeccompCmpArgLen::Dword, SeccompCmpOp::MaskedEq(*mask)),
            MaskedLong(mask) => (SeccompCmpArgLen::Qword, SeccompCmpOp::MaskedEq(*mask)),
        };
        SeccompCondition::new(*argument, length, operator, *value)
    };
    let conditions = conditions.iter().map(condition).collect::<Result<_, _>>().map_err(SeccompError::Compile)?;
    SeccompRule::new(conditions).map_err(SeccompError::Compile)
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
pub(crate) mod tests {
    use super::*;

    /// Denies new namespaces to this process, as the seccomp profile of a container runtime does.
    pub(crate) fn deny_user_namespaces() {
        let rules = BTreeMap::from([
            (SYS_unshare, Vec::new()),
            (SYS_clone, vec![rule(&[(0, MaskedLong(CLONE_NEWUSER as u64), CLONE_NEWUSER as u64)]).unwrap()]),
        ]);
        let denied = SeccompAction::Errno(EPERM as u32);
        apply(&compile(rules, SeccompAction::Allow, denied, architecture().unwrap()).unwrap()).unwrap();
    }

    #[test]
    fn a_read_only_engine_cannot_change_files() {
        for call in [SYS_unlinkat, SYS_renameat2, SYS_pwritev2, SYS_setresuid, SYS_ftruncate] {
            assert!(!READING.contains(&call) && WRITING.contains(&call));
        }
    }

    /// The kernel runs no filter for calls that all filters allow whatever the arguments are.
    #[test]
    fn calls_on_the_path_of_data_have_no_argument_rules() {
        let by_argument = by_argument(1).unwrap();
        let hot = [
            SYS_futex,
            SYS_preadv,
            SYS_preadv2,
            SYS_pwritev,
            SYS_pwritev2,
            SYS_read,
            SYS_write,
            SYS_newfstatat,
            SYS_statx,
            SYS_getdents64,
            SYS_epoll_wait,
        ];
        for call in hot {
            assert!(!by_argument.contains_key(&call), "{call}");
            assert!(READING.contains(&call) || WRITING.contains(&call), "{call}");
        }
    }
}
