//! `virtiofs-operator`: creates exports on the nodes of a cluster for its shares, rolls changes out a few nodes at a time
//! and reports the status. It has no state of its own: after a crash at any moment, the next operator continues from what
//! the API server has.

mod args;
mod backoff;
mod cluster;
#[cfg(feature = "die-at-write")]
mod die_at_write;
mod error;
mod foreign;
mod http;
mod leadership;
mod metrics;
mod node;
mod run;
mod share;
mod throttle;
mod uninstall;
mod writer;

use std::process::ExitCode;

use clap::Parser;

fn main() -> ExitCode {
    let arguments = args::Arguments::parse();
    match start(arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("virtiofs-operator: {}", error::Chain(error.as_ref()));
            ExitCode::FAILURE
        }
    }
}

fn start(arguments: args::Arguments) -> anyhow::Result<()> {
    virtiofs_logging::init(&arguments.log, arguments.log_format)?;
    run::run(arguments)
}
