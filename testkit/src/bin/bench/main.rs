//! The figures: throughput through the ring, ours against stock virtiofsd 1.14 (one run, one host directory, one set
//! of options, rounds interleaved A B A B); missing names; the pauses of a guest whose engine is exchanged or dies, the
//! library's own transfer beside them; the ledger's size. Prints tables, writes a report for CI.
//!
//! With `--syscalls` instead: the system calls of each operation, ours and stock's, counted by strace.

mod cases;
mod contestant;
mod cpu;
mod detection;
mod drive;
mod figure;
mod material;
mod missing;
mod options;
mod pauses;
mod quantiles;
mod report;
mod rounds;
mod syscalls;
mod transfer;
mod tree;

use std::path::Path;

use anyhow::Context;
use clap::Parser;

use crate::cases::Case;
use crate::contestant::Contestant;
use crate::figure::Figure;
use crate::material::Material;
use crate::options::{Arguments, Options, Peer};

fn main() -> anyhow::Result<()> {
    let options = Options::from(Arguments::parse())?;
    let material = Material::lay_out(&options.directory).context("laying out files to work on")?;
    let work = tempfile::tempdir().context("a directory for sockets")?;
    if options.syscalls {
        return syscalls::print(&options, &material, work.path());
    }
    let mut figures = throughput(&options, &material, work.path())?;
    if options.wants("missing-again") {
        figures.extend(missing::measure(&options, &material, work.path()).context("missing names")?);
    }
    if options.wants("detection") {
        figures.extend(detection::measure(&options, &material, work.path()).context("detection")?);
    }
    if options.wants("pauses") {
        figures.extend(pauses::measure(&options).context("pauses")?);
    }
    report::write(&options.report, &figures)?;
    report::print_foot(&figures, &options);
    Ok(())
}

fn throughput(options: &Options, material: &Material, work: &Path) -> anyhow::Result<Vec<Figure>> {
    let cases: Vec<&Case> = cases::ALL.iter().filter(|case| options.wants(case.name)).collect();
    if cases.is_empty() {
        return Ok(Vec::new());
    }
    let mut ours = Contestant::start(&options.ours, "ours", material, work, options)?;
    let mut stock = Contestant::start(&Peer::Stock(options.stock.clone()), "stock", material, work, options)?;
    report::print_head(options);
    let mut figures = Vec::new();
    for case in cases {
        let line = rounds::run(case, &mut ours, &mut stock, options).with_context(|| case.name)?;
        report::print_line(&line);
        figures.extend([line.figure, line.cpu]);
    }
    Ok(figures)
}
