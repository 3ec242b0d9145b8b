//! Starts the engine's program in a new process, in a PID namespace of its own where that is possible.
//!
//! In its own PID namespace an engine has no number for any other process, so it can signal none. The standard library
//! cannot start a process in new namespaces, and `unshare` would make the calling thread unable to start threads, so this
//! uses `clone` itself. The child makes system calls only: it allocates nothing and takes no lock.

use std::ffi::CString;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use libc::{CLONE_NEWPID, CLONE_NEWUSER, CLONE_PIDFD, SIGCHLD, c_char, c_int};
use rustix::process::{WaitId, WaitIdOptions, getegid, geteuid, waitid};
use virtiofs_contract::engine::CONTROL_FD;

/// The program and what it inherits.
pub(super) struct Launch<'a> {
    pub(super) program: &'a Path,
    /// A pidfd of this process.
    pub(super) broker: BorrowedFd<'a>,
    /// Becomes standard input.
    pub(super) input: BorrowedFd<'a>,
    /// Becomes standard output and standard error.
    pub(super) output: BorrowedFd<'a>,
    /// Becomes [`CONTROL_FD`].
    pub(super) control: BorrowedFd<'a>,
    /// True if the engine makes a user namespace anyway: then it starts in one, which permits a PID namespace to users
    /// other than root.
    pub(super) user_namespace: bool,
    /// False: it outlives this process.
    pub(super) ends_with_broker: bool,
}

/// A started process.
#[derive(Debug)]
pub(super) struct Launched {
    pub(super) pid: u32,
    pub(super) pidfd: OwnedFd,
}

/// What the child sends through its pipe if it does not get as far as exec.
#[repr(C)]
struct Failure {
    /// 1: in the set-up of its namespaces.
    in_namespaces: c_int,
    errno: c_int,
}

/// All that the child needs, made before it exists.
struct Prepared {
    program: CString,
    uid_map: String,
    gid_map: String,
    /// In this order: standard input, output, error, control channel.
    fds: [(RawFd, RawFd); 4],
    /// The process that it must not outlive.
    broker: Option<RawFd>,
    failure: RawFd,
}

impl Launch<'_> {
    /// Starts the program, in as many new namespaces as are permitted.
    ///
    /// # Errors
    /// Why the program could not be executed.
    pub(super) fn start(&self) -> io::Result<Launched> {
        let mut attempts = vec![CLONE_NEWPID];
        attempts.extend(self.user_namespace.then_some(CLONE_NEWUSER | CLONE_NEWPID));
        for namespaces in attempts {
            match self.start_in(namespaces) {
                Err(Refused::Namespaces(error)) => {
                    tracing::debug!(%error, namespaces, "the engine gets no PID namespace this way");
                }
                Err(Refused::Program(error)) => return Err(error),
                Ok(launched) => return Ok(launched),
            }
        }
        self.start_in(0).map_err(|(Refused::Namespaces(error) | Refused::Program(error))| error)
    }

    fn start_in(&self, namespaces: c_int) -> Result<Launched, Refused> {
        let program = CString::new(self.program.as_os_str().as_bytes()).map_err(|error| refused(error.into()))?;
        let (reader, writer) = io::pipe().map_err(refused)?;
        let (uid, gid) = (geteuid().as_raw(), getegid().as_raw());
        let prepared = Prepared {
            program,
            uid_map: format!("{uid} {uid} 1"),
            gid_map: format!("{gid} {gid} 1"),
            fds: [(self.input, 0), (self.output, 1), (self.output, 2), (self.control, CONTROL_FD)]
                .map(|(from, to)| (from.as_raw_fd(), to)),
            broker: self.ends_with_broker.then(|| self.broker.as_raw_fd()),
            failure: writer.as_raw_fd(),
        };
        let launched = clone(namespaces, || prepared.become_engine(namespaces)).map_err(Refused::Namespaces)?;
        drop(writer);
        match failure_of(reader) {
            None => Ok(launched),
            Some(failure) => {
                let _ = waitid(WaitId::PidFd(rustix::fd::AsFd::as_fd(&launched.pidfd)), WaitIdOptions::EXITED);
                let error = io::Error::from_raw_os_error(failure.errno);
                Err(if failure.in_namespaces == 1 { Refused::Namespaces(error) } else { Refused::Program(error) })
            }
        }
    }
}

/// Why a process could not be started.
enum Refused {
    /// These namespaces are not permitted.
    Namespaces(io::Error),
    /// Anything else.
    Program(io::Error),
}

fn refused(error: io::Error) -> Refused {
    Refused::Program(error)
}

