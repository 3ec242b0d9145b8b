//! The event loop: stores and sends descriptors, and drops those that hang up.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use rustix::event::epoll;
use rustix::io::Errno;
use rustix::net::SocketFlags;
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::process::{Pid, getpid};

use crate::closing::Closer;
use crate::message::{Message, parse};
use crate::socket::{Received, receive, send};
use crate::store::{Insertion, Store, Token};

/// Number of descriptors in one message to a client.
const PER_MESSAGE: usize = 100;

/// Time limit for a client that does not read its messages.
const SEND_DEADLINE: Duration = Duration::from_secs(10);

/// Most connections; a host has one broker, and one that stands by.
const MAX_CLIENTS: usize = 8;

/// Epoll data of the two sockets, and the bit that marks a client. Everything else is a token of the store.
const STORE_SOCKET: u64 = u64::MAX;
const FETCH_SOCKET: u64 = u64::MAX - 1;
const CLIENT: u64 = 1 << 63;

/// Request for all descriptors. With a space and a prefix, only for names with this prefix.
const FETCH: &str = "FETCH";

/// The keeper.
pub(crate) struct Keeper {
    store: Store<OwnedFd>,
    store_socket: OwnedFd,
    fetch_socket: OwnedFd,
    clients: BTreeMap<u64, OwnedFd>,
    next_client: u64,
    epoll: OwnedFd,
    closer: Closer,
    /// True once a refusal was logged, until something is removed.
    full: bool,
}

impl Keeper {
    pub(crate) fn new(store: Store<OwnedFd>, store_socket: OwnedFd, fetch_socket: OwnedFd) -> io::Result<Self> {
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        for (socket, data) in [(&store_socket, STORE_SOCKET), (&fetch_socket, FETCH_SOCKET)] {
            epoll::add(&epoll, socket, epoll::EventData::new_u64(data), epoll::EventFlags::IN)?;
        }
        let (clients, closer) = (BTreeMap::new(), Closer::start()?);
        Ok(Keeper { store, store_socket, fetch_socket, clients, next_client: 0, epoll, closer, full: false })
    }

