//! The demo: declares a share and boots a real VM that works on it, directly and with overlayfs on top. Meanwhile it
//! kills, reconfigures and replaces the engine, kills and replaces the broker and kills the agent. It ends with the errors
//! that the guest counted and with the metrics.

mod demo_share;
mod disruptions;
mod printer;

use std::path::PathBuf;
use std::process::ExitCode;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use clap::Parser;
use demo_share::{DemoShare, NAME};
use e2e::guest::{Guest, GuestSpec};
use e2e::interrupt;
use e2e::load::{Load, Summary};
use e2e::node::Node;
use e2e::parts::Parts;
use printer::Printer;

/// How long the guest works without disruption.
const WORK: Duration = Duration::from_secs(3);

#[derive(Parser)]
#[command(about = "Declares a share, boots a real VM on it, and ends with the guest's own count of errors.")]
struct Arguments {
    /// A directory that is shared read-only; without it the demo creates a small tree
    #[arg(long, value_name = "DIRECTORY")]
    share: Option<PathBuf>,
}

fn main() -> ExitCode {
    interrupt::run("demo", || demo(&Arguments::parse()))
}

fn demo(arguments: &Arguments) -> Result<()> {
    let printer = Printer::new();
    let (parts, share) = (Parts::locate()?, DemoShare::new(arguments.share.as_deref())?);

    printer.step("starting virtiofs-keeper, virtiofs-broker, and virtiofs-agent run beside them");
    let mut node = Node::start_services(&parts)?;
    let socket = declare(&node, &share, &printer)?;

    printer.step("booting a Linux guest in QEMU with the share as a virtiofs device");
    let mut guest =
        Guest::boot(&parts, &GuestSpec::default().with_device(NAME, &socket)).with_context(|| node.log_tail())?;
    let (took, how) = (guest.boot_time().as_secs_f64(), guest.accelerator().name());
    printer.step(&format!("the guest booted in {took:.1} s ({how})"));

    let counts = work(&mut guest, &mut node, &share, &printer).with_context(|| node.log_tail())?;
    printer.step("virtiofsctl status:");
    printer.detail(table(&node.status(&[])?));
    let metrics = node.metrics()?;
    printer.step("powering the guest off, stopping agent, broker and keeper");
    guest.shutdown()?;
    node.stop()?;
    report(&counts, &metrics, &printer)
}

fn declare(node: &Node, share: &DemoShare, printer: &Printer) -> Result<PathBuf> {
    printer.step("declaring a share");
    let declaration = share.declaration("{}");
    printer.detail(&declaration.manifest());
    node.declare(&declaration)?;
    let socket = node.socket(NAME)?;
    printer.step("the share is served:");
    printer.detail(&node.status(&[])?);
    Ok(socket)
}

/// Runs the load in the guest, and returns what the guest counted in each part.
fn work(
    guest: &mut Guest,
    node: &mut Node,
    share: &DemoShare,
    printer: &Printer,
) -> Result<Vec<(&'static str, Summary)>> {
    let direct = guest.mount(NAME)?;
    printer.step(&format!("working on {direct}, a direct virtiofs mount, for {} s", WORK.as_secs()));
    let on_mount = work_a_while(guest, &share.load_on(&direct))?;

    let merged = guest.overlay("merged", &share.lower_layers(&direct))?;
    printer.step(&format!("working on {merged}, overlayfs with the share below, for {} s", WORK.as_secs()));
    let on_overlay = work_a_while(guest, &DemoShare::load_on_overlay(&merged))?;

    printer.step("working on both at once until the end");
    let running = [guest.start_work(&share.load_on(&direct))?, guest.start_work(&DemoShare::load_on_overlay(&merged))?];
    disruptions::run(node, share, printer)?;
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
    printer.step("metrics while the guest was running (excerpt of /metrics):");
    printer.detail(&excerpt(metrics));
    printer.step("counted by the guest:");
    let mut clean = true;
    for (place, count) in counts {
        let (errors, wrong, slowest) = (count.error_count(), count.wrong, count.slowest_us / 1000);
        printer.detail(&format!(
            "{place:35} {:6} operations, {errors} errors, {wrong} wrong results, the slowest took {slowest} ms",
            count.operations
        ));
        printer.detail(&count.details.join("\n"));
        clean &= errors == 0 && wrong == 0;
    }
    ensure!(clean, "the guest counted errors; they are listed above");
    printer.step("done: 0 errors counted by the guest");
    Ok(())
}

/// The status without the mount instructions, which were printed at the start.
fn table(status: &str) -> &str {
    status.split_once("\n  QEMU").map_or(status, |(table, _)| table)
}

/// Counters and gauges that are not zero, without durations and HELP lines.
fn excerpt(metrics: &str) -> String {
    let shown = |line: &&str| line.starts_with("virtiofs_") && !line.contains("_seconds") && !line.ends_with(" 0");
    metrics.lines().filter(shown).collect::<Vec<_>>().join("\n")
}
