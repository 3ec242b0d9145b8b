//! `virtiofs-agent`: the brain of one host. It reads which shares are declared, has the broker serve them, and
//! says how they are doing. It holds nothing that cannot be read back: VMs do not notice when it is gone.

mod announce;
mod args;
mod backoff;
mod broker;
mod check;
mod commands;
mod csi;
mod desired;
mod errno_names;
mod kubernetes;
mod logging;
mod manifests;
mod metrics;
mod node;
mod notice;
mod observed;
mod offer;
mod output;
mod overlap;
mod plan;
mod published;
mod reconcile;
mod report;
mod run;
mod runtime_dir;
mod serve;
mod service;
mod source;
mod staleness;
mod status;
mod up;
mod volume;

use std::io::Write;
use std::process::ExitCode;

use clap::Parser;

use args::{Arguments, Command};
use logging::LogChoice;

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    match run(arguments) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            // Standard error may lead nowhere, and `eprintln!` would panic.
            let _ = writeln!(std::io::stderr(), "virtiofs-agent: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Does what was asked. Is all as it should be?
fn run(arguments: Arguments) -> anyhow::Result<bool> {
    let log = LogChoice::of(&arguments);
    virtiofs_logging::init(&log.filter, log.format)?;
    match arguments.command {
        Command::Up(args) => up::up(args, log).map(|()| true),
        Command::Run(args) => run::run(&args).map(|()| true),
        Command::Node(args) => node::node(&args).map(|()| true),
        Command::Check(args) => check::check(&args),
        Command::Status(args) => status::status(&args),
        Command::Handover(args) => commands::handover(&args),
        Command::Release(args) => commands::release(&args),
        Command::Resume(args) => commands::resume(&args),
        Command::Close(args) => commands::close(&args),
        Command::Trace(args) => commands::trace(&args),
        Command::Socket(args) => commands::socket(&args),
        Command::SupportBundle(args) => commands::support_bundle(&args),
    }
}
