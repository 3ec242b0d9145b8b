//! The benchmark: throughput through the ring compared with stock virtiofsd 1.14 (same run, host directory and options,
//! rounds interleaved A B A B); missing names; the pauses of a guest whose engine is replaced or killed, compared with
//! the library's own state transfer; the ledger's size; start-up and memory of virtiofsd-live. Prints tables and writes a
//! report for CI.
//!
//! With `--syscalls` it prints the system calls of each operation instead, of both servers, counted by strace.

mod cases;
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
mod start;
mod syscalls;
mod system;
mod transfer;
mod tree;

use std::path::Path;

use anyhow::Context;
use clap::Parser;

use crate::cases::Case;
use crate::figure::Figure;
use crate::material::Material;
use crate::options::{Arguments, Options, Peer};
use crate::system::System;

fn main() -> anyhow::Result<()> {
    let options = Options::from(Arguments::parse())?;
    let material = Material::create(&options.directory).context("creating the files of the benchmark")?;
    let work = tempfile::tempdir().context("creating a directory for sockets")?;
    if options.syscalls {
        return syscalls::print(&options, &material, work.path());
    }
    let mut figures = throughput(&options, &material, work.path())?;
    if options.wants("missing-again") {
        figures.extend(missing::measure(&options, &material, work.path()).context("measuring missing names")?);
    }
    if options.wants("detection") {
        figures.extend(detection::measure(&options, &material, work.path()).context("detection")?);
    }
    if options.wants("start") {
        figures.extend(start::measure(&options, &material, work.path()).context("virtiofsd-live")?);
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
    let mut ours = System::start(&options.ours, "ours", material, work, options)?;
    let mut stock = System::start(&Peer::Stock(options.stock.clone()), "stock", material, work, options)?;
    report::print_head(options);
    let mut figures = Vec::new();
    for case in cases {
        let line = rounds::run(case, &mut ours, &mut stock, options).with_context(|| case.name)?;
        report::print_line(&line);
        figures.extend([line.figure, line.cpu]);
    }
    Ok(figures)
}
