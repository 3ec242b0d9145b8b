//! The command line, parsed once.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, bail};
use testkit::server::stock_binary;

use crate::contestant::Peer;

/// The ratio each figure is to reach.
const AIM: f64 = 0.97;

/// Throughput through the ring against stock virtiofsd.
#[derive(Debug, clap::Parser)]
pub(crate) struct Arguments {
    /// Stock virtiofsd 1.14; else the environment variable VIRTIOFSD_STOCK names it.
    #[arg(long, value_name = "PATH")]
    stock: Option<PathBuf>,
    /// Our agent; else the one beside this program.
    #[arg(long, value_name = "PATH")]
    agent: Option<PathBuf>,
    /// Any other server in place of our agent: a program and its arguments, in which {share} and {socket} are
    /// replaced.
    #[arg(long, value_name = "COMMAND", conflicts_with = "agent")]
    command: Option<String>,
    /// Stock against itself: shows how far apart two equal servers come out here.
    #[arg(long, conflicts_with_all = ["agent", "command"])]
    calibrate: bool,
    /// Rounds per figure.
    #[arg(long, default_value_t = 41)]
    rounds: usize,
    /// Milliseconds per contestant and round.
    #[arg(long, default_value_t = 50)]
    slice: u64,
    /// Requests in flight.
    #[arg(long, default_value_t = 8)]
    depth: usize,
    /// RAM of each guest in MiB.
    #[arg(long, default_value_t = 512)]
    memory: u64,
    /// Where to lay out the files to work on.
    #[arg(long, value_name = "DIR", default_value = "target/bench/share")]
    directory: PathBuf,
    /// Where to write the figures.
    #[arg(long, value_name = "FILE", default_value = "target/bench/report.json")]
    report: PathBuf,
    /// Only figures whose name contains this.
    #[arg(long, value_name = "TEXT")]
    only: Option<String>,
}

/// What to do.
#[derive(Debug)]
pub(crate) struct Options {
    pub(crate) stock: PathBuf,
    pub(crate) ours: Peer,
    pub(crate) rounds: usize,
    pub(crate) slice: Duration,
    pub(crate) depth: usize,
    pub(crate) memory: u64,
    pub(crate) directory: PathBuf,
    pub(crate) report: PathBuf,
    pub(crate) aim: f64,
    only: Option<String>,
}

impl Options {
    /// Whether a figure was asked for.
    pub(crate) fn wants(&self, name: &str) -> bool {
        self.only.as_ref().is_none_or(|text| name.contains(text.as_str()))
    }

    /// Where a server's log goes: beside the report.
    pub(crate) fn log(&self, label: &str) -> PathBuf {
        self.report.with_file_name(format!("{label}.log"))
    }

    pub(crate) fn from(arguments: Arguments) -> anyhow::Result<Self> {
        let stock = stock_binary(arguments.stock)?;
        let ours = match (arguments.command, arguments.calibrate) {
            (Some(command), _) => Peer::Command(command),
            (None, true) => Peer::Stock(stock.clone()),
            (None, false) => Peer::Agent(agent(arguments.agent)?),
        };
        if arguments.rounds == 0 || arguments.depth == 0 {
            bail!("--rounds and --depth count from 1");
        }
        if let Some(directory) = arguments.report.parent() {
            std::fs::create_dir_all(directory).with_context(|| format!("making {}", directory.display()))?;
        }
        Ok(Self {
            rounds: arguments.rounds,
            slice: Duration::from_millis(arguments.slice),
            depth: arguments.depth,
            memory: arguments.memory << 20,
            directory: arguments.directory,
            report: arguments.report,
            aim: AIM,
            only: arguments.only,
            stock,
            ours,
        })
    }
}

fn agent(given: Option<PathBuf>) -> anyhow::Result<PathBuf> {
    let beside = std::env::current_exe().context("the path of this program")?.with_file_name("virtiofs-agent");
    let agent = given.unwrap_or(beside);
    if !agent.is_file() {
        bail!("there is no agent at {}; make build puts it there, --agent names another", agent.display());
    }
    Ok(agent)
}
