//! One run: daemons, guests, a workload and disruptions, and the result.

use std::collections::BTreeMap;
use std::fmt;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use testkit::broker::endpoint_in;
use testkit::guest::{Guest, GuestConfig};
use testkit::workload::{Config, Limit, Report, SharedPart, Workload};
use virtiofs_config::{Access, EngineConfig};
use virtiofs_contract::control::{Endpoint, EndpointStatus, SessionState};
use virtiofs_contract::counters::Held;

use crate::arguments::Arguments;
use crate::daemons::Daemons;
use crate::disruptions::disrupt;
use crate::holdings::{held, leaked, without_engines};
use crate::plan::{Done, plan};

const SHARE: &str = "chaos";
/// Number of files that all lanes read, and maximum length of a file in bytes.
const SHARED: (usize, usize) = (20, 200_000);

/// Result of a run.
pub(crate) struct Outcome {
    guests: usize,
    seed: u64,
    elapsed: Duration,
    done: Done,
    report: Report,
    /// Sessions that were lost or do not serve.
    lost: u64,
    violations: Vec<String>,
    /// What guests hold in addition to the start, after everything was released.
    still_held: Held,
    leaked: BTreeMap<String, usize>,
}

impl Outcome {
    pub(crate) fn is_clean(&self) -> bool {
        let nothing_held = self.still_held == Held::default() && self.leaked.is_empty();
        self.report.is_clean() && self.lost == 0 && self.violations.is_empty() && nothing_held
    }
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let events: u64 = self.done.values().sum();
        writeln!(f, "{} guests, seed {}, {:.0?}: {events} events", self.guests, self.seed, self.elapsed)?;
        let kinds: Vec<String> = self.done.iter().map(|(event, count)| format!("{count} {event}")).collect();
        writeln!(f, "  {}", kinds.join(", "))?;
        writeln!(f, "  {}", self.report)?;
        writeln!(f, "  lost sessions: {}", self.lost)?;
        writeln!(f, "  ring violations: {}", self.violations.len())?;
        self.violations.iter().try_for_each(|violation| writeln!(f, "    {violation}"))?;
        let Held { inodes, handles } = self.still_held;
        write!(f, "  still held after all was released: {inodes} inodes, {handles} files; leaked: ")?;
        if self.leaked.is_empty() { write!(f, "nothing") } else { write!(f, "{:?}", self.leaked) }
    }
}

/// Disrupts the daemons of this number of guests on one share.
pub(crate) fn survive(guests: usize, arguments: &Arguments) -> anyhow::Result<Outcome> {
    let directory = tempfile::tempdir().context("creating a directory for sockets")?;
    let source = tempfile::tempdir().context("creating a directory to share")?;
    let source = source.path().canonicalize()?;
    std::fs::create_dir_all(&arguments.directory)?;
    let log = arguments.directory.join(format!("broker-{guests}.log"));
    std::fs::write(&log, "")?;
    let mut daemons = Daemons::start(&arguments.programs()?, directory.path(), &log)?;
    let engine = EngineConfig { xattr: true, ..EngineConfig::stock(Access::ReadWrite) };
    let endpoint = endpoint_in(&daemons.runtime(), SHARE, &source, engine);
    daemons.control()?.apply(&endpoint)?;
    // A restarted broker has copies of held descriptors, so the comparison starts after a restart.
    daemons.kill_broker()?;
    drop(daemons.start_broker()?);
    // The same applies to a broker that has served a guest.
    drop(boot(&endpoint.socket.path, 1)?);
    let before = without_engines(&daemons)?;
    let config = workload(&source, guests, arguments)?;
    let machines = boot(&endpoint.socket.path, guests)?;
    let at_first = held(&mut daemons.control()?, SHARE)?;
    let begin = Instant::now();
    let (report, done) = work(config, &machines, &mut daemons, &endpoint, arguments)?;
    let elapsed = begin.elapsed();
    let violations = machines.iter().flat_map(Guest::violations).map(|violation| violation.0).collect();
    let lost = lost(&daemons.control()?.status_of(SHARE)?, guests as u64);
    let at_last = held(&mut daemons.control()?, SHARE)?;
    drop(machines);
    let leaked = leaked(&daemons, &before)?;
    let still_held = Held {
        inodes: at_last.inodes.saturating_sub(at_first.inodes),
        handles: at_last.handles.saturating_sub(at_first.handles),
    };
    Ok(Outcome { guests, seed: arguments.seed, elapsed, done, report, lost, violations, still_held, leaked })
}

/// Number of sessions that were lost, were opened again, or are not serving. One session ended before.
fn lost(status: &EndpointStatus, guests: u64) -> u64 {
    let is_up = |state| matches!(state, SessionState::Serving | SessionState::Recovering);
    let up = status.sessions.iter().filter(|session| is_up(session.state)).count() as u64;
    status.sessions_lost + guests.abs_diff(up) + (guests + 1).abs_diff(status.sessions_started)
}

fn boot(socket: &Path, guests: usize) -> anyhow::Result<Vec<Guest>> {
    (0..guests).map(|_| Guest::boot(GuestConfig::new(socket).small()).context("mounting")).collect()
}

fn workload(source: &Path, guests: usize, arguments: &Arguments) -> anyhow::Result<Config> {
    let part = SharedPart::new(arguments.seed, SHARED.0, SHARED.1);
    part.create(source).context("creating the files that all lanes read")?;
    let config = Config::new(arguments.seed).lanes(arguments.lanes).host(source).shared(part);
    if !arguments.trace {
        return Ok(config);
    }
    let trace = arguments.directory.join(format!("steps-{guests}"));
    std::fs::create_dir_all(&trace)?;
    Ok(config.trace(trace))
}

/// Runs workload and disruptions concurrently until the disruptions are done or no lane can continue.
fn work(
    config: Config,
    guests: &[Guest],
    daemons: &mut Daemons,
    endpoint: &Endpoint,
    arguments: &Arguments,
) -> anyhow::Result<(Report, Done)> {
    let clients: Vec<_> = guests.iter().map(Guest::fuse).collect();
    let mut workload = Workload::start(config, &clients);
    let plan = plan(arguments.seed, arguments.events, arguments.kinds(), arguments.pause());
    let (over, enough) = (AtomicBool::new(false), AtomicBool::new(false));
    // Daemons end with the thread that started them, so this thread runs the disruptions.
    let done = thread::scope(|scope| {
        let workload = scope.spawn(|| {
            workload.run(Limit::until(&over));
            // All lanes have stopped, possibly because none can continue.
            enough.store(true, Ordering::Relaxed);
        });
        let done = disrupt(daemons, endpoint, &plan, &enough);
        over.store(true, Ordering::Relaxed);
        workload.join().map(|()| done)
    });
    let report = workload.finish();
    match done {
        Ok(Ok(done)) => Ok((report, done)),
        Ok(Err(error)) => Err(error.context(format!("the workload so far: {report}"))),
        Err(_) => bail!("a thread of the workload panicked"),
    }
}
