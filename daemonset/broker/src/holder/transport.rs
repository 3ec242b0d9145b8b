//! Transport of descriptors to their holder and back: a keeper's sockets, or systemd.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::io::{Errno, FdFlags, fcntl_setfd};
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketAddrUnix, SocketFlags, SocketType, connect, recvmsg, sendmsg, socket_with,
};

/// Time limit for a holder that does not read. Sessions wait for it, so it is short.
const SEND_DEADLINE: Duration = Duration::from_secs(2);

/// Maximum number of descriptors in one message (`SCM_MAX_FD` of the kernel).
const MAX_FDS: usize = 253;

/// First descriptor that systemd passes (`SD_LISTEN_FDS_START`).
const FIRST_PASSED: RawFd = 3;

/// Everything that a holder held.
#[derive(Debug, Default)]
pub(crate) struct Fetched {
    /// Names and descriptors.
    pub(crate) fds: Vec<(String, OwnedFd)>,
    /// Groups that the holder dropped because a descriptor hung up.
    pub(crate) hung_up: Vec<String>,
}

/// The socket to which descriptors are sent.
#[derive(Debug)]
pub(crate) struct Link {
    store: OwnedFd,
    /// Connection to a keeper, which hangs up when the keeper ends.
    pub(crate) watch: Option<OwnedFd>,
}

impl Link {
    /// Stores a descriptor. With `poll`, the holder drops it when it hangs up.
    pub(crate) fn store(&self, name: &str, fd: BorrowedFd<'_>, poll: bool) -> io::Result<()> {
        self.send(&format!("FDSTORE=1\nFDNAME={name}\nFDPOLL={}", u8::from(poll)), &[fd])
    }

    /// Removes the descriptors of a name.
    pub(crate) fn remove(&self, name: &str) -> io::Result<()> {
        self.send(&format!("FDSTOREREMOVE=1\nFDNAME={name}"), &[])
    }

    fn send(&self, text: &str, fds: &[BorrowedFd<'_>]) -> io::Result<()> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() && !ancillary.push(SendAncillaryMessage::ScmRights(fds)) {
            return Err(io::Error::other("too many descriptors for one message"));
        }
        loop {
            match sendmsg(&self.store, &[IoSlice::new(text.as_bytes())], &mut ancillary, SendFlags::NOSIGNAL) {
                Err(Errno::INTR) => {}
                other => return other.map(drop).map_err(io::Error::from),
            }
        }
    }
}

/// Connects to the keeper of this directory and fetches what it holds.
pub(crate) fn connect_keeper(directory: &Path, deadline: Instant) -> io::Result<(Link, Fetched)> {
    let (watch, fetched) = fetch(directory, "FETCH", deadline)?;
    let store = connect_to(&directory.join("store"), SocketType::DGRAM)?;
    set_socket_timeout(&store, Timeout::Send, Some(SEND_DEADLINE))?;
    Ok((Link { store, watch: Some(watch) }, fetched))
}

/// Fetches what the keeper holds, only under names with this prefix if there is one, and changes nothing.
pub(crate) fn fetch_copies(directory: &Path, prefix: Option<&str>, deadline: Instant) -> io::Result<Fetched> {
    let request = prefix.map_or_else(|| "FETCH".into(), |prefix| format!("FETCH {prefix}"));
    Ok(fetch(directory, &request, deadline)?.1)
}

fn fetch(directory: &Path, request: &str, deadline: Instant) -> io::Result<(OwnedFd, Fetched)> {
    let left = deadline.saturating_duration_since(Instant::now()).max(Duration::from_millis(1));
    let socket = connect_to(&directory.join("fetch"), SocketType::SEQPACKET)?;
    set_socket_timeout(&socket, Timeout::Recv, Some(left))?;
    rustix::net::send(&socket, request.as_bytes(), SendFlags::NOSIGNAL)?;
    let fetched = receive_all(&socket)?;
    Ok((socket, fetched))
}

fn connect_to(path: &Path, kind: SocketType) -> io::Result<OwnedFd> {
    let socket = socket_with(AddressFamily::UNIX, kind, SocketFlags::CLOEXEC, None)?;
    connect(&socket, &SocketAddrUnix::new(path)?)?;
    Ok(socket)
}

fn receive_all(watch: &OwnedFd) -> io::Result<Fetched> {
    let mut fetched = Fetched::default();
    loop {
        let (text, fds) = receive(watch)?;
        let mut lines = text.lines().map(str::to_owned);
        match lines.next().as_deref() {
            Some("FDS") => fetched.fds.extend(lines.zip(fds)),
            Some("HUNGUP") => fetched.hung_up.extend(lines),
            Some("END") => return Ok(fetched),
            _ => return Err(io::Error::other("the keeper ended, or speaks another protocol")),
        }
    }
}

