//! A guest with its own broker, whose engines are replaced and killed.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tempfile::TempDir;
use testkit::broker::{Broker, Control};
use testkit::fuse::call::{Call, Pending};
use testkit::fuse::client::read_in;
use testkit::fuse::wire::{EntryOut, Opcode, ROOT};
use testkit::guest::{Guest, GuestConfig};
use virtiofs_config::{Access, CachePolicy, EngineConfig};
use virtiofs_contract::control::{Endpoint, EndpointStatus, SessionStatus};
use zerocopy::IntoBytes;

use super::priority::set_real_time;
use super::prober::Prober;
use crate::options::Options;
use crate::tree::{BLOCK, BLOCK_LENGTH, Tree, directory_name, place};

const SHARE: &str = "bench";
/// Poll interval of the broker's status. The broker's reply uses the same two cores.
const POLL_INTERVAL: Duration = Duration::from_millis(10);
/// Time limit of an event.
const TIMEOUT: Duration = Duration::from_secs(30);
/// Number of lookups in flight while the guest looks up files.
const DEPTH: usize = 8;
/// Guest memory for one request in flight: the data of the longest read, and its buffers.
const PER_REQUEST: u64 = 1152 << 10;
/// Guest memory for everything else.
const OTHER_MEMORY: u64 = 24 << 20;
/// Time after which the standby engine is surely ready.
const STANDBY_READY: Duration = Duration::from_secs(1);
/// Duration of an idle measurement: about that of a hand-over from its request on.
const IDLE: Duration = Duration::from_millis(100);

/// What a guest observed of a hand-over.
#[derive(Debug, Clone, Copy)]
pub(crate) struct HandOver {
    /// Time between the last reply of the old engine and the first reply of the new one.
    pub(crate) pause: Duration,
    /// The slowest request since the hand-over was requested, while engines start and are tested on the same
    /// processors.
    pub(crate) slowest: Duration,
}

/// Guest, broker and the connection to it.
pub(crate) struct Stage {
    // Fields are dropped in this order: the guest before its broker.
    guest: Guest,
    control: Control,
    endpoint: Endpoint,
    _broker: Broker,
    _runtime: TempDir,
    directories: Vec<u64>,
    pub(crate) nodes: Vec<u64>,
    /// Node id and handle of a file to read.
    block: (u64, u64),
    /// Number of engines that were started when the standby engine is ready.
    engines: u64,
    real_time: bool,
}

impl Stage {
    /// Starts a guest with this amount of memory, all of it touched.
    pub(crate) fn new(options: &Options, tree: &Tree, memory: u64) -> anyhow::Result<Self> {
        let runtime = tempfile::tempdir().context("creating a directory for sockets")?;
        // Its children inherit the priority.
        set_real_time(options.real_time).context("setting a real-time priority (--real-time)")?;
        let broker = Broker::start(&options.broker, runtime.path(), &options.log("pauses"));
        set_real_time(false)?;
        let broker = broker?;
        let mut control = broker.control()?;
        let endpoint = broker.endpoint(SHARE, &tree.root, EngineConfig::stock(Access::ReadWrite));
        control.apply(&endpoint)?;
        let guest = Guest::boot(guest(&endpoint, memory))?;
        let node = guest.fuse().lookup(ROOT, BLOCK)?.nodeid;
        let block = (node, guest.fuse().open(node, libc::O_RDONLY)?.fh);
        Ok(Self {
            guest,
            control,
            endpoint,
            _broker: broker,
            _runtime: runtime,
            directories: Vec::new(),
            nodes: Vec::new(),
            block,
            engines: 0,
            real_time: options.real_time,
        })
    }

    /// Looks up files until the guest holds `count` of them.
    pub(crate) fn look_up(&mut self, count: usize) -> anyhow::Result<()> {
        let fuse = self.guest.fuse().clone();
        let mut running = VecDeque::<Pending>::new();
        for index in self.nodes.len()..count {
            let (directory, name) = place(index);
            if directory == self.directories.len() {
                self.directories.push(fuse.lookup(ROOT, directory_name(directory))?.nodeid);
            }
            let arguments = [name.as_bytes(), b"\0"];
            let call = Call::new(Opcode::Lookup, self.directories[directory], &arguments).expecting::<EntryOut>();
            running.push_back(fuse.start(&call)?);
            if running.len() == DEPTH {
                self.take(running.pop_front())?;
            }
        }
        while !running.is_empty() {
            self.take(running.pop_front())?;
        }
        Ok(())
    }

    fn take(&mut self, pending: Option<Pending>) -> anyhow::Result<()> {
        if let Some(pending) = pending {
            self.nodes.push(pending.wait()?.body::<EntryOut>()?.nodeid);
        }
        Ok(())
    }

