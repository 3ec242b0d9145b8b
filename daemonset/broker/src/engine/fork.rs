//! Starts the engine's program in a new process, in a PID namespace of its own where that is possible.
//!
//! In its own PID namespace an engine has no number for any other process, so it can signal none. The standard library
//! cannot start a process in new namespaces, and `unshare` would make the calling thread unable to start threads, so this
//! uses `clone` itself. The child makes system calls only: it allocates nothing and takes no lock.
//!
//! The child shares this process's table of descriptors until it has one of its own, to which only the standard ones are
//! copied. It would have to close copies of the others, and closing a file of a VMM's FUSE file system may never end: no
//! engine would be started any more. What the child needs it receives from a socket, which is this process's standard input.

use std::ffi::CString;
use std::io::{self, IoSlice};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::{Mutex, PoisonError};

use libc::{CLONE_FILES, CLONE_NEWPID, CLONE_NEWUSER, CLONE_PIDFD, CLONE_VFORK, SIGCHLD, c_char, c_int};
use rustix::io::ioctl_fionbio;
use rustix::net::{
    AddressFamily, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketFlags, SocketType, recv,
    sendmsg, socketpair,
};
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
    /// True if it must not outlive this process.
    ends_with_broker: bool,
}

/// The descriptors that the child receives, in the order in which they are sent.
struct Received {
    input: RawFd,
    output: RawFd,
    control: RawFd,
    /// Takes a [`Failure`].
    failure: RawFd,
    /// A pidfd of this process.
    broker: RawFd,
}

/// The number of descriptors in [`Received`].
const SENT: usize = 5;

/// Where children receive from: standard input, which is below every number that a VMM's descriptor can have.
const CHANNEL: RawFd = libc::STDIN_FILENO;

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
        ioctl_fionbio(&reader, true).map_err(|errno| refused(errno.into()))?;
        let (uid, gid) = (geteuid().as_raw(), getegid().as_raw());
        let (uid_map, gid_map) = (format!("{uid} {uid} 1"), format!("{gid} {gid} 1"));
        let prepared = Prepared { program, uid_map, gid_map, ends_with_broker: self.ends_with_broker };
        // Locked until the child has received: messages of two children must not be mixed.
        let mut channel = SENDER.lock().unwrap_or_else(PoisonError::into_inner);
        let sender = match channel.take() {
            Some(sender) => sender,
            None => make_channel().map_err(refused)?,
        };
        let sent = [self.input, self.output, self.control, writer.as_fd(), self.broker];
        send(channel.insert(sender), &sent).map_err(refused)?;
        let launched = clone(namespaces, || prepared.become_engine(namespaces)).map_err(Refused::Namespaces);
        discard_unreceived();
        drop(channel);
        let launched = launched?;
        match failure_of(reader) {
            None => Ok(launched),
            Some(failure) => {
                let _ = waitid(WaitId::PidFd(launched.pidfd.as_fd()), WaitIdOptions::EXITED);
                let error = io::Error::from_raw_os_error(failure.errno);
                Err(if failure.in_namespaces == 1 { Refused::Namespaces(error) } else { Refused::Program(error) })
            }
        }
    }
}

/// The sending end of the channel to children, whose receiving end is standard input; none: it has not been made yet.
static SENDER: Mutex<Option<OwnedFd>> = Mutex::new(None);

fn make_channel() -> io::Result<OwnedFd> {
    let (sender, receiver) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?;
    nix::unistd::dup2_stdin(&receiver)?;
    Ok(sender)
}

