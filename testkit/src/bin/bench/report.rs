//! The table for people and the file for CI.

use std::path::Path;

use anyhow::Context;
use serde::Serialize;

use crate::options::Options;
use crate::rounds::Line;

/// One figure of the report.
#[derive(Debug, Serialize)]
struct Figure<'a> {
    name: &'a str,
    value: f64,
    unit: &'a str,
    peer: f64,
    ratio: f64,
}

pub(crate) fn print_head(options: &Options) {
    println!(
        "{} rounds of {} ms each, {} requests in flight; ratio: median of the rounds (quartiles)\n",
        options.rounds,
        options.slice.as_millis(),
        options.depth
    );
    println!("{:<16} {:>12} {:>12} {:<8} {:>6}", "", "ours", "stock 1.14", "", "ratio");
}

pub(crate) fn print_line(line: &Line) {
    let Line { name, unit, value, peer, ratio, spread } = line;
    println!("{name:<16} {value:>12.0} {peer:>12.0} {unit:<8} {ratio:>6.3} ({:.3} - {:.3})", spread.0, spread.1);
}

pub(crate) fn print_foot(lines: &[Line], options: &Options) {
    let short: Vec<&str> = lines.iter().filter(|line| line.ratio < options.aim).map(|line| line.name).collect();
    println!();
    match short.as_slice() {
        [] => println!("every ratio is at least {}", options.aim),
        short => println!("below {}: {}", options.aim, short.join(", ")),
    }
    println!("figures: {}", options.report.display());
}

pub(crate) fn write(path: &Path, lines: &[Line]) -> anyhow::Result<()> {
    let figures: Vec<Figure<'_>> = lines
        .iter()
        .map(|line| Figure { name: line.name, value: line.value, unit: line.unit, peer: line.peer, ratio: line.ratio })
        .collect();
    let text = serde_json::to_string_pretty(&figures)? + "\n";
    std::fs::write(path, text).with_context(|| path.display().to_string())
}