    /// Number of nodes that the guest holds: files, their directories, the root and the file that is read.
    pub(crate) fn held(&self) -> usize {
        self.nodes.len() + self.directories.len() + 2
    }

    pub(crate) fn prober(&self) -> anyhow::Result<Prober> {
        Prober::start(self.guest.fuse().clone(), self.nodes.clone(), self.real_time).context("starting the prober")
    }

    /// The guest's slowest request while nothing happens: the noise of this machine.
    pub(crate) fn idle(&mut self, prober: &Prober) -> anyhow::Result<Duration> {
        prober.forget()?;
        std::thread::sleep(IDLE);
        prober.slowest()
    }

    /// Hands over to a new configuration.
    pub(crate) fn hand_over(&mut self, prober: &Prober) -> anyhow::Result<HandOver> {
        let before = self.status()?.totals.replacements.hand_overs.count;
        self.touch()?;
        let engine = &mut self.endpoint.engine;
        (engine.cache, engine.attr_timeout_ms) = match engine.cache {
            CachePolicy::Auto => (CachePolicy::Always, 2000),
            _ => (CachePolicy::Auto, 1000),
        };
        prober.forget()?;
        self.control.apply(&self.endpoint)?;
        self.until("hand-over", |status| status.totals.replacements.hand_overs.count > before)?;
        Ok(HandOver { pause: prober.change()?, slowest: prober.slowest()? })
    }

    /// Waits until the standby engine is ready, at most one second.
    pub(crate) fn wait_for_standby(&mut self) -> anyhow::Result<()> {
        std::thread::sleep(STANDBY_READY);
        self.engines = self.status()?.engines_started;
        Ok(())
    }

    /// Kills the engine while the standby engine is ready. Returns the guest's slowest request.
    pub(crate) fn kill(&mut self, prober: &Prober) -> anyhow::Result<Duration> {
        let engines = self.engines;
        self.until("standby engine", |status| status.engines_started >= engines)?;
        let before = self.status()?.totals.replacements.recoveries.count;
        self.touch()?;
        let engine = self.engine_pid()?;
        prober.forget()?;
        kill(Pid::from_raw(engine), Signal::SIGKILL).context("killing the engine")?;
        self.until("recovery", |status| status.totals.replacements.recoveries.count > before)?;
        self.engines += 1;
        prober.slowest()
    }

    /// Makes the engine write to nearly all guest memory, like one that has served for a while. When a process is
    /// killed, the kernel unmaps its touched memory before it closes its descriptors.
    fn touch(&self) -> anyhow::Result<()> {
        let (node, fh) = self.block;
        let body = read_in(fh, 0, BLOCK_LENGTH);
        let arguments = [body.as_bytes()];
        let call = Call::new(Opcode::Read, node, &arguments).receiving(BLOCK_LENGTH);
        let requests = usize::from(self.guest.config().in_flight) - DEPTH;
        let reads = (0..requests).map(|_| self.guest.fuse().start(&call)).collect::<Result<Vec<_>, _>>()?;
        reads.into_iter().try_for_each(|read| read.wait().map(drop))?;
        Ok(())
    }

    pub(crate) fn engine_pid(&mut self) -> anyhow::Result<i32> {
        let session = the_session(&self.status()?).and_then(|session| session.engine_pid);
        Ok(session.context("no engine serves")? as i32)
    }

    /// Fails if there are unexpected used-ring entries.
    pub(crate) fn check(&self) -> anyhow::Result<()> {
        match self.guest.violations().first() {
            None => Ok(()),
            Some(violation) => bail!("the engines violate the rules of the ring: {}", violation.0),
        }
    }

    fn status(&mut self) -> anyhow::Result<EndpointStatus> {
        Ok(self.control.status_of(SHARE)?)
    }

    fn until(&mut self, what: &str, holds: impl Fn(&EndpointStatus) -> bool) -> anyhow::Result<()> {
        let begin = Instant::now();
        loop {
            let status = self.status()?;
            if holds(&status) {
                return Ok(());
            }
            if begin.elapsed() > TIMEOUT {
                bail!("no {what} within {TIMEOUT:?}: {:?}", the_session(&status));
            }
            std::thread::sleep(POLL_INTERVAL);
        }
    }
}

/// Turns all guest memory that is not otherwise needed into buffers of requests, so that it can be touched.
fn guest(endpoint: &Endpoint, memory: u64) -> GuestConfig {
    let in_flight = (memory.saturating_sub(OTHER_MEMORY) / PER_REQUEST).clamp(16, 8192) as u16;
    GuestConfig {
        touch_memory: true,
        in_flight,
        queue_size: in_flight.next_power_of_two().max(1024),
        segment: 64 << 10,
        ..GuestConfig::new(&endpoint.socket.path).memory(memory)
    }
}

fn the_session(status: &EndpointStatus) -> Option<SessionStatus> {
    status.sessions.first().cloned()
}