/// Forks into new namespaces. The child calls `child` and ends; it may make system calls only, because other threads of this
/// process may have held any lock at this moment.
fn clone(namespaces: c_int, child: impl FnOnce()) -> io::Result<Launched> {
    let mut pidfd: c_int = -1;
    let flags = namespaces | CLONE_PIDFD | SIGCHLD;
    // SAFETY: without CLONE_VM and with no stack, this is fork; the kernel writes the pidfd to a variable that lives here.
    let pid = unsafe { libc::syscall(libc::SYS_clone, flags, 0, &raw mut pidfd, 0, 0) };
    match pid {
        0 => {
            child();
            // SAFETY: ends the process without running anything else.
            unsafe { libc::_exit(127) }
        }
        -1 => Err(io::Error::last_os_error()),
        // SAFETY: the kernel has just created this descriptor for this process.
        pid => Ok(Launched { pid: pid as u32, pidfd: unsafe { OwnedFd::from_raw_fd(pidfd) } }),
    }
}

/// What the child reports; none: it has executed the program, which closes the pipe.
fn failure_of(mut reader: io::PipeReader) -> Option<Failure> {
    let mut bytes = [0; size_of::<Failure>()];
    io::Read::read_exact(&mut reader, &mut bytes).ok()?;
    let word = |at: usize| c_int::from_ne_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
    Some(Failure { in_namespaces: word(0), errno: word(4) })
}

impl Prepared {
    /// In the child: executes the program.
    fn become_engine(&self, namespaces: c_int) -> ! {
        if namespaces & CLONE_NEWUSER != 0
            && let Err(error) = self.map_ids()
        {
            self.fail(1, &error);
        }
        let error = self.inherit().err().unwrap_or_else(|| self.execute());
        self.fail(0, &error)
    }

    /// Maps the own ids to themselves in the new user namespace.
    fn map_ids(&self) -> io::Result<()> {
        write_file(c"/proc/self/setgroups", b"deny")?;
        write_file(c"/proc/self/uid_map", self.uid_map.as_bytes())?;
        write_file(c"/proc/self/gid_map", self.gid_map.as_bytes())
    }

    /// Closes descriptors that a library received without close-on-exec, such as guest memory of other VMs, and gives the
    /// others their numbers.
    fn inherit(&self) -> io::Result<()> {
        // SAFETY: plain system calls on numbers; the signal set is initialised before it is used.
        unsafe {
            let mut none: libc::sigset_t = std::mem::zeroed();
            libc::sigemptyset(&raw mut none);
            check(libc::sigprocmask(libc::SIG_SETMASK, &raw const none, std::ptr::null_mut()))?;
            if let Some(fd) = self.broker {
                check(libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL))?;
                // In a PID namespace of its own, getppid() returns 0 whether the broker lives or not.
                let mut broker = libc::pollfd { fd, events: libc::POLLIN, revents: 0 };
                if check(libc::poll(&raw mut broker, 1, 0)).is_err() || broker.revents != 0 {
                    return Err(io::Error::from_raw_os_error(libc::ESRCH));
                }
            }
            let range = libc::syscall(libc::SYS_close_range, CONTROL_FD, u32::MAX, libc::CLOSE_RANGE_CLOEXEC);
            check(range as c_int)?;
            for (from, to) in self.fds {
                check(libc::dup2(from, to))?;
                // If the number was right already, dup2 has left it close-on-exec.
                check(libc::fcntl(to, libc::F_SETFD, 0))?;
            }
        }
        Ok(())
    }

    fn execute(&self) -> io::Error {
        let arguments: [*const c_char; 2] = [self.program.as_ptr(), std::ptr::null()];
        let environment: [*const c_char; 1] = [std::ptr::null()];
        // SAFETY: both lists end with a null pointer, and their strings live as long as `self`.
        unsafe { libc::execve(self.program.as_ptr(), arguments.as_ptr(), environment.as_ptr()) };
        io::Error::last_os_error()
    }

    fn fail(&self, in_namespaces: c_int, error: &io::Error) -> ! {
        let failure = Failure { in_namespaces, errno: error.raw_os_error().unwrap_or(libc::EIO) };
        // SAFETY: the value lives here and has this size; `_exit` ends the process without running anything else.
        unsafe {
            libc::write(self.failure, (&raw const failure).cast(), size_of::<Failure>());
            libc::_exit(127)
        }
    }
}

fn write_file(path: &std::ffi::CStr, contents: &[u8]) -> io::Result<()> {
    // SAFETY: the path is NUL-terminated, and the buffer has the length that is passed.
    unsafe {
        let fd = libc::open(path.as_ptr(), libc::O_WRONLY | libc::O_CLOEXEC);
        check(fd)?;
        let written = libc::write(fd, contents.as_ptr().cast(), contents.len());
        let outcome = check(written as c_int);
        libc::close(fd);
        outcome
    }
}

fn check(result: c_int) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
