//! Throughput through the ring, ours against stock virtiofsd 1.14: one run, one host directory, one
//! set of options, rounds interleaved A B A B. Prints a table, writes a report for CI.

mod cases;
mod contestant;
mod drive;
mod material;
mod options;
mod report;
mod rounds;

use anyhow::Context;
use clap::Parser;

use crate::contestant::{Contestant, Peer};
use crate::material::Material;
use crate::options::{Arguments, Options};

fn main() -> anyhow::Result<()> {
    let options = Options::from(Arguments::parse())?;
    let material = Material::lay_out(&options.directory).context("laying out files to work on")?;
    let work = tempfile::tempdir().context("a directory for sockets")?;
    let mut ours = Contestant::start(&options.ours, "ours", &material, work.path(), &options)?;
    let mut stock = Contestant::start(&Peer::Stock(options.stock.clone()), "stock", &material, work.path(), &options)?;
    let mut lines = Vec::new();
    report::print_head(&options);
    for case in cases::ALL.iter().filter(|case| options.wants(case.name)) {
        let line = rounds::run(case, &mut ours, &mut stock, &options).with_context(|| case.name)?;
        report::print_line(&line);
        lines.push(line);
    }
    report::write(&options.report, &lines)?;
    report::print_foot(&lines, &options);
    Ok(())
}
