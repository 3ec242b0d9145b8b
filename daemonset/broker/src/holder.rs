//! Descriptors that outlive the broker's process: a holder has a copy of each, by name.
//!
//! | module | |
//! |---|---|
//! | this one | what is held, and how the broker changes it |
//! | [`names`] | names of descriptors; pure |
//! | [`restore`] | what to do with the engines of a restored session; pure |
//! | [`transport`] | the two holders: a keeper, or systemd |
//!
//! The broker records what it has deposited. After a restart of the keeper it deposits everything again.

pub(crate) mod names;
pub(crate) mod restore;
mod transport;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::thread;
use std::time::{Duration, Instant};

use thiserror::Error;

use crate::disposal::{Foreign, SharedFd};
use crate::fault;
use crate::poll::{Interest, wait_readable};
use names::{Group, Part, name};
use transport::{Fetched, Link, connect_keeper, connect_systemd, fetch_copies};

/// Time limit for a keeper to listen and to send what it holds when the broker starts.
const START_DEADLINE: Duration = Duration::from_secs(10);

/// Time limit for a restarted keeper to answer.
const CONNECT_DEADLINE: Duration = Duration::from_secs(5);

/// Interval at which the broker connects to a missing keeper, and detects that a keeper hangs.
const CONNECT_AGAIN: Duration = Duration::from_millis(100);

/// Pause after a keeper did not accept descriptors.
const ATTACH_AGAIN: Duration = Duration::from_secs(1);

/// The process that holds descriptors for this broker.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum HolderChoice {
    /// None: sessions end with the broker.
    Nobody,
    /// The virtiofs-keeper of this directory.
    Keeper(PathBuf),
    /// systemd, as `FileDescriptorStoreMax=` of the unit allows.
    Systemd,
}

/// Reason why the broker cannot start with its holder. Displays its cause, so it has no `source`.
#[derive(Debug, Error)]
pub enum HolderError {
    /// A keeper listens but does not send what it holds. A start without it would lose existing sessions.
    #[error("the keeper in {directory} does not answer: {error}; end it if it is stuck, which ends its sessions")]
    Keeper {
        /// Its directory.
        directory: PathBuf,
        /// The error.
        error: io::Error,
    },
    /// Not started by systemd.
    #[error("systemd's descriptor store: {0}")]
    Systemd(io::Error),
    /// A thread could not be started.
    #[error("set-up: {0}")]
    SetUp(io::Error),
}

/// What a holder held when the broker started.
#[derive(Debug, Default)]
pub(crate) struct Held {
    pub(crate) groups: BTreeMap<Group, Parts>,
    /// Sessions whose VMM hung up while no broker ran.
    pub(crate) hung_up: BTreeSet<u64>,
}

impl Held {
    /// What the holder holds, as deposits of this broker.
    fn deposits(&self) -> BTreeMap<String, Deposit> {
        let mut deposits = BTreeMap::new();
        for (group, parts) in &self.groups {
            for (part, fd) in parts {
                deposits.insert(name(*group, *part), Deposit::of(*part, fd.clone()));
            }
        }
        deposits
    }
}

/// Descriptors of one group.
pub(crate) type Parts = BTreeMap<Part, Arc<OwnedFd>>;

/// The holder of this broker. Clones refer to the same one.
#[derive(Clone, Default)]
pub(crate) struct Holder(Option<Arc<Inner>>);

struct Inner {
    state: Mutex<State>,
}

struct State {
    deposits: BTreeMap<String, Deposit>,
    /// `None`: no keeper is connected.
    link: Option<Arc<Link>>,
}

/// Dropping it does not block, although a VMM or a file system may have made the file.
struct Deposit {
    fd: Foreign,
    poll: bool,
}

impl Deposit {
    /// Polled: the session ends when the VMM closes its end.
    fn of(part: Part, fd: SharedFd) -> Self {
        Deposit { fd: Foreign::shared(fd, Arc::default()), poll: part == Part::Vmm }
    }
}

impl fmt::Debug for Holder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let deposits = self.0.as_ref().map(|inner| inner.state().deposits.len());
        f.debug_struct("Holder").field("deposits", &deposits).finish()
    }
}

