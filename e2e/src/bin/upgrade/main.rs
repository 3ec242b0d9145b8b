//! Rolls agent, broker and engine of a node from one release to another and back, in every order, while a real guest works.
//! The guest counts its errors.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use clap::Parser;
use e2e::guest::{Guest, GuestSpec};
use e2e::interrupt;
use e2e::load::Load;
use e2e::node::{Declaration, Node};
use e2e::parts::Parts;
use e2e::tree;
use e2e::upgrade::Daemon;

/// Name of the share, and tag of the guest's device.
const SHARE: &str = "share";

/// Pause between two replacements, in which the guest works with that combination of releases.
const BETWEEN: Duration = Duration::from_millis(400);

/// Every order of the three daemons. In half of them the broker is killed instead of replaced by one that stands by.
const ORDERS: [[Daemon; 3]; 6] = [
    [Daemon::Agent, Daemon::Broker, Daemon::Engine],
    [Daemon::Agent, Daemon::Engine, Daemon::KilledBroker],
    [Daemon::Broker, Daemon::Agent, Daemon::Engine],
    [Daemon::KilledBroker, Daemon::Engine, Daemon::Agent],
    [Daemon::Engine, Daemon::Agent, Daemon::Broker],
    [Daemon::Engine, Daemon::KilledBroker, Daemon::Agent],
];

#[derive(Parser)]
#[command(about = "Rolls a node between two releases under a guest, in every order and back.")]
struct Arguments {
    /// Directory with the binaries of the other release
    #[arg(long, value_name = "DIRECTORY")]
    other: PathBuf,
    /// Directory with the binaries of this release
    #[arg(long, value_name = "DIRECTORY")]
    present: PathBuf,
    /// Only from the other release to this one, each order with a guest of its own
    #[arg(long)]
    forward: bool,
}

fn main() -> ExitCode {
    interrupt::run("upgrade", || run(&Arguments::parse()))
}

fn run(arguments: &Arguments) -> Result<()> {
    let Arguments { other, present, forward } = arguments;
    if *forward {
        return ORDERS.iter().try_for_each(|order| work_during((other, present), &[(present, *order)]));
    }
    // Sessions of either release, to the other one and back.
    for (from, to) in [(other, present), (present, other)] {
        let rolls: Vec<_> = ORDERS.iter().flat_map(|order| [(to, *order), (from, *order)]).collect();
        work_during((from, to), &rolls)?;
    }
    Ok(())
}

/// Boots a guest on a node of the first release, and rolls the daemons while it works. The guest must count no error.
fn work_during((from, to): (&Path, &Path), rolls: &[(&PathBuf, [Daemon; 3])]) -> Result<()> {
    println!("node of {}, rolled to {} {} times", from.display(), to.display(), rolls.len());
    let mut parts = Parts::locate()?;
    parts.release = from.to_owned();
    let source = tempfile::tempdir().context("making a directory to share")?;
    tree::plant(&source.path().join("base"), 60)?;
    fs::create_dir(source.path().join("work")).context("making a directory to write in")?;
    let mut node = Node::start_services(&parts)?;
    let declaration = Declaration {
        name: SHARE,
        source: source.path(),
        access: "ReadWrite",
        content: "Shared",
        engine: "{}",
        staleness: "{policy: Report}",
    };
    node.declare(&declaration)?;
    let device = GuestSpec::default().with_device(SHARE, &node.socket(SHARE)?);
    let mut guest = Guest::boot(&parts, &device).with_context(|| node.log_tail())?;
    let direct = guest.mount(SHARE)?;
    let merged = guest.overlay("merged", &[format!("{direct}/base")])?;
    let running = [
        guest.start_work(&Load::writing(&format!("{direct}/work")).and_reading(&format!("{direct}/base")))?,
        guest.start_work(&Load::writing(&merged).and_reading(&merged))?,
    ];
    let rolled = roll_all(&mut node, rolls).with_context(|| node.log_tail());
    let mut errors = 0;
    for (place, load) in ["direct mount", "overlayfs"].into_iter().zip(running) {
        let count = guest.stop_work(load).with_context(|| format!("{rolled:?}"))?;
        errors += count.error_count() + count.wrong;
        println!(
            "  {place}: {} operations, {} errors, {} wrong results, the slowest took {} ms",
            count.operations,
            count.error_count(),
            count.wrong,
            count.slowest_us / 1000
        );
        count.details.iter().for_each(|detail| println!("    {detail}"));
    }
    rolled?;
    ensure!(errors == 0, "the guest counted errors");
    guest.shutdown()?;
    node.stop()
}

fn roll_all(node: &mut Node, rolls: &[(&PathBuf, [Daemon; 3])]) -> Result<()> {
    for (release, order) in rolls {
        for daemon in order {
            thread::sleep(BETWEEN);
            let begin = Instant::now();
            node.roll(*daemon, release, SHARE).with_context(|| format!("{daemon} of {}", release.display()))?;
            println!("  {daemon} of {}: {:.1} s", release.display(), begin.elapsed().as_secs_f64());
        }
    }
    Ok(())
}
