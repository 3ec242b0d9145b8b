//! `virtiofs-agent`: reads the declared shares of one host, lets the broker serve them, and reports their state. Everything
//! it holds can be read back from declarations and broker: VMs do not notice its end.
//!
//! | module | |
//! |---|---|
//! | `model` | plain data: desired and observed state, results of a pass |
//! | `decide` | pure decisions on that data: plan, report, remedies |
//! | `reconcile` | the loop that observes, decides and acts |
//! | `probe`, `broker` | sources of shares; the broker's process and status |
//! | `manifests`, `kubernetes` | sources of desired state: a directory, a cluster (which is a sink of status, too) |
//! | `csi` | pods' volumes |
//! | `announce`, `publish_report`, `service`, `metrics` | sinks: log and terminal, `agent.json`, service manager, HTTP |
//! | `agent` | the parts put together |
//! | `up`, `run`, `node` | the commands |

mod agent;
mod announce;
mod args;
mod broker;
mod csi;
mod decide;
#[cfg(test)]
mod fixtures;
mod kubernetes;
mod logging;
mod manifests;
mod metrics;
mod model;
mod node;
mod probe;
mod publish_report;
mod reconcile;
mod run;
mod service;
mod up;

use std::io::Write;
use std::process::ExitCode;

use clap::Parser;

use args::{Arguments, Command};
use logging::LogChoice;

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    match run(arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // Standard error may be closed, where `eprintln!` would panic.
            let _ = writeln!(std::io::stderr(), "virtiofs-agent: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: Arguments) -> anyhow::Result<()> {
    let log = LogChoice::of(&arguments);
    virtiofs_logging::init(&log.filter, log.format)?;
    match arguments.command {
        Command::Up(args) => up::up(args, log),
        Command::Run(args) => run::run(&args),
        Command::Node(args) => node::node(&args),
    }
}
