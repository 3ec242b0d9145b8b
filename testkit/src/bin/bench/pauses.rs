//! How long a guest waits when its engine is replaced or killed, by the number of inodes that it holds and by its
//! memory; and the size of the ledger for each inode.

mod priority;
mod prober;
mod resident;
mod stage;

use std::time::{Duration, Instant};

use anyhow::Context;

pub(crate) use self::resident::ledger_bytes;
use self::stage::Stage;
use crate::figure::{Figure, Target, millis};
use crate::options::Options;
use crate::quantiles::{quantile, sorted};
use crate::report::print_section;
use crate::transfer::{self, Transfer};
use crate::tree::Tree;

const MIB: u64 = 1 << 20;
/// Memory of guests with different numbers of inodes.
const SOME_MEMORY: u64 = 256 * MIB;
/// Guests with more memory than this run fewer events.
const MUCH_MEMORY: u64 = 512 * MIB;
/// Number of inodes of guests with different amounts of memory.
const FEW_INODES: usize = 1_000;
/// Number of idle measurements of a guest.
const IDLE_EVENTS: usize = 30;
/// Number of inodes from which the ledger's fixed part is negligible.
const LEDGER_FROM: usize = 100_000;
/// Target of ledger bytes per inode.
const LEDGER_TARGET: f64 = 128.0;

/// An event, and the target milliseconds of its median and its 99th percentile.
struct Event {
    name: &'static str,
    targets: (f64, f64),
}

const HAND_OVER: Event = Event { name: "hand-over", targets: (1.0, 5.0) };
const RECOVERY: Event = Event { name: "recovery", targets: (5.0, 15.0) };

/// Measures all figures of this section.
pub(crate) fn measure(options: &Options) -> anyhow::Result<Vec<Figure>> {
    let most = options.inodes.iter().copied().max().unwrap_or(FEW_INODES);
    let begin = Instant::now();
    let tree = Tree::grow(&options.tree, most).context("creating files to hold")?;
    println!("\n{most} files to hold: created or found in {:.1?}", begin.elapsed());
    let mut figures = by_inodes(options, &tree)?;
    for memory in options.memories.iter().filter(|memory| **memory != SOME_MEMORY) {
        let mut stage = Stage::new(options, &tree, *memory)?;
        stage.look_up(FEW_INODES)?;
        let label = memory_label(*memory);
        // Touching the memory takes time before every event.
        let fewer = usize::try_from(memory / MUCH_MEMORY)?.clamp(1, 4);
        let events = options.events.div_ceil(fewer);
        figures.extend(events_of(&mut stage, &label, events, None)?);
    }
    Ok(figures)
}

fn by_inodes(options: &Options, tree: &Tree) -> anyhow::Result<Vec<Figure>> {
    let mut figures = Vec::new();
    let mut stage = Stage::new(options, tree, SOME_MEMORY)?;
    for &inodes in &options.inodes {
        let label = count_label(inodes);
        let transfer =
            transfer::measure(tree, inodes).with_context(|| format!("measuring the library's transfer of {label}"))?;
        stage.look_up(inodes).with_context(|| format!("holding {label} inodes"))?;
        figures.extend(ledger(&mut stage, &label, inodes)?);
        figures.extend(events_of(&mut stage, &label, options.events, Some(&transfer))?);
    }
    Ok(figures)
}

/// The ledger's size per inode, for numbers of inodes beside which its fixed part is negligible.
fn ledger(stage: &mut Stage, label: &str, inodes: usize) -> anyhow::Result<Option<Figure>> {
    if inodes < LEDGER_FROM {
        return Ok(None);
    }
    let bytes = ledger_bytes(stage.engine_pid()?)? as f64 / stage.held() as f64;
    let figure =
        Figure::alone(format!("ledger-{label}"), bytes, "bytes/inode").with_target(Target::AtMost(LEDGER_TARGET));
    print_section("resident ledger", "", std::slice::from_ref(&figure));
    Ok(Some(figure))
}

fn events_of(
    stage: &mut Stage,
    label: &str,
    events: usize,
    transfer: Option<&Transfer>,
) -> anyhow::Result<Vec<Figure>> {
    let prober = stage.prober()?;
    let idle = repeat(events.min(IDLE_EVENTS), || stage.idle(&prober))?;
    let handed_over = repeat(events, || stage.hand_over(&prober))?;
    stage.wait_for_standby()?;
    let killed = repeat(events, || stage.kill(&prober))?;
    prober.stop()?;
    stage.check()?;
    let peer = transfer.map(|transfer| millis(transfer.pause()));
    let mut figures = pauses(&HAND_OVER, label, handed_over.iter().map(|seen| seen.pause), peer);
    figures.extend(pauses(&RECOVERY, label, killed.into_iter(), None));
    figures.extend(slowest("hand-over-start", label, handed_over.iter().map(|seen| seen.slowest)));
    figures.extend(slowest("undisturbed", label, idle.into_iter()));
    print_section(&title(label, events, transfer), "library 1.14", &figures);
    Ok(figures)
}

fn repeat<T>(count: usize, mut act: impl FnMut() -> anyhow::Result<T>) -> anyhow::Result<Vec<T>> {
    (0..count).map(|_| act()).collect()
}

fn title(label: &str, events: usize, transfer: Option<&Transfer>) -> String {
    let beside = transfer.map(|t| {
        let [prepare, save, load] = [t.prepare, t.save, t.load].map(millis);
        format!("; the library: prepare {prepare:.1} ms (serving), save {save:.1} + load {load:.1} ms (stopped)")
    });
    format!("how long a guest waits, {label}, {events} events of each kind{}", beside.unwrap_or_default())
}

/// Median, 99th percentile and maximum.
fn pauses(event: &Event, label: &str, measured: impl Iterator<Item = Duration>, peer: Option<f64>) -> Vec<Figure> {
    let sorted = sorted(measured.map(millis));
    let figure = |what: &str, at| {
        let name = format!("{}-{label}-{what}", event.name);
        Figure::alone(name, quantile(&sorted, at), "ms").beside(peer)
    };
    vec![
        figure("median", 0.5).with_target(Target::AtMost(event.targets.0)),
        figure("p99", 0.99).with_target(Target::AtMost(event.targets.1)),
        figure("worst", 1.0),
    ]
}

/// Other waits of the guest, for comparison with the pauses: while nothing happens, and while engines start on the same
/// processors.
fn slowest(what: &str, label: &str, measured: impl Iterator<Item = Duration>) -> [Figure; 2] {
    let sorted = sorted(measured.map(millis));
    [("median", 0.5), ("worst", 1.0)]
        .map(|(at, quantum)| Figure::alone(format!("{what}-{label}-{at}"), quantile(&sorted, quantum), "ms"))
}

fn count_label(count: usize) -> String {
    match count {
        1_000_000.. if count.is_multiple_of(1_000_000) => format!("{}m", count / 1_000_000),
        1_000.. if count.is_multiple_of(1_000) => format!("{}k", count / 1_000),
        _ => count.to_string(),
    }
}

fn memory_label(bytes: u64) -> String {
    match bytes / MIB {
        gigabytes if gigabytes.is_multiple_of(1024) => format!("{}gib", gigabytes / 1024),
        megabytes => format!("{megabytes}mib"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_have_short_names() {
        assert_eq!([1_000, 100_000, 1_000_000, 1_500].map(count_label), ["1k", "100k", "1m", "1500"]);
        assert_eq!([256 * MIB, 4096 * MIB].map(memory_label), ["256mib", "4gib"]);
    }
}
