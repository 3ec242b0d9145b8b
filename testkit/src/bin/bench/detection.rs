//! The cost of staleness detection: the engine with and without it, and the size of its data in the ledger.

use std::path::Path;

use anyhow::Context;
use testkit::broker::{Broker, Control};
use testkit::guest::{Guest, GuestConfig};
use virtiofs_config::{Access, EngineConfig};

use crate::cases::{ALL, Case};
use crate::figure::{Figure, Target};
use crate::material::Material;
use crate::options::Options;
use crate::pauses::ledger_bytes;
use crate::report::print_section;
use crate::rounds;
use crate::system::System;

const SHARE: &str = "bench";

/// Target ratio to an engine without detection.
const TARGET: f64 = 0.99;

/// Lookups of held and of new names, and opens: the operations that detection follows up.
const CASES: [&str; 3] = ["lookup", "lookup-first", "open-release"];

/// Target of additional ledger bytes for an inode and its name: zero, except for partly used pages.
const BYTES_TARGET: f64 = 0.5;

/// A guest, its server and the status of the session.
struct Side {
    system: System,
    control: Control,
}

pub(crate) fn measure(options: &Options, material: &Material, work: &Path) -> anyhow::Result<Vec<Figure>> {
    let mut with = Side::start(true, material, work, options).context("starting an engine with detection")?;
    let mut without = Side::start(false, material, work, options).context("starting an engine without detection")?;
    let cases = ALL.iter().filter(|case| CASES.contains(&case.name));
    let mut figures = cases
        .map(|case| {
            let case = Case { target: TARGET, ..*case };
            let line = rounds::run(&case, &mut with.system, &mut without.system, options);
            let figure = line.with_context(|| case.name)?.figure;
            Ok(Figure { name: format!("detection-{}", case.name), ..figure })
        })
        .collect::<anyhow::Result<Vec<_>>>()?;
    let more = with.bytes_per_inode()? - without.bytes_per_inode()?;
    figures
        .push(Figure::alone("detection-ledger".into(), more, "bytes/inode").with_target(Target::AtMost(BYTES_TARGET)));
    print_section("staleness detection on, compared with off; additional size of the ledger", "off", &figures);
    Ok(figures)
}

impl Side {
    /// Starts a broker of its own with one guest.
    fn start(detect: bool, material: &Material, work: &Path, options: &Options) -> anyhow::Result<Self> {
        let runtime = tempfile::tempdir_in(work).context("creating a directory for sockets")?;
        let broker = Broker::start(&options.broker, runtime.path(), &options.log("detection"))?;
        let engine = EngineConfig { xattr: true, detect_staleness: detect, ..EngineConfig::stock(Access::ReadWrite) };
        let endpoint = broker.endpoint(SHARE, &material.share, engine);
        let mut control = broker.control()?;
        control.apply(&endpoint)?;
        let mut config = GuestConfig::new(&endpoint.socket.path).memory(options.memory);
        config.in_flight = config.in_flight.max(options.depth as u16 + 1);
        let system = System::prepare(Guest::boot(config)?, (broker, runtime))?;
        Ok(Side { system, control })
    }

    /// Ledger bytes per inode when the guest holds every file of a large directory.
    fn bytes_per_inode(&mut self) -> anyhow::Result<f64> {
        let (fuse, parent) = (self.system.fuse(), self.system.many);
        for name in &self.system.names {
            fuse.lookup(parent, name)?;
        }
        let status = self.control.status_of(SHARE)?;
        let session = status.sessions.first().context("the broker has no session")?;
        let engine = session.engine_pid.context("no engine serves")?;
        Ok(ledger_bytes(engine as i32)? as f64 / session.held.inodes as f64)
    }
}