impl Holder {
    /// Connects to the holder and fetches what it has. Waits a while for a missing keeper, then continues
    /// to look for it in the background.
    pub(crate) fn connect(choice: &HolderChoice) -> Result<(Self, Held), HolderError> {
        let (link, fetched) = match choice {
            HolderChoice::Nobody => return Ok((Holder::default(), Held::default())),
            HolderChoice::Systemd => {
                let (link, fetched) = connect_systemd(|key| std::env::var(key).ok()).map_err(HolderError::Systemd)?;
                (Some(Arc::new(link)), fetched)
            }
            HolderChoice::Keeper(directory) => match await_keeper(directory)? {
                Some((link, fetched)) => (Some(Arc::new(link)), fetched),
                None => (None, Fetched::default()),
            },
        };
        let (held, unknown) = sort(fetched);
        let deposits = held.deposits();
        let inner = Arc::new(Inner { state: Mutex::new(State { deposits, link }) });
        unknown.iter().for_each(|name| inner.remove(name));
        if let HolderChoice::Keeper(directory) = choice {
            let (weak, directory) = (Arc::downgrade(&inner), directory.clone());
            let follow = move || follow_keeper(&weak, &directory);
            thread::Builder::new().name("keeper".into()).spawn(follow).map_err(HolderError::SetUp)?;
        }
        Ok((Holder(Some(inner)), held))
    }

    /// True if descriptors are held, now or as soon as the keeper runs again.
    pub(crate) fn is_present(&self) -> bool {
        self.0.is_some()
    }

    /// True if a holder is configured and not connected.
    pub(crate) fn is_missing(&self) -> bool {
        self.0.as_ref().is_some_and(|inner| inner.state().link.is_none())
    }

    /// The descriptors of one group.
    pub(crate) fn group(&self, group: Group) -> Hold {
        Hold { holder: self.clone(), group }
    }
}

impl Inner {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn deposit(&self, name: String, deposit: Deposit) {
        let mut state = self.state();
        fault::step();
        let sent = state.link.as_ref().map(|link| link.store(&name, deposit.fd.as_fd(), deposit.poll));
        state.deposits.insert(name, deposit);
        self.check(&mut state, sent);
    }

    fn remove(&self, name: &str) {
        let mut state = self.state();
        fault::step();
        state.deposits.remove(name);
        let sent = state.link.as_ref().map(|link| link.remove(name));
        self.check(&mut state, sent);
    }

    /// A keeper that ended or does not read gets everything again as soon as it is connected.
    fn check(&self, state: &mut State, sent: Option<io::Result<()>>) {
        if let Some(Err(error)) = sent {
            tracing::error!(%error, "descriptor holder lost; sessions do not survive the broker until it is back");
            // systemd does not end; it only did not accept one message.
            if state.link.as_ref().is_some_and(|link| link.watch.is_some()) {
                state.link = None;
            }
        }
    }

    /// Deposits everything at a keeper, and removes everything else from it.
    fn attach(&self, link: Link, fetched: &Fetched) -> io::Result<()> {
        let mut state = self.state();
        for (name, _) in &fetched.fds {
            if !state.deposits.contains_key(name) {
                link.remove(name)?;
            }
        }
        for (name, deposit) in &state.deposits {
            link.store(name, deposit.fd.as_fd(), deposit.poll)?;
        }
        tracing::info!(descriptors = state.deposits.len(), "keeper has everything");
        state.link = Some(Arc::new(link));
        Ok(())
    }
}

/// States of the endpoints of the broker that serves. Another broker only reads them.
pub(crate) fn endpoint_states(directory: &Path) -> io::Result<Vec<OwnedFd>> {
    let deadline = Instant::now() + CONNECT_DEADLINE;
    // A keeper that knows no prefix closes the connection.
    let fetched = fetch_copies(directory, Some("endpoint-"), deadline);
    let fetched = fetched.or_else(|_| fetch_copies(directory, None, deadline))?;
    let is_state = |name: &str| matches!(names::parse(name), Ok((Group::Endpoint(_), Part::State)));
    Ok(fetched.fds.into_iter().filter(|(name, _)| is_state(name)).map(|(_, fd)| fd).collect())
}

/// Waits for a keeper at the start. `None`: no keeper listens, so nothing is held.
fn await_keeper(directory: &Path) -> Result<Option<(Link, Fetched)>, HolderError> {
    let deadline = Instant::now() + START_DEADLINE;
    loop {
        match connect_keeper(directory, deadline) {
            Ok(connected) => return Ok(Some(connected)),
            Err(error) if !is_absent(&error) => {
                return Err(HolderError::Keeper { directory: directory.into(), error });
            }
            Err(error) if Instant::now() >= deadline => {
                tracing::error!(directory = %directory.display(), %error, "no keeper: sessions do not survive the broker");
                return Ok(None);
            }
            Err(_) => thread::sleep(CONNECT_AGAIN),
        }
    }
}

