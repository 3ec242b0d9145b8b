//! `virtiofs-operator`: turns shares that are declared in a cluster into exports on its nodes, brings changes to the
//! nodes a few at a time, and says how it goes. It holds nothing: killed at any moment, the next one goes on from
//! what the API server has.

mod args;
mod cluster;
#[cfg(feature = "die-at-write")]
mod die_at_write;
mod http;
mod leadership;
mod metrics;
mod node;
mod pace;
mod retries;
mod run;
mod share;
mod uninstall;
mod writer;

use std::process::ExitCode;

use clap::Parser;

fn main() -> ExitCode {
    let arguments = args::Arguments::parse();
    match start(arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("virtiofs-operator: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn start(arguments: args::Arguments) -> anyhow::Result<()> {
    virtiofs_logging::init(&arguments.log, arguments.log_format)?;
    run::run(arguments)
}
