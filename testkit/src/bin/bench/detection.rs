//! What it costs to look for staleness: our engine with it against our engine without, and what the ledger keeps for
//! it.

use std::path::Path;

use anyhow::Context;
use testkit::broker::{Broker, Control};
use testkit::guest::{Guest, GuestConfig};
use virtiofs_config::{Access, EngineConfig};

use crate::cases::{ALL, Case};
use crate::contestant::Contestant;
use crate::figure::{Aim, Figure};
use crate::material::Material;
use crate::options::Options;
use crate::pauses::ledger_bytes;
use crate::report::print_section;
use crate::rounds;

const SHARE: &str = "bench";

/// The ratio to an engine that does not look.
const AIM: f64 = 0.99;

/// Lookups, of names that are held and of new ones, and opens, each of which is followed up.
const CASES: [&str; 3] = ["lookup", "lookup-first", "open-release"];

/// What an inode and its name may take more in the ledger, in bytes: nothing, but for pages begun.
const BYTES_AIM: f64 = 0.5;

/// A guest, its server and what is known of the session.
struct Side {
    contestant: Contestant,
    control: Control,
}

pub(crate) fn measure(options: &Options, material: &Material, work: &Path) -> anyhow::Result<Vec<Figure>> {
    let mut with = Side::start(true, material, work, options).context("an engine that looks for staleness")?;
    let mut without = Side::start(false, material, work, options).context("an engine that does not")?;
    let cases = ALL.iter().filter(|case| CASES.contains(&case.name));
    let mut figures = cases
        .map(|case| {
            let case = Case { aim: AIM, ..*case };
            let line = rounds::run(&case, &mut with.contestant, &mut without.contestant, options);
            let figure = line.with_context(|| case.name)?.figure;
            Ok(Figure { name: format!("detection-{}", case.name), ..figure })
        })
        .collect::<anyhow::Result<Vec<_>>>()?;
    let more = with.bytes_per_inode()? - without.bytes_per_inode()?;
    figures.push(Figure::alone("detection-ledger".into(), more, "bytes/inode").aiming(Aim::AtMost(BYTES_AIM)));
    print_section("staleness looked for, against not; the ledger: what it takes more", "off", &figures);
    Ok(figures)
}

impl Side {
    /// A broker of its own with one guest.
    fn start(detect: bool, material: &Material, work: &Path, options: &Options) -> anyhow::Result<Self> {
        let runtime = tempfile::tempdir_in(work).context("a directory for sockets")?;
        let broker = Broker::start(&options.broker, runtime.path(), &options.log("detection"))?;
        let engine = EngineConfig { xattr: true, detect_staleness: detect, ..EngineConfig::stock(Access::ReadWrite) };
        let endpoint = broker.endpoint(SHARE, &material.share, engine);
        let mut control = broker.control()?;
        control.apply(&endpoint)?;
        let mut config = GuestConfig::new(&endpoint.socket.path).memory(options.memory);
        config.in_flight = config.in_flight.max(options.depth as u16 + 1);
        let contestant = Contestant::prepare(Guest::boot(config)?, (broker, runtime))?;
        Ok(Side { contestant, control })
    }

    /// Bytes of ledger for each inode, once the guest holds every file of a large directory.
    fn bytes_per_inode(&mut self) -> anyhow::Result<f64> {
        let (fuse, parent) = (self.contestant.fuse(), self.contestant.many);
        for name in &self.contestant.names {
            fuse.lookup(parent, name)?;
        }
        let status = self.control.status_of(SHARE)?;
        let session = status.sessions.first().context("the broker knows no session")?;
        let engine = session.engine_pid.context("no engine serves")?;
        Ok(ledger_bytes(engine as i32)? as f64 / session.held.inodes as f64)
    }
}
