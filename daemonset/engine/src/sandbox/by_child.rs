//! A mount namespace of which the share is the only mount, for an engine that may not make one itself.
//!
//! `chroot` alone confines nothing: each descriptor that leads outside, such as `/proc/self/fd`, and each directory that is
//! opened by a file handle, leads by `..` to everything that the broker sees. An engine without `CAP_SYS_ADMIN` cannot make
//! mounts, and in a user namespace of its own it would lose the right to open file handles. A short-lived child has no use
//! for that right: it makes a user namespace, in which everyone may make mounts, builds there what the sandbox `Namespace`
//! has, and sends the engine descriptors of it. The engine changes its root directory to that mount. It remains in the user
//! namespace and with the capabilities that it had.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use nix::fcntl::{OFlag, open};
use nix::sched::{CloneFlags, unshare};
use nix::sys::signal::Signal;
use nix::sys::stat::{Mode, fstat};
use nix::sys::wait::waitpid;
use nix::unistd::{ForkResult, Pid, fork, getpid};
use virtiofs_contract::channel::PacketChannel;

use super::own_mounts::{OwnMounts, clone_tree, reopen_in_namespace};
use super::{Step, StepError, may};

/// The result.
pub(super) struct Built {
    /// The root of the mount namespace.
    pub(super) root: OwnedFd,
    pub(super) mounts: OwnMounts,
}

/// The child's last message: the mount points that it has hidden, or what failed.
type Message = Result<Vec<String>, String>;

/// Has a child build the mount namespace. On an error, nothing of this process has changed.
pub(super) fn build(source: &OwnedFd, writable: bool) -> Result<Built, StepError> {
    let (ours, theirs) = PacketChannel::pair().step("channel to a child")?;
    let engine = own_number()?;
    // SAFETY: this process has one thread.
    match unsafe { fork() }.step("start a child")? {
        ForkResult::Child => {
            drop(ours);
            let sent = run(&theirs, source, &format!("/proc/{engine}/fd"), writable);
            // SAFETY: ends the child without running what belongs to its parent.
            unsafe { libc::_exit(i32::from(sent.is_err())) }
        }
        ForkResult::Parent { child } => {
            drop(theirs);
            let built = receive(&ours, child, engine, source);
            let _ = waitpid(child, None);
            built
        }
    }
}

/// A mount namespace lives as long as a descriptor of its mountinfo: the library may close the one that it gets.
pub(super) fn keep_alive(mountinfo: &File) -> Result<(), StepError> {
    // Closed when the process ends.
    std::mem::forget(mountinfo.try_clone().step("keep mountinfo open")?);
    Ok(())
}

/// The number of this process in `/proc`, which may belong to a PID namespace above its own.
fn own_number() -> Result<i32, StepError> {
    let link = std::fs::read_link("/proc/self").step("read /proc/self")?;
    let number = link.to_str().and_then(|number| number.parse().ok());
    number.ok_or_else(|| io::Error::other("/proc/self is no number")).step("read /proc/self")
}

// --- in the engine ---

fn receive(channel: &PacketChannel, child: Pid, engine: i32, source: &OwnedFd) -> Result<Built, StepError> {
    let lost = |error| io::Error::other(format!("the child sent nothing: {error}"));
    let () = channel.receive().map_err(lost).step("wait for a child")?.0;
    if getpid().as_raw() == engine {
        map_ids(child);
    }
    channel.send(&(), &[]).map_err(lost).step("continue a child")?;
    let (message, fds) = channel.receive::<Message>().map_err(lost).step("wait for a child")?;
    let hidden = message.map_err(io::Error::other).step("in a child")?;
    let fds = <[OwnedFd; 3]>::try_from(fds).map_err(|_| io::Error::other("the child sent no descriptors"));
    let [root, proc_self_fd, mountinfo] = fds.step("in a child")?;
    let (before, after) = (fstat(source).step("stat the source")?, fstat(&root).step("stat the source")?);
    if (before.st_dev, before.st_ino) != (after.st_dev, after.st_ino) {
        return Err(io::Error::other("it has been replaced")).step("open the source in the namespace");
    }
    let mounts = OwnMounts { proc_self_fd: proc_self_fd.into(), mountinfo: mountinfo.into(), hidden };
    Ok(Built { root, mounts })
}

/// Maps all ids but root's in the child's user namespace, so that it may open a source in directories that only their
/// owner can enter. Mapping root would need another capability; root's own directories need none. If it fails, the child
/// opens what everyone can open.
fn map_ids(child: Pid) {
    for (map, ids) in [("uid_map", "1 1 4294967294"), ("gid_map", "0 0 4294967295")] {
        if let Err(error) = std::fs::write(format!("/proc/{child}/{map}"), ids) {
            tracing::debug!("{map} of a child: {error}");
        }
    }
}

// --- in the child ---

fn run(
    channel: &PacketChannel,
    source: &OwnedFd,
    proc_self_fd: &str,
    writable: bool,
) -> Result<(), virtiofs_contract::channel::ChannelError> {
    let built = prepare(channel, source, proc_self_fd, writable);
    match &built {
        Ok(Built { root, mounts }) => {
            let fds: [BorrowedFd<'_>; 3] = [root.as_fd(), mounts.proc_self_fd.as_fd(), mounts.mountinfo.as_fd()];
            channel.send(&Message::Ok(mounts.hidden.clone()), &fds)
        }
        Err(error) => channel.send(&Message::Err(error.to_string()), &[]),
    }
}

fn prepare(channel: &PacketChannel, source: &OwnedFd, proc_self_fd: &str, writable: bool) -> Result<Built, StepError> {
    nix::sys::prctl::set_pdeathsig(Signal::SIGKILL).step("parent-death signal")?;
    let privileged = may(caps::Capability::CAP_SYS_ADMIN);
    let cloned = if privileged { Some(clone_tree(source.as_fd())?) } else { None };
    let user = if privileged { CloneFlags::empty() } else { CloneFlags::CLONE_NEWUSER };
    let unshared = unshare(user | CloneFlags::CLONE_NEWNS).step("new user namespace");
    let lost = |error| io::Error::other(format!("the engine is gone: {error}"));
    channel.send(&(), &[]).map_err(lost).step("report to the engine")?;
    let () = channel.receive().map_err(lost).step("wait for the engine")?.0;
    unshared?;
    let tree = match cloned {
        Some(tree) => tree,
        None => clone_tree(reopen_in_namespace(source)?.as_fd())?,
    };
    let mounts = OwnMounts::enter(&tree, proc_self_fd, writable)?;
    let root = open("/", OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC, Mode::empty()).step("open the root")?;
    Ok(Built { root, mounts })
}
