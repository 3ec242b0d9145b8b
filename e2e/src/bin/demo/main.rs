//! The demo: a share is declared, a real VM works on it directly and with overlayfs on top while its engine is
//! killed, reconfigured and replaced and the agent killed, and the guest's own count of errors ends it, beside what
//! the metrics say.

mod printer;
mod subject;
mod upheaval;

use std::path::PathBuf;
use std::process::ExitCode;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use clap::Parser;
use e2e::guest::{Guest, GuestSpec};
use e2e::interrupt;
use e2e::load::{Load, Summary};
use e2e::node::Node;
use e2e::parts::Parts;
use printer::Printer;
use subject::{NAME, Subject};

/// How long the guest works undisturbed.
const WORK: Duration = Duration::from_secs(3);

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

fn demo(arguments: &Arguments) -> Result<()> {
    let printer = Printer::new();
    let (parts, subject) = (Parts::locate()?, Subject::new(arguments.share.as_deref())?);

    printer.say("starting virtiofs-broker, and virtiofs-agent run beside it");
    let mut node = Node::start_services(&parts)?;
    let socket = declare(&node, &subject, &printer)?;

    printer.say("booting a Linux guest in QEMU with the share as a virtiofs device");
    let mut guest =
        Guest::boot(&parts, &GuestSpec::default().with_device(NAME, &socket)).with_context(|| node.log_tail())?;
    let (took, how) = (guest.boot_time().as_secs_f64(), guest.accelerator().name());
    printer.say(&format!("the guest is up after {took:.1} s ({how})"));

    let counts = work(&mut guest, &mut node, &subject, &printer).with_context(|| node.log_tail())?;
    printer.say("what virtiofsctl status says now:");
    printer.show(table(&node.status(&[])?));
    let metrics = node.metrics()?;
    printer.say("powering the guest off, stopping agent and broker");
    guest.shutdown()?;
    node.stop()?;
    report(&counts, &metrics, &printer)
}

fn declare(node: &Node, subject: &Subject, printer: &Printer) -> Result<PathBuf> {
    printer.say("declaring a share");
    let declaration = subject.declaration("{}");
    printer.show(&declaration.manifest());
    node.declare(&declaration)?;
    let socket = node.socket(NAME)?;
    printer.say("the share is served:");
    printer.show(&node.status(&[])?);
    Ok(socket)
}

/// Everything the guest does, with its count of each part.
fn work(
    guest: &mut Guest,
    node: &mut Node,
    subject: &Subject,
    printer: &Printer,
) -> Result<Vec<(&'static str, Summary)>> {
    let direct = guest.mount(NAME)?;
    printer.say(&format!("working on {direct}, a direct virtiofs mount, for {} s", WORK.as_secs()));
    let on_mount = work_a_while(guest, &subject.load_on(&direct))?;

    let merged = guest.overlay("merged", &subject.lower_layers(&direct))?;
    printer.say(&format!("working on {merged}, overlayfs with the share below, for {} s", WORK.as_secs()));
    let on_overlay = work_a_while(guest, &Subject::load_on_overlay(&merged))?;

    printer.say("working on both at once, without end");
    let running = [guest.start_work(&subject.load_on(&direct))?, guest.start_work(&Subject::load_on_overlay(&merged))?];
    upheaval::cause(node, subject, printer)?;
    let [direct_then, overlay_then] = running.map(|load| guest.stop_work(load));
    Ok(vec![
        ("direct mount", on_mount),
        ("overlayfs on top", on_overlay),
        ("direct mount, engines changing", direct_then?),
        ("overlayfs on top, engines changing", overlay_then?),
    ])
}

fn work_a_while(guest: &mut Guest, load: &Load) -> Result<Summary> {
    let running = guest.start_work(load)?;
    thread::sleep(WORK);
    guest.stop_work(running)
}

fn report(counts: &[(&str, Summary)], metrics: &str, printer: &Printer) -> Result<()> {
    printer.say("what the metrics page said while the guest was up (excerpt of /metrics):");
    printer.show(&excerpt(metrics));
    printer.say("what the guest counted:");
    let mut clean = true;
    for (place, count) in counts {
        let (errors, wrong, slowest) = (count.error_count(), count.wrong, count.slowest_us / 1000);
        printer.show(&format!(
            "{place:35} {:6} operations, {errors} errors, {wrong} wrong results, the slowest took {slowest} ms",
            count.operations
        ));
        printer.show(&count.details.join("\n"));
        clean &= errors == 0 && wrong == 0;
    }
    ensure!(clean, "the guest counted errors; they are listed above");
    printer.say("done: 0 errors counted by the guest");
    Ok(())
}

/// The status without the lines that mount the share, which were shown at the start.
fn table(status: &str) -> &str {
    status.split_once("\n  QEMU").map_or(status, |(table, _)| table)
}

/// Counters and gauges that are not zero; no durations, no explanations.
fn excerpt(metrics: &str) -> String {
    let shown = |line: &&str| line.starts_with("virtiofs_") && !line.contains("_seconds") && !line.ends_with(" 0");
    metrics.lines().filter(shown).collect::<Vec<_>>().join("\n")
}