fn send(channel: &OwnedFd, fds: &[BorrowedFd<'_>; SENT]) -> io::Result<()> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(SENT))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    ancillary.push(SendAncillaryMessage::ScmRights(fds));
    sendmsg(channel, &[IoSlice::new(&[0])], &mut ancillary, SendFlags::NOSIGNAL)?;
    Ok(())
}

/// Drops what a child did not receive, because it could not be started.
fn discard_unreceived() {
    // SAFETY: the channel is open as long as this process.
    let receiver = unsafe { BorrowedFd::borrow_raw(CHANNEL) };
    // It fails if nothing is left.
    let _ = recv(receiver, &mut [0; 1], RecvFlags::DONTWAIT);
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

/// Forks into new namespaces, and waits until the child has executed a program or ended. The child calls `child` and ends;
/// it may make system calls only, because other threads of this process may have held any lock at this moment. It shares
/// the descriptors of this process until it unshares them.
fn clone(namespaces: c_int, child: impl FnOnce()) -> io::Result<Launched> {
    let mut pidfd: c_int = -1;
    let flags = namespaces | CLONE_PIDFD | CLONE_FILES | CLONE_VFORK | SIGCHLD;
    // SAFETY: without CLONE_VM and with no stack, this is fork but for the descriptors; the kernel writes the pidfd to a
    // variable that lives here.
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

/// What the child has reported; none: it has executed the program.
fn failure_of(mut reader: io::PipeReader) -> Option<Failure> {
    let mut bytes = [0; size_of::<Failure>()];
    io::Read::read_exact(&mut reader, &mut bytes).ok()?;
    let word = |at: usize| c_int::from_ne_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
    Some(Failure { in_namespaces: word(0), errno: word(4) })
}

impl Prepared {
    /// In the child: executes the program.
    fn become_engine(&self, namespaces: c_int) -> ! {
        // Without them nothing can be reported either.
        let Ok(received) = receive() else {
            // SAFETY: ends the process without running anything else.
            unsafe { libc::_exit(127) }
        };
        if namespaces & CLONE_NEWUSER != 0
            && let Err(error) = self.map_ids()
        {
            received.fail(1, &error);
        }
        let error = self.inherit(&received).err().unwrap_or_else(|| self.execute());
        received.fail(0, &error)
    }

    /// Maps the own ids to themselves in the new user namespace.
    fn map_ids(&self) -> io::Result<()> {
        write_file(c"/proc/self/setgroups", b"deny")?;
        write_file(c"/proc/self/uid_map", self.uid_map.as_bytes())?;
        write_file(c"/proc/self/gid_map", self.gid_map.as_bytes())
    }

    /// Gives the descriptors their numbers. The others of the message are closed at exec.
    fn inherit(&self, received: &Received) -> io::Result<()> {
        // SAFETY: plain system calls on numbers; the signal set is initialised before it is used.
        unsafe {
            let mut none: libc::sigset_t = std::mem::zeroed();
            libc::sigemptyset(&raw mut none);
            check(libc::sigprocmask(libc::SIG_SETMASK, &raw const none, std::ptr::null_mut()))?;
            if self.ends_with_broker {
                check(libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL))?;
                // In a PID namespace of its own, getppid() returns 0 whether the broker lives or not.
                let mut broker = libc::pollfd { fd: received.broker, events: libc::POLLIN, revents: 0 };
                if check(libc::poll(&raw mut broker, 1, 0)).is_err() || broker.revents != 0 {
                    return Err(io::Error::from_raw_os_error(libc::ESRCH));
                }
            }
            let Received { input, output, control, .. } = *received;
            // The input has the lowest number, which may be CONTROL_FD, so it is first.
            for (from, to) in [(input, 0), (output, 1), (output, 2), (control, CONTROL_FD)] {
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
}

/// In the child: ends the sharing of descriptors with the broker and receives the engine's. Only the standard ones are
/// copied, so none of the others need be closed.
fn receive() -> io::Result<Received> {
    const SPACE: usize = rustix::cmsg_space!(ScmRights(SENT));
    let mut space = [0u64; SPACE.div_ceil(8)];
    let mut byte = 0u8;
    let mut part = libc::iovec { iov_base: (&raw mut byte).cast(), iov_len: 1 };
    // SAFETY: all pointers are to variables that live here and have the lengths that are passed; of the reply, the first
    // header and as many numbers as its length says are read.
    unsafe {
        let first = libc::STDERR_FILENO + 1;
        check(libc::syscall(libc::SYS_close_range, first, u32::MAX, libc::CLOSE_RANGE_UNSHARE) as c_int)?;
        let mut message: libc::msghdr = std::mem::zeroed();
        (message.msg_iov, message.msg_iovlen) = (&raw mut part, 1);
        (message.msg_control, message.msg_controllen) = (space.as_mut_ptr().cast(), SPACE as _);
        check(libc::recvmsg(CHANNEL, &raw mut message, libc::MSG_CMSG_CLOEXEC | libc::MSG_DONTWAIT) as c_int)?;
        let header = libc::CMSG_FIRSTHDR(&raw const message);
        let whole = libc::CMSG_LEN((SENT * size_of::<RawFd>()) as u32) as usize;
        if header.is_null() || (*header).cmsg_len as usize != whole {
            return Err(io::Error::from_raw_os_error(libc::EBADMSG));
        }
        let [input, output, control, failure, broker] =
            libc::CMSG_DATA(header).cast::<[RawFd; SENT]>().read_unaligned();
        Ok(Received { input, output, control, failure, broker })
    }
}

impl Received {
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
