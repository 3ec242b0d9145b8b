//! Kills brokers, keepers and engines, and replaces engines, at random moments, thousands of times, under guests that
//! compare everything they see with a model. Exits with 1 if a guest saw an error or a wrong byte, if a session was lost,
//! or if anything leaked.

mod arguments;
mod daemons;
mod disruptions;
mod holdings;
mod plan;
mod run;

use std::process::ExitCode;

use anyhow::Context;
use clap::Parser;

use crate::arguments::Arguments;

fn main() -> anyhow::Result<ExitCode> {
    let arguments = Arguments::parse();
    let mut clean = true;
    for &guests in &arguments.guests {
        let outcome = run::survive(guests, &arguments).with_context(|| format!("{guests} guests"))?;
        println!("{outcome}");
        clean &= outcome.is_clean();
    }
    Ok(if clean { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