fn receive(watch: &OwnedFd) -> io::Result<(String, Vec<OwnedFd>)> {
    let mut buffer = vec![0u8; 64 << 10];
    let mut space = vec![MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let received = loop {
        match recvmsg(watch, &mut [IoSliceMut::new(&mut buffer)], &mut ancillary, RecvFlags::CMSG_CLOEXEC) {
            Err(Errno::INTR) => {}
            other => break other?,
        }
    };
    let mut fds = Vec::new();
    for message in ancillary.drain() {
        if let RecvAncillaryMessage::ScmRights(rights) = message {
            fds.extend(rights);
        }
    }
    if received.flags.contains(ReturnFlags::CTRUNC) {
        return Err(io::Error::other(
            "no descriptors left for those that the keeper holds; raise the limit of open files",
        ));
    }
    buffer.truncate(received.bytes);
    Ok((String::from_utf8(buffer).map_err(io::Error::other)?, fds))
}

/// Connects to the socket of `NOTIFY_SOCKET`, and takes the descriptors that systemd passed to this process
/// (sd_listen_fds_with_names(3)). Call it once, before any thread starts.
pub(crate) fn connect_systemd(environment: impl Fn(&str) -> Option<String>) -> io::Result<(Link, Fetched)> {
    let address = environment("NOTIFY_SOCKET");
    let address = address.ok_or_else(|| io::Error::other("NOTIFY_SOCKET is not set: not started by systemd"))?;
    let socket = UnixDatagram::unbound()?;
    match address.strip_prefix('@') {
        Some(name) => socket.connect_addr(&SocketAddr::from_abstract_name(name)?)?,
        None => socket.connect(&address)?,
    }
    socket.set_write_timeout(Some(SEND_DEADLINE))?;
    let fds = passed_names(&environment, std::process::id()).into_iter().zip(FIRST_PASSED..);
    let fds = fds.map(|(name, fd)| {
        // SAFETY: systemd passed this descriptor to this process, and nothing else here owns it.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        fcntl_setfd(fd.as_fd(), FdFlags::CLOEXEC).map(|()| (name, fd)).map_err(io::Error::from)
    });
    let fetched = Fetched { fds: fds.collect::<io::Result<_>>()?, hung_up: Vec::new() };
    Ok((Link { store: socket.into(), watch: None }, fetched))
}

/// The names of passed descriptors, in the order of their numbers; empty: none was passed to this process.
fn passed_names(environment: &impl Fn(&str) -> Option<String>, own: u32) -> Vec<String> {
    let number = |key| environment(key).and_then(|value| value.parse::<usize>().ok());
    if number("LISTEN_PID") != usize::try_from(own).ok() {
        return Vec::new();
    }
    let names = environment("LISTEN_FDNAMES").unwrap_or_default();
    let names = names.split(':').map(str::to_owned).chain(std::iter::repeat(String::new()));
    names.take(number("LISTEN_FDS").unwrap_or(0)).collect()
}

#[cfg(test)]
mod tests {
    use testkit::layouts::Layouts;

    use super::*;

    #[test]
    fn passed_descriptors_have_names_in_order() {
        let names = |pid: &str, count: &str, names: &str| {
            let table = [("LISTEN_PID", pid), ("LISTEN_FDS", count), ("LISTEN_FDNAMES", names)];
            let find = |key: &str| table.iter().find(|(name, _)| *name == key).map(|(_, value)| (*value).to_owned());
            passed_names(&find, 42)
        };
        assert_eq!(names("42", "2", "a.b:c"), ["a.b", "c"]);
        assert_eq!(names("42", "2", "a.b"), ["a.b", ""]);
        assert_eq!(names("43", "2", "a.b:c"), [""; 0], "another process");
        assert_eq!(names("42", "", ""), [""; 0]);
    }

    #[test]
    fn messages_to_the_keeper_are_those_of_their_version() {
        let (ours, keeper) = UnixDatagram::pair().unwrap();
        let link = Link { store: ours.into(), watch: None };
        let fd = tempfile::tempfile().unwrap();
        link.store("session-1.vmm", fd.as_fd(), false).unwrap();
        link.store("session-1.vmm", fd.as_fd(), true).unwrap();
        link.remove("session-1.vmm").unwrap();
        let received = [(); 3].map(|()| {
            let mut buffer = [0; 200];
            let length = keeper.recv(&mut buffer).unwrap();
            String::from_utf8(buffer[..length].to_vec()).unwrap()
        });
        let present = serde_json::to_string(&received).unwrap();
        let keeper = concat!(env!("CARGO_MANIFEST_DIR"), "/../keeper");
        Layouts::of(keeper, "to-keeper").check(1, 1, present.as_bytes());
    }

    #[test]
    fn missing_keeper_is_an_error() {
        let scratch = tempfile::tempdir().unwrap();
        let error = connect_keeper(scratch.path(), Instant::now()).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::NotFound);
    }
}
