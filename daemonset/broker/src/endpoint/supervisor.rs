//! Ends sessions whose threads do not.
//!
//! ```text
//!                 VMM hung up, or End requested               PATIENCE               GRACE
//! watched --------------------------------------> ending ----------------> cut ----------------> detached
//!     connection stays silent ---------------------------------------------^
//! ```
//!
//! Normally a session's thread ends by itself within milliseconds. If it is blocked, its engines are killed and its
//! connection is shut down (*cut*); if that does not wake it, the session leaves the list of its endpoint and what it holds
//! is released (*detached*). Only the thread remains.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::AsFd;
use std::sync::{Arc, Weak};
use std::thread;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;

use super::Endpoint;
use crate::channel::{Receiver, Sender, channel};
use crate::disposal::Foreign;
use crate::session::FIRST_MESSAGE;

/// Time in which a session's thread should end by itself.
const PATIENCE: Duration = Duration::from_millis(500);

/// Time in which it should end once its engines are dead and its connection is shut down.
const GRACE: Duration = Duration::from_secs(1);

/// Time within which a connection is a session or has been closed.
const HALF_OPEN: Duration = Duration::from_secs(FIRST_MESSAGE.as_secs() + 2);

/// A message to the supervisor.
#[derive(Debug)]
enum Message {
    Watch(String, Watched),
    /// The session's thread was requested to end, or is ending.
    Ending(String),
    /// The session has ended.
    Forget(String),
}

#[derive(Debug)]
struct Watched {
    endpoint: Weak<Endpoint>,
    vmm: Arc<Foreign>,
    stage: Stage,
}

/// What is due for a session, and when.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    /// Cut it if it has not begun.
    HalfOpen(Instant),
    /// Nothing.
    Begun,
    /// Cut it.
    Ending(Instant),
    /// Detach it.
    Cut(Instant),
}

impl Stage {
    fn due(self) -> Option<Instant> {
        match self {
            Stage::HalfOpen(at) | Stage::Ending(at) | Stage::Cut(at) => Some(at),
            Stage::Begun => None,
        }
    }

    /// The stage once the session should end.
    fn ending(self, now: Instant) -> Self {
        match self {
            Stage::HalfOpen(_) | Stage::Begun => Stage::Ending(now + PATIENCE),
            Stage::Ending(_) | Stage::Cut(_) => self,
        }
    }

    /// A hang-up is of interest until the session ends.
    fn awaits_hang_up(self) -> bool {
        matches!(self, Stage::HalfOpen(_) | Stage::Begun)
    }
}

/// Watches all sessions of a broker.
#[derive(Clone, Debug)]
pub(crate) struct Supervisor {
    messages: Sender<Message>,
}

impl Supervisor {
    /// Starts its thread, which ends with the last clone.
    pub(crate) fn start() -> io::Result<Self> {
        let (messages, receiver) = channel()?;
        thread::Builder::new().name("supervisor".into()).spawn(move || supervise(&receiver))?;
        Ok(Supervisor { messages })
    }

    /// Watches a connection. `vmm` is kept open until [`Supervisor::forget`].
    pub(super) fn watch(&self, id: &str, endpoint: &Arc<Endpoint>, vmm: Arc<Foreign>) {
        let stage = Stage::HalfOpen(Instant::now() + HALF_OPEN);
        self.messages.send(Message::Watch(id.into(), Watched { endpoint: Arc::downgrade(endpoint), vmm, stage }));
    }

    /// The session should end now.
    pub(super) fn ending(&self, id: &str) {
        self.messages.send(Message::Ending(id.into()));
    }

    /// The session has ended.
    pub(super) fn forget(&self, id: &str) {
        self.messages.send(Message::Forget(id.into()));
    }
}

fn supervise(messages: &Receiver<Message>) {
    let mut watched = BTreeMap::new();
    loop {
        let hung_up = match wait(messages, &watched) {
            Ok(hung_up) => hung_up,
            Err(error) => {
                tracing::error!(%error, "poll");
                thread::sleep(PATIENCE);
                continue;
            }
        };
        for message in messages.take() {
            handle(message, &mut watched);
        }
        let now = Instant::now();
        for id in hung_up {
            let Some(it) = watched.get_mut(&id) else { continue };
            it.stage = it.stage.ending(now);
            it.endpoint.upgrade().iter().for_each(|endpoint| endpoint.hung_up(&id));
        }
        watched.retain(|id, it| advance(id, it, now));
    }
}

fn handle(message: Message, watched: &mut BTreeMap<String, Watched>) {
    match message {
        Message::Watch(id, it) => {
            watched.insert(id, it);
        }
        Message::Ending(id) => {
            watched.entry(id).and_modify(|it| it.stage = it.stage.ending(Instant::now()));
        }
        Message::Forget(id) => {
            watched.remove(&id);
        }
    }
}

/// Waits for messages, hang-ups and due stages. Returns the sessions whose VMM hung up.
fn wait(messages: &Receiver<Message>, watched: &BTreeMap<String, Watched>) -> io::Result<Vec<String>> {
    let (ids, open): (Vec<&String>, Vec<&Watched>) = watched.iter().filter(|(_, it)| it.stage.awaits_hang_up()).unzip();
    let mut fds = vec![PollFd::from_borrowed_fd(messages.as_fd(), PollFlags::IN)];
    // A hang-up is reported without being asked for.
    fds.extend(open.iter().map(|it| PollFd::from_borrowed_fd(it.vmm.as_fd(), PollFlags::empty())));
    let due = watched.values().filter_map(|it| it.stage.due()).min();
    let left = due.map(|due| due.saturating_duration_since(Instant::now()));
    match poll(&mut fds, left.and_then(|left| Timespec::try_from(left).ok()).as_ref()) {
        Ok(_) | Err(Errno::INTR) => {}
        Err(errno) => return Err(errno.into()),
    }
    let hung_up = ids.iter().zip(&fds[1..]).filter(|(_, fd)| !fd.revents().is_empty());
    Ok(hung_up.map(|(id, _)| (*id).clone()).collect())
}

/// Carries out what is due. Returns true if the session is still to be watched.
fn advance(id: &str, it: &mut Watched, now: Instant) -> bool {
    if it.stage.due().is_none_or(|due| due > now) {
        return true;
    }
    let Some(endpoint) = it.endpoint.upgrade() else { return false };
    match it.stage {
        Stage::HalfOpen(_) if endpoint.has_begun(id) => it.stage = Stage::Begun,
        Stage::HalfOpen(_) | Stage::Ending(_) => {
            endpoint.cut(id);
            it.stage = Stage::Cut(now + GRACE);
        }
        Stage::Cut(_) => {
            endpoint.detach(id);
            return false;
        }
        Stage::Begun => {}
    }
    true
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn request_to_end_starts_the_clock_once() {
        let now = Instant::now();
        let first = Stage::Begun.ending(now);
        assert_eq!(first, Stage::Ending(now + PATIENCE));
        assert_eq!(first.ending(now + PATIENCE), first, "another request does not extend it");
        assert_eq!(Stage::HalfOpen(now).ending(now), first);
        assert_eq!(Stage::Cut(now).ending(now), Stage::Cut(now));
        assert!(!first.awaits_hang_up() && Stage::Begun.awaits_hang_up());
    }
}
