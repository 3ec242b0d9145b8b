//! The printed tables, and the report for CI.

use std::path::Path;

use anyhow::Context;

use crate::figure::Figure;
use crate::options::Options;
use crate::rounds::Line;

pub(crate) fn print_head(options: &Options) {
    println!(
        "\nthroughput: {} rounds of {} ms each, {} requests in flight; ratio: median of the rounds (quartiles)\n",
        options.rounds,
        options.slice.as_millis(),
        options.depth
    );
    let columns = format!("{:<28} {:>12} {:>12} {:<12} {:>8}", "", "ours", "stock 1.14", "", "ratio");
    println!("{columns} {:<15}  processor time, ours and stock's", "");
}

pub(crate) fn print_line(line: &Line) {
    print!("{}", row(&line.figure));
    let (ours, peer) = (number(line.cpu.value), line.cpu.peer.map(number).unwrap_or_default());
    let spread = format!("({:.3} - {:.3})", line.spread.0, line.spread.1);
    println!(" {spread}  {ours:>8} {peer:>8} {:<8}{}", line.cpu.unit, remark(&line.figure));
}

/// Prints a section of figures with its own heading.
pub(crate) fn print_section(title: &str, peer: &str, figures: &[Figure]) {
    println!("\n{title}\n");
    println!("{:<28} {:>12} {:>12} {:<12} {:>8}", "", "ours", peer, "", "ratio");
    for figure in figures {
        println!("{}{}", row(figure), remark(figure));
    }
}

fn row(figure: &Figure) -> String {
    let peer = figure.peer.map(number).unwrap_or_default();
    let ratio = figure.ratio.map(ratio).unwrap_or_default();
    format!("{:<28} {:>12} {peer:>12} {:<12} {ratio:>8}", figure.name, number(figure.value), figure.unit)
}

fn remark(figure: &Figure) -> String {
    figure.missed_target().map(|target| format!("  misses its target: {target}")).unwrap_or_default()
}

/// Formats with significant digits only.
fn number(value: f64) -> String {
    if value.abs() < 100.0 { format!("{value:.3}") } else { format!("{value:.0}") }
}

fn ratio(value: f64) -> String {
    if value < 0.1 { format!("{value:.6}") } else { format!("{value:.3}") }
}

pub(crate) fn print_foot(figures: &[Figure], options: &Options) {
    let missed: Vec<&str> =
        figures.iter().filter(|figure| figure.missed_target().is_some()).map(|figure| figure.name.as_str()).collect();
    println!();
    match missed.as_slice() {
        [] => println!("every figure reaches its target"),
        missed => println!("targets missed: {}", missed.join(", ")),
    }
    println!("figures: {}", options.report.display());
}

pub(crate) fn write(path: &Path, figures: &[Figure]) -> anyhow::Result<()> {
    let text = serde_json::to_string_pretty(figures)? + "\n";
    std::fs::write(path, text).with_context(|| path.display().to_string())
}
