//! `virtiofsctl`: commands for a person at a shell who looks after the shares of a host. No command needs an agent:
//! each asks the broker, and the agent reads back what a command changes.

mod args;
mod check;
mod close;
mod drain;
mod dropin;
mod generate;
mod handover;
mod release;
mod socket;
mod status;
mod support_bundle;
mod target;
mod trace;

use std::io::Write;
use std::path::Path;
use std::process::ExitCode;

use clap::Parser;
use tracing_subscriber::filter::LevelFilter;
use virtiofs_client::broker::{Client, ClientError};
use virtiofs_client::runtime_dir::RuntimeDir;

use args::{Arguments, Command};

/// Exit status of a command that answered with no, such as `check` of an invalid document.
const NEGATIVE: u8 = 1;
/// Exit status of a command that failed. 2 is that of wrong usage, given by the argument parser.
const FAILED: u8 = 3;

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    tracing_subscriber::fmt().with_writer(std::io::stderr).without_time().with_max_level(LevelFilter::WARN).init();
    match run(&arguments.command) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::from(NEGATIVE),
        Err(error) => {
            // Standard error may be closed, where `eprintln!` would panic.
            let _ = writeln!(std::io::stderr(), "virtiofsctl: {error:#}");
            ExitCode::from(FAILED)
        }
    }
}

/// Runs a command. True if its answer is yes, or all was done.
fn run(command: &Command) -> anyhow::Result<bool> {
    match command {
        Command::Check(args) => check::check(args),
        Command::Status(args) => status::status(args),
        Command::Handover(args) => handover::handover(args),
        Command::Release(args) => release::release(args),
        Command::Resume(args) => release::resume(args),
        Command::Close(args) => close::close(args),
        Command::Drain(args) => drain::drain(args),
        Command::Trace(args) => trace::trace(args),
        Command::Socket(args) => socket::socket(args),
        Command::SupportBundle(args) => support_bundle::support_bundle(args),
        Command::Dropin(args) => dropin::dropin(args),
        Command::Completions(args) => generate::completions(args),
        Command::Man(args) => generate::man_pages(args),
    }
}

/// A connection to the broker of this runtime directory.
fn broker(runtime_dir: &Path) -> Result<Client, ClientError> {
    Client::connect(&RuntimeDir::at(runtime_dir).broker_socket())
}