fn is_absent(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused)
}

/// Detects that the keeper ended, and deposits everything at the next one.
fn follow_keeper(inner: &Weak<Inner>, directory: &Path) {
    while let Some(inner) = inner.upgrade() {
        let link = inner.state().link.clone();
        if let Some(link) = link {
            wait_for_loss(&inner, &link);
            continue;
        }
        match connect_keeper(directory, Instant::now() + CONNECT_DEADLINE) {
            Ok((link, fetched)) => {
                if let Err(error) = inner.attach(link, &fetched) {
                    tracing::warn!(%error, "keeper does not take descriptors");
                    thread::sleep(ATTACH_AGAIN);
                }
            }
            Err(_) => thread::sleep(CONNECT_AGAIN),
        }
    }
}

fn wait_for_loss(inner: &Inner, link: &Arc<Link>) {
    let deadline = Some(Instant::now() + CONNECT_AGAIN);
    // Nothing but its end makes the connection readable.
    let ended = wait_readable(&[Interest::maybe(link.watch.as_ref())], deadline).is_ok_and(|[ended]| ended);
    let mut state = inner.state();
    if ended && state.link.as_ref().is_some_and(|now| Arc::ptr_eq(now, link)) {
        tracing::error!("keeper ended; sessions do not survive the broker until it is back");
        state.link = None;
    }
}

/// The descriptors of one group. Clones refer to the same group.
#[derive(Clone, Debug)]
pub(crate) struct Hold {
    holder: Holder,
    group: Group,
}

impl Hold {
    /// Serial number of the group.
    pub(crate) fn serial(&self) -> u64 {
        match self.group {
            Group::Broker => 0,
            Group::Endpoint(serial) | Group::Session(serial) | Group::Account(serial) => serial,
        }
    }

    /// The group of this session's counts.
    pub(crate) fn account(&self) -> Hold {
        self.holder.group(Group::Account(self.serial()))
    }

    /// True if descriptors outlive the broker.
    pub(crate) fn is_present(&self) -> bool {
        self.holder.is_present()
    }

    /// Deposits a descriptor. A name is deposited once; to change it, remove it first.
    pub(crate) fn deposit(&self, part: Part, fd: SharedFd) {
        let Some(inner) = &self.holder.0 else { return };
        let name = name(self.group, part);
        if !inner.state().deposits.contains_key(&name) {
            inner.deposit(name, Deposit::of(part, fd));
        }
    }

    /// Deposits a copy of a descriptor.
    pub(crate) fn deposit_copy(&self, part: Part, fd: impl AsFd) -> io::Result<()> {
        if self.is_present() {
            self.deposit(part, Arc::new(fd.as_fd().try_clone_to_owned()?));
        }
        Ok(())
    }

    /// Removes a descriptor.
    pub(crate) fn remove(&self, part: Part) {
        if let Some(inner) = &self.holder.0 {
            inner.remove(&name(self.group, part));
        }
    }

    /// Removes the descriptors of the group for which `keep` is false.
    pub(crate) fn retain(&self, keep: impl Fn(Part) -> bool) {
        let Some(inner) = &self.holder.0 else { return };
        let prefix = format!("{}.", self.group);
        let ours = |name: &&String| name.starts_with(&prefix);
        let names: Vec<String> = inner
            .state()
            .deposits
            .range(prefix.clone()..)
            .map(|(name, _)| name)
            .take_while(ours)
            .filter(|name| names::parse(name).is_ok_and(|(_, part)| !keep(part)))
            .cloned()
            .collect();
        names.iter().for_each(|name| inner.remove(name));
    }

    /// Removes the whole group.
    pub(crate) fn end(&self) {
        self.retain(|_| false);
    }
}

/// Sorts the fetched descriptors by group. Also returns the names that are not the broker's.
fn sort(fetched: Fetched) -> (Held, Vec<String>) {
    let (mut held, mut unknown) = (Held::default(), Vec::new());
    for (text, fd) in fetched.fds {
        match names::parse(&text) {
            // Of two descriptors of one name, the first was there before.
            Ok((group, part)) => drop(held.groups.entry(group).or_default().entry(part).or_insert(Arc::new(fd))),
            Err(names::UnknownName) => unknown.push(text),
        }
    }
    for group in fetched.hung_up {
        if let Ok(Group::Session(serial)) = group.parse() {
            held.hung_up.insert(serial);
        }
    }
    (held, unknown)
}
