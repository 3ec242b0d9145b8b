//! One session from its start to its end: this process listens, starts keeper and broker, and ends when the VMM leaves.

use std::ffi::OsString;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{self, Receiver, Sender};
use std::thread;
use std::time::Duration;

use anyhow::{Context, bail};
use nix::fcntl::OFlag;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::unistd::{geteuid, read, write};
use virtiofs_contract::control::{Endpoint, EndpointKind, SocketSpec};

use crate::args::Options;
use crate::listen::Listening;
use crate::metrics::{self, MetricsFile, Observed};
use crate::plan::Plan;
use crate::process::{Daemon, find};
use crate::remedies::Remedies;
use crate::runtime_dir::{RuntimeDir, bases};
use crate::session::{Event, Request, Session};
use crate::{name, orphans};

/// How long a program that ended waits at most before its pause is looked at.
const LOOK_EVERY: Duration = Duration::from_millis(50);

/// How it ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum End {
    /// The VMM has left.
    Left,
    /// By a signal.
    Signalled(Signal),
}

/// Signals that this process handles, read from a descriptor. Block them before the first thread starts.
#[derive(Debug)]
pub(crate) struct Signals(SignalFd);

impl Signals {
    /// Blocks them. SIGINT stays ignored if it is: shells ignore it for what a script starts in the background, and a blocked
    /// signal would arrive all the same.
    pub(crate) fn block() -> io::Result<Self> {
        let mut signals = SigSet::from_iter([Signal::SIGTERM, Signal::SIGHUP, Signal::SIGCHLD]);
        if !is_ignored(Signal::SIGINT)? {
            signals.add(Signal::SIGINT);
        }
        signals.thread_block()?;
        Ok(Signals(SignalFd::with_flags(&signals, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)?))
    }

    fn next(&self) -> Option<Signal> {
        let signal = self.0.read_signal().ok().flatten()?;
        Signal::try_from(signal.ssi_signo.cast_signed()).ok()
    }
}

fn is_ignored(signal: Signal) -> io::Result<bool> {
    let ignore = SigAction::new(SigHandler::SigIgn, SaFlags::empty(), SigSet::empty());
    // SAFETY: this sets no handler, and puts back what was there before any other thread starts.
    let before = unsafe {
        let before = sigaction(signal, &ignore)?;
        sigaction(signal, &before)?;
        before
    };
    Ok(matches!(before.handler(), SigHandler::SigIgn))
}

/// Serves until the VMM leaves or a signal ends it. Whatever was started or made is gone afterwards.
pub(crate) fn serve(options: &Options, plan: Plan, log: &str, signals: &Signals) -> anyhow::Result<End> {
    let path = std::env::var("PATH").unwrap_or_default();
    let [keeper, broker] = [find("virtiofs-keeper", &path)?, find("virtiofs-broker", &path)?];
    find("virtiofs-engine", &path)?;
    let source = source(&plan.shared_dir)?;
    let listening = Listening::open(&plan.listen)?;
    let session = options.name.clone().unwrap_or_else(|| {
        let distinct = listening.path().map_or_else(|| std::process::id().to_string(), |it| it.display().to_string());
        name::of_session(&source, &distinct)
    });
    let observed = Observed::default();
    if let Some(address) = options.metrics {
        metrics::serve(address, observed.clone()).with_context(|| format!("--metrics={address}"))?;
    }
    orphans::become_subreaper().context("cannot become the parent of orphans")?;
    let user_runtime_dir = std::env::var_os("XDG_RUNTIME_DIR");
    let bases = bases(geteuid().is_root(), user_runtime_dir.as_deref());
    let runtime_dir = RuntimeDir::create(&bases).context("no directory for the sockets of broker and keeper")?;
    let session = Session {
        broker: runtime_dir.broker().join("broker.sock"),
        endpoint: endpoint(session.clone(), source.clone(), &plan, &listening),
        listener: listening.as_fd().try_clone_to_owned()?,
        remedies: Remedies::new(plan.heal, plan.engine, source),
        observed,
        file: options.metrics_dir.as_deref().map(|directory| MetricsFile::new(directory, &session)),
    };
    let mut daemons = Daemons::start(keeper, broker, &runtime_dir, log)?;
    let (follower, events) = Follower::start(session)?;
    let outcome = run(signals, &mut daemons, &follower, &events);
    daemons.end();
    orphans::wait_for_all();
    follower.end();
    outcome
}

/// Canonical path of the directory.
fn source(given: &str) -> anyhow::Result<PathBuf> {
    let path = Path::new(given);
    if !path.exists() {
        bail!("{given} does not exist");
    }
    if !path.is_dir() {
        bail!("{given} is not a directory; to share a single file, share a directory that contains it");
    }
    path.canonicalize().with_context(|| given.to_owned())
}