    /// Runs until a fatal error.
    pub(crate) fn run(&mut self) -> io::Result<()> {
        let mut events = Vec::with_capacity(64);
        loop {
            match epoll::wait(&self.epoll, rustix::buffer::spare_capacity(&mut events), None) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(errno) => return Err(errno.into()),
            }
            for event in events.drain(..) {
                match event.data.u64() {
                    STORE_SOCKET => self.take_messages()?,
                    FETCH_SOCKET => self.accept(),
                    client if client & CLIENT != 0 => self.client_request(client)?,
                    token => self.hung_up(token),
                }
            }
        }
    }

    fn take_messages(&mut self) -> io::Result<()> {
        while let Some(received) = receive(&self.store_socket)? {
            self.take_message(received);
        }
        Ok(())
    }

    fn take_message(&mut self, received: Received) {
        let message = if received.truncated { None } else { Some(parse(&received.bytes)) };
        match message {
            Some(Ok(Message::Store { name, poll })) => {
                return received.fds.into_iter().for_each(|fd| self.insert(&name, fd, poll));
            }
            Some(Ok(Message::Remove { name })) => {
                self.full = false;
                self.store.remove(&name).into_iter().for_each(|fd| self.closer.close(fd));
            }
            Some(Ok(Message::Other)) => {}
            Some(Err(error)) => tracing::warn!(%error, "invalid message"),
            None => tracing::warn!("message too large; its descriptors are closed"),
        }
        // Closing them here could block.
        received.fds.into_iter().for_each(|fd| self.closer.close(fd));
    }

    fn insert(&mut self, name: &str, fd: OwnedFd, poll: bool) {
        match self.store.insert(name, fd, same_file) {
            Insertion::Stored(token) if poll => self.watch(token),
            Insertion::Stored(_) => {}
            Insertion::Known(fd) => self.closer.close(fd),
            Insertion::Full(error, fd) => {
                self.closer.close(fd);
                if !std::mem::replace(&mut self.full, true) {
                    tracing::error!(name, %error, "descriptor not stored; its session does not survive the broker");
                }
            }
        }
    }

    /// Files that epoll does not support, such as memfds, cannot hang up.
    fn watch(&self, token: Token) {
        if let Some(fd) = self.store.get(token)
            && let Err(errno) =
                epoll::add(&self.epoll, fd, epoll::EventData::new_u64(token), epoll::EventFlags::empty())
            && errno != Errno::PERM
        {
            tracing::warn!(%errno, "descriptor not watched");
        }
    }

    fn hung_up(&mut self, token: Token) {
        let Some((group, fds)) = self.store.hang_up(token) else { return };
        tracing::info!(group, descriptors = fds.len(), "hung up");
        for fd in fds {
            self.closer.close(fd);
        }
    }

    fn accept(&mut self) {
        let flags = SocketFlags::CLOEXEC;
        let Ok(client) = rustix::net::accept_with(&self.fetch_socket, flags) else { return };
        if self.clients.len() >= MAX_CLIENTS {
            return tracing::warn!(limit = MAX_CLIENTS, "connection refused");
        }
        let data = CLIENT | self.next_client;
        self.next_client += 1;
        let watched = set_socket_timeout(&client, Timeout::Send, Some(SEND_DEADLINE))
            .and_then(|()| epoll::add(&self.epoll, &client, epoll::EventData::new_u64(data), epoll::EventFlags::IN));
        match watched {
            Ok(()) => drop(self.clients.insert(data, client)),
            Err(errno) => tracing::warn!(%errno, "connection not accepted"),
        }
    }

    fn client_request(&mut self, data: u64) -> io::Result<()> {
        let Some(client) = self.clients.get(&data) else { return Ok(()) };
        match receive(client) {
            Ok(None) => return Ok(()),
            Ok(Some(received)) => {
                if let Some(prefix) = fetched_prefix(&received.bytes) {
                    // Processes messages first that were sent to the store socket before this request.
                    self.take_messages()?;
                    match self.hand_out(data, prefix) {
                        Ok(()) => return Ok(()),
                        Err(error) => tracing::warn!(%error, "descriptors not handed out"),
                    }
                }
            }
            Err(_) => {}
        }
        self.clients.remove(&data);
        Ok(())
    }

    /// Sends the descriptors whose names begin with `prefix`, and then the groups that hung up.
    fn hand_out(&self, data: u64, prefix: &str) -> io::Result<()> {
        let Some(client) = self.clients.get(&data) else { return Ok(()) };
        let chosen = self.store.all().filter(|(name, _)| name.starts_with(prefix));
        let chosen: Vec<(&str, BorrowedFd<'_>)> = chosen.map(|(name, fd)| (name, fd.as_fd())).collect();
        for part in chosen.chunks(PER_MESSAGE) {
            let mut text = String::from("FDS");
            part.iter().for_each(|(name, _)| {
                text.push('\n');
                text.push_str(name);
            });
            let fds: Vec<BorrowedFd<'_>> = part.iter().map(|(_, fd)| *fd).collect();
            send(client, text.as_bytes(), &fds)?;
        }
        let hung_up: Vec<&str> = self.store.hung_up().filter(|group| group.starts_with(prefix)).collect();
        for part in hung_up.chunks(PER_MESSAGE) {
            send(client, format!("HUNGUP\n{}", part.join("\n")).as_bytes(), &[])?;
        }
        let (descriptors, groups) = self.store.len();
        tracing::info!(prefix, handed_out = chosen.len(), descriptors, groups, "handed out");
        send(client, b"END", &[])
    }
}

/// The prefix of a request to fetch. `None`: the client closed the connection, or is not a broker.
fn fetched_prefix(request: &[u8]) -> Option<&str> {
    let rest = std::str::from_utf8(request).ok()?.strip_prefix(FETCH)?;
    if rest.is_empty() { Some(rest) } else { rest.strip_prefix(' ') }
}

/// True if both are one open file, as kcmp(2) says.
fn same_file(a: &OwnedFd, b: &OwnedFd) -> bool {
    const KCMP_FILE: libc::c_long = 0;
    let own = libc::c_long::from(Pid::as_raw(Some(getpid())));
    let [a, b] = [a, b].map(|fd| libc::c_long::from(fd.as_raw_fd()));
    // SAFETY: the call compares two numbers of this process and accesses no memory.
    unsafe { libc::syscall(libc::SYS_kcmp, own, own, KCMP_FILE, a, b) == 0 }
}
