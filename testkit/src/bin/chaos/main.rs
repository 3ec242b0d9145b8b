//! Brokers, keepers and engines killed, and engines replaced, at random moments, thousands of times, under guests that
//! compare everything they see with a model. Ends with 1 if a guest saw an error or a wrong byte, if a session was lost, or
//! if anything was leaked.

mod arguments;
mod daemons;
mod holdings;
mod plan;
mod run;
mod torment;

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