fn endpoint(name: String, source: PathBuf, plan: &Plan, listening: &Listening) -> Endpoint {
    let path = listening.path().unwrap_or(Path::new("/inherited")).to_path_buf();
    Endpoint {
        name,
        kind: EndpointKind::Listener,
        source,
        sub_path: None,
        socket: SocketSpec { path, owner: None, group: None, mode: 0o600 },
        engine: plan.engine.clone(),
        // Stock virtiofsd accepts a single connection.
        exclusive: true,
        consumer: None,
    }
}

fn run(signals: &Signals, daemons: &mut Daemons, follower: &Follower, events: &Receiver<Event>) -> anyhow::Result<End> {
    let mut ready = false;
    loop {
        follower.wait(signals)?;
        while let Some(signal) = signals.next() {
            match signal {
                Signal::SIGHUP => follower.exchange(),
                Signal::SIGTERM | Signal::SIGINT => return Ok(End::Signalled(signal)),
                _ => {}
            }
        }
        match events.try_recv() {
            Ok(Event::Ready) => {
                ready = true;
                tracing::info!("Waiting for vhost-user socket connection...");
            }
            Ok(Event::Ended) => {
                tracing::info!("Client disconnected, shutting down");
                return Ok(End::Left);
            }
            Ok(Event::Refused(finding)) => bail!("{finding}"),
            Ok(Event::Invalid(message)) => bail!("{message}; install programs of one version"),
            Ok(Event::Lost) => bail!("the session was lost with the broker; restart the VM"),
            Err(_) => {}
        }
        if daemons.supervise() && !ready {
            bail!("the broker or the keeper does not start; its message is above");
        }
    }
}

/// Broker and keeper.
#[derive(Debug)]
struct Daemons {
    broker: Daemon,
    keeper: Daemon,
}

impl Daemons {
    fn start(keeper: PathBuf, broker: PathBuf, directory: &RuntimeDir, log: &str) -> anyhow::Result<Self> {
        let log = ["--log".into(), log.into()];
        let with_log = |arguments: &[OsString]| [arguments, &log].concat();
        let keeper_dir = directory.keeper();
        let arguments = with_log(&["--directory".into(), keeper_dir.clone().into()]);
        let keeper = Daemon::start("keeper", keeper, arguments)?;
        let arguments = with_log(&[
            "--runtime-dir".into(),
            directory.broker().into(),
            "--keeper".into(),
            keeper_dir.into(),
            "--shared-runtime-dir".into(),
        ]);
        match Daemon::start("broker", broker, arguments) {
            Ok(broker) => Ok(Daemons { broker, keeper }),
            Err(error) => {
                let mut keeper = keeper;
                keeper.end();
                Err(error.into())
            }
        }
    }

    /// True if one has ended.
    fn supervise(&mut self) -> bool {
        let ended = [self.keeper.supervise(), self.broker.supervise()];
        orphans::reap(&[self.keeper.pid(), self.broker.pid()]);
        ended.contains(&true)
    }

    /// The keeper last: with it ends what the broker has left.
    fn end(&mut self) {
        self.broker.end();
        self.keeper.end();
    }
}

/// The thread that talks to the broker.
#[derive(Debug)]
struct Follower {
    requests: Sender<Request>,
    woken: OwnedFd,
    thread: thread::JoinHandle<()>,
}

impl Follower {
    fn start(session: Session) -> anyhow::Result<(Self, Receiver<Event>)> {
        let (requests, requested) = mpsc::channel();
        let (event, events) = mpsc::channel();
        let (woken, wake) = nix::unistd::pipe2(OFlag::O_CLOEXEC)?;
        let report = move |happened| {
            let _ = event.send(happened);
            let _ = write(&wake, &[0]);
        };
        let follow = move || session.follow(&requested, report);
        let thread = thread::Builder::new().name("session".into()).spawn(follow)?;
        Ok((Follower { requests, woken, thread }, events))
    }

    fn exchange(&self) {
        let _ = self.requests.send(Request::Exchange);
    }

    /// Waits for a signal or an event, or a little.
    fn wait(&self, signals: &Signals) -> io::Result<()> {
        let interest = |fd| PollFd::new(fd, PollFlags::POLLIN);
        let mut fds = [interest(signals.0.as_fd()), interest(self.woken.as_fd())];
        let timeout = PollTimeout::try_from(LOOK_EVERY).unwrap_or(PollTimeout::ZERO);
        poll(&mut fds, timeout)?;
        if fds[1].any() == Some(true) {
            let _ = read(&self.woken, &mut [0; 16]);
        }
        Ok(())
    }

    /// Ends the thread, and with it the file of metrics.
    fn end(self) {
        drop(self.requests);
        let _ = self.thread.join();
    }
}
