//! The demo: a share is declared, a real VM works on it directly and with overlayfs on top, and the guest's
//! own count of errors ends it, beside what the metrics say.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use clap::Parser;
use e2e::guest::{Guest, GuestSpec};
use e2e::interrupt;
use e2e::load::{Load, Summary};
use e2e::node::{Declaration, Node};
use e2e::parts::Parts;
use e2e::tree;
use tempfile::TempDir;

/// How long the guest works each time.
const WORK: Duration = Duration::from_secs(5);
/// Files read in one round of a directory of someone's own, so that the demo ends whatever its size.
const MOST_FILES: u32 = 300;
const NAME: &str = "demo";

#[derive(Parser)]
#[command(about = "Declares a share, boots a real VM on it, and ends with the guest's own count of errors.")]
struct Arguments {
    /// A directory of your own, shared read-only; a small tree is made up when none is given.
    #[arg(long, value_name = "DIRECTORY")]
    share: Option<PathBuf>,
}

fn main() -> ExitCode {
    let outcome = interrupt::arm().and_then(|()| demo(&Arguments::parse()));
    match outcome {
        _ if interrupt::came() => ExitCode::from(interrupt::STATUS),
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("\nThe demo failed: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// What is shared, and what may be done with it.
struct Subject {
    source: PathBuf,
    own: bool,
    _made_up: Option<TempDir>,
}

impl Subject {
    fn new(share: Option<&Path>) -> Result<Self> {
        if let Some(path) = share {
            let source =
                fs::canonicalize(path).with_context(|| format!("SHARE={} cannot be shared", path.display()))?;
            ensure!(source.is_dir(), "SHARE={} is not a directory; name one", path.display());
            return Ok(Self { source, own: true, _made_up: None });
        }
        let dir = tempfile::Builder::new().prefix("demo-share-").tempdir().context("making a directory to share")?;
        tree::plant(&dir.path().join("base"), 60)?;
        tree::plant(&dir.path().join("top"), 60)?;
        Ok(Self { source: dir.path().to_owned(), own: false, _made_up: Some(dir) })
    }

    fn declaration<'a>(&'a self, engine: &'a str) -> Declaration<'a> {
        let (access, content) = if self.own { ("ReadOnly", "Shared") } else { ("ReadWrite", "Exclusive") };
        Declaration { name: NAME, source: &self.source, access, content, engine }
    }

    fn direct_load(&self, mount: &str) -> Load {
        let load = if self.own { Load::default() } else { Load::writing(mount) };
        load.and_reading(mount).at_most(MOST_FILES)
    }

    fn lower_layers(&self, mount: &str) -> Vec<String> {
        if self.own { vec![mount.to_owned()] } else { vec![format!("{mount}/top"), format!("{mount}/base")] }
    }
}

/// Tells each step with the time since the start.
struct Teller {
    start: Instant,
}

impl Teller {
    fn say(&self, line: &str) {
        println!("[{:5.1} s] {line}", self.start.elapsed().as_secs_f64());
    }

    fn show(&self, text: &str) {
        for line in text.lines() {
            println!("          | {line}");
        }
    }
}

fn demo(arguments: &Arguments) -> Result<()> {
    let teller = Teller { start: Instant::now() };
    let (parts, subject) = (Parts::locate()?, Subject::new(arguments.share.as_deref())?);

    teller.say("starting agent and broker: virtiofs-agent up");
    let node = Node::start(&parts)?;
    let socket = declare(&node, &subject, &teller)?;

    teller.say("booting a Linux guest in QEMU with the share as a virtiofs device");
    let mut guest =
        Guest::boot(&parts, &GuestSpec::default().with_device(NAME, &socket)).with_context(|| node.log_tail())?;
    let (took, how) = (guest.boot_time().as_secs_f64(), guest.accelerator().name());
    teller.say(&format!("the guest is up after {took:.1} s ({how})"));

    let counts = work(&mut guest, &subject, &teller).with_context(|| node.log_tail())?;
    let metrics = node.metrics()?;
    teller.say("powering the guest off, stopping agent and broker");
    guest.shutdown()?;
    node.stop()?;
    report(&counts, &metrics, &teller)
}

fn declare(node: &Node, subject: &Subject, teller: &Teller) -> Result<PathBuf> {
    teller.say("declaring a share");
    let declaration = subject.declaration("{}");
    teller.show(&declaration.manifest());
    node.declare(&declaration)?;
    let socket = node.socket(NAME)?;
    teller.say("the share is served:");
    teller.show(&node.status(&[])?);
    Ok(socket)
}

/// Everything the guest does, with its count of each part.
fn work(guest: &mut Guest, subject: &Subject, teller: &Teller) -> Result<Vec<(&'static str, Summary)>> {
    let direct = guest.mount(NAME)?;
    teller.say(&format!("working on {direct}, a direct virtiofs mount, for {} s", WORK.as_secs()));
    let on_mount = work_a_while(guest, &subject.direct_load(&direct))?;

    let merged = guest.overlay("merged", &subject.lower_layers(&direct))?;
    teller.say(&format!("working on {merged}, overlayfs with the share below, for {} s", WORK.as_secs()));
    let on_overlay = work_a_while(guest, &Load::writing(&merged).and_reading(&merged).at_most(MOST_FILES))?;
    Ok(vec![("direct mount", on_mount), ("overlayfs on top", on_overlay)])
}

fn work_a_while(guest: &mut Guest, load: &Load) -> Result<Summary> {
    let running = guest.start_work(load)?;
    thread::sleep(WORK);
    guest.stop_work(running)
}

fn report(counts: &[(&str, Summary)], metrics: &str, teller: &Teller) -> Result<()> {
    teller.say("what the metrics page said while the guest was up (excerpt of /metrics):");
    teller.show(&excerpt(metrics));
    teller.say("what the guest counted:");
    let mut clean = true;
    for (place, count) in counts {
        let (errors, wrong) = (count.error_count(), count.wrong);
        teller.show(&format!("{place:18} {:7} operations  {errors} errors  {wrong} wrong results", count.operations));
        teller.show(&count.told.join("\n"));
        clean &= errors == 0 && wrong == 0;
    }
    ensure!(clean, "the guest counted errors; they are listed above");
    teller.say("done: 0 errors counted by the guest");
    Ok(())
}

/// Counters and gauges that are not zero; no durations, no explanations.
fn excerpt(metrics: &str) -> String {
    let told = |line: &&str| line.starts_with("virtiofs_") && !line.contains("_seconds") && !line.ends_with(" 0");
    metrics.lines().filter(told).collect::<Vec<_>>().join("\n")
}
