//! The command line, parsed once.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, bail};
use testkit::server::stock_binary;

/// What `--quick` makes of the numbers of rounds and events.
const QUICK: usize = 8;

/// Which server.
#[derive(Debug, Clone)]
pub(crate) enum Peer {
    /// Stock virtiofsd.
    Stock(PathBuf),
    /// Our agent with its broker and engine.
    Agent(PathBuf),
    /// Something else, as a command line.
    Command(String),
}

/// Throughput, pauses and sizes, against stock virtiofsd.
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
    /// Hand-overs and kills for each figure of a pause.
    #[arg(long, default_value_t = 50)]
    events: usize,
    /// Inodes that guests hold whose engines are exchanged.
    #[arg(long, value_delimiter = ',', default_value = "1000,100000,1000000")]
    inodes: Vec<usize>,
    /// RAM in MiB of guests whose engines are exchanged.
    #[arg(long, value_delimiter = ',', default_value = "256,1024,4096")]
    memories: Vec<u64>,
    /// Have broker, engines and the guest that asks run ahead of everything else while pauses are taken: for a machine
    /// that others use as well. Needs CAP_SYS_NICE.
    #[arg(long)]
    real_time: bool,
    /// Count the system calls of each operation instead, one request at a time. Needs strace.
    #[arg(long)]
    syscalls: bool,
    /// An eighth of the rounds and events, up to 100k inodes and 1 GiB.
    #[arg(long)]
    quick: bool,
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
    /// Where to make the files that guests hold.
    #[arg(long, value_name = "DIR", default_value = "target/bench/tree")]
    tree: PathBuf,
    /// Where to write the figures.
    #[arg(long, value_name = "FILE", default_value = "target/bench/report.json")]
    report: PathBuf,
    /// Our broker; else the one beside this program.
    #[arg(long, value_name = "PATH")]
    broker: Option<PathBuf>,
    /// Only figures whose name contains this; `pauses` for all that have to do with them.
    #[arg(long, value_name = "TEXT")]
    only: Option<String>,
}

/// What to do.
#[derive(Debug, Clone)]
pub(crate) struct Options {
    pub(crate) stock: PathBuf,
    pub(crate) ours: Peer,
    pub(crate) rounds: usize,
    pub(crate) slice: Duration,
    pub(crate) depth: usize,
    pub(crate) memory: u64,
    pub(crate) directory: PathBuf,
    pub(crate) report: PathBuf,
    pub(crate) broker: PathBuf,
    pub(crate) tree: PathBuf,
    pub(crate) events: usize,
    pub(crate) syscalls: bool,
    pub(crate) real_time: bool,
    pub(crate) inodes: Vec<usize>,
    pub(crate) memories: Vec<u64>,
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
            (None, false) => Peer::Agent(beside(arguments.agent, "virtiofs-agent", "--agent")?),
        };
        if arguments.rounds == 0 || arguments.events == 0 || arguments.depth == 0 {
            bail!("--rounds, --events and --depth count from 1");
        }
        if let Some(directory) = arguments.report.parent() {
            std::fs::create_dir_all(directory).with_context(|| format!("making {}", directory.display()))?;
        }
        let part = if arguments.quick { QUICK } else { 1 };
        Ok(Self {
            rounds: arguments.rounds.div_ceil(part),
            events: arguments.events.div_ceil(part),
            syscalls: arguments.syscalls,
            real_time: arguments.real_time,
            inodes: up_to(arguments.inodes, if arguments.quick { 100_000 } else { usize::MAX }),
            memories: up_to(arguments.memories, if arguments.quick { 1024 } else { u64::MAX >> 20 })
                .iter()
                .map(|megabytes| megabytes << 20)
                .collect(),
            broker: beside(arguments.broker, "virtiofs-broker", "--broker")?,
            tree: arguments.tree,
            slice: Duration::from_millis(arguments.slice),
            depth: arguments.depth,
            memory: arguments.memory << 20,
            directory: arguments.directory,
            report: arguments.report,
            only: arguments.only,
            stock,
            ours,
        })
    }
}

/// A program of ours: as given, else the one beside this program.
fn beside(given: Option<PathBuf>, name: &str, option: &str) -> anyhow::Result<PathBuf> {
    let beside = std::env::current_exe().context("the path of this program")?.with_file_name(name);
    let program = given.unwrap_or(beside);
    if !program.is_file() {
        bail!("there is no {} at {}; make build puts it there, {option} names another", name, program.display());
    }
    Ok(program)
}

/// Those that are not more than `most`, least first.
fn up_to<T: Ord + Copy>(values: Vec<T>, most: T) -> Vec<T> {
    let mut values: Vec<T> = values.into_iter().filter(|value| *value <= most).collect();
    values.sort_unstable();
    values
}
