//! One run: a broker, guests, a workload and its torment, and what was found.

use std::collections::BTreeMap;
use std::fmt;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use testkit::broker::{Broker, Control};
use testkit::guest::{Guest, GuestConfig};
use testkit::processes::Holdings;
use testkit::workload::{Config, Limit, Report, SharedPart, Workload};
use virtiofs_config::{Access, EngineConfig};
use virtiofs_contract::counters::Held;

use crate::arguments::Arguments;
use crate::holdings::{held, leaked};
use crate::torment::{Done, torment};

const SHARE: &str = "chaos";
/// Files of the part that all lanes read, and bytes of the longest of them.
const SHARED: (usize, usize) = (20, 200_000);

/// What was done and found.
pub(crate) struct Outcome {
    guests: usize,
    seed: u64,
    elapsed: Duration,
    done: Done,
    report: Report,
    violations: Vec<String>,
    /// More than at the start, once everything was given back.
    still_held: Held,
    leaked: BTreeMap<String, usize>,
}

impl Outcome {
    pub(crate) fn is_clean(&self) -> bool {
        let nothing_held = self.still_held == Held::default() && self.leaked.is_empty();
        self.report.is_clean() && self.violations.is_empty() && nothing_held
    }
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Done { kills, recoveries, handovers } = self.done;
        writeln!(
            f,
            "{} guests, seed {}, {:.0?}: {kills} SIGKILLs ({recoveries} recoveries), {handovers} hand-overs",
            self.guests, self.seed, self.elapsed
        )?;
        writeln!(f, "  {}", self.report)?;
        writeln!(f, "  ring violations: {}", self.violations.len())?;
        self.violations.iter().try_for_each(|violation| writeln!(f, "    {violation}"))?;
        let Held { inodes, handles } = self.still_held;
        write!(f, "  still held when all was given back: {inodes} inodes, {handles} files; leaked: ")?;
        if self.leaked.is_empty() { write!(f, "nothing") } else { write!(f, "{:?}", self.leaked) }
    }
}

/// Torments the engines of so many guests on one share.
pub(crate) fn survive(guests: usize, arguments: &Arguments) -> anyhow::Result<Outcome> {
    let runtime = tempfile::tempdir().context("a directory for sockets")?;
    let source = tempfile::tempdir().context("a directory to share")?;
    let source = source.path().canonicalize()?;
    std::fs::create_dir_all(&arguments.directory)?;
    let log = arguments.directory.join(format!("broker-{guests}.log"));
    let broker = Broker::start(&arguments.broker()?, runtime.path(), &log)?;
    let mut control = broker.control()?;
    let engine = EngineConfig { xattr: true, ..EngineConfig::stock(Access::ReadWrite) };
    let endpoint = broker.endpoint(SHARE, &source, engine);
    control.apply(&endpoint)?;
    let config = workload(&source, guests, arguments)?;
    let before = Holdings::of_tree(broker.pid())?;
    let machines = boot(&endpoint.socket.path, guests)?;
    let at_first = held(&mut control, SHARE)?;
    let begin = Instant::now();
    let (report, done) = work(config, &machines, &mut control, arguments)?;
    let elapsed = begin.elapsed();
    let violations = machines.iter().flat_map(Guest::violations).map(|violation| violation.0).collect();
    let at_last = held(&mut control, SHARE)?;
    drop(machines);
    let leaked = leaked(broker.pid(), &before)?;
    let still_held = Held {
        inodes: at_last.inodes.saturating_sub(at_first.inodes),
        handles: at_last.handles.saturating_sub(at_first.handles),
    };
    Ok(Outcome { guests, seed: arguments.seed, elapsed, done, report, violations, still_held, leaked })
}

fn boot(socket: &Path, guests: usize) -> anyhow::Result<Vec<Guest>> {
    (0..guests).map(|_| Guest::boot(GuestConfig::new(socket).small()).context("mounting")).collect()
}

fn workload(source: &Path, guests: usize, arguments: &Arguments) -> anyhow::Result<Config> {
    let part = SharedPart::new(arguments.seed, SHARED.0, SHARED.1);
    part.create(source).context("the part that all lanes read")?;
    let config = Config::new(arguments.seed).lanes(arguments.lanes).host(source).shared(part);
    if !arguments.trace {
        return Ok(config);
    }
    let trace = arguments.directory.join(format!("steps-{guests}"));
    std::fs::create_dir_all(&trace)?;
    Ok(config.trace(trace))
}

/// Runs workload and torment beside each other until the torment is over or no lane can continue.
fn work(
    config: Config,
    guests: &[Guest],
    control: &mut Control,
    arguments: &Arguments,
) -> anyhow::Result<(Report, Done)> {
    let clients: Vec<_> = guests.iter().map(Guest::fuse).collect();
    let mut workload = Workload::start(config, &clients);
    let (over, enough) = (AtomicBool::new(false), AtomicBool::new(false));
    let done = thread::scope(|scope| {
        let tormentor = scope.spawn(|| {
            let done = torment(control, SHARE, arguments, &enough);
            over.store(true, Ordering::Relaxed);
            done
        });
        workload.run(Limit::until(&over));
        // Lanes that cannot continue end by themselves.
        enough.store(true, Ordering::Relaxed);
        tormentor.join()
    });
    let report = workload.finish();
    match done {
        Ok(Ok(done)) => Ok((report, done)),
        Ok(Err(error)) => Err(error.context(format!("the workload so far: {report}"))),
        Err(_) => bail!("the thread that kills panicked"),
    }
}
