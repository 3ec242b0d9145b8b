//! The command line of the benchmark.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, bail};
use testkit::server::stock_binary;

/// Divisor of the numbers of rounds and events with `--quick`.
const QUICK: usize = 8;

/// A server to measure.
#[derive(Debug, Clone)]
pub(crate) enum Peer {
    /// Stock virtiofsd.
    Stock(PathBuf),
    /// This project's agent with its broker and engine.
    Agent(PathBuf),
    /// Another server, as a command line.
    Command(String),
}

/// Measures throughput, pauses and sizes, and compares with stock virtiofsd
#[derive(Debug, clap::Parser)]
pub(crate) struct Arguments {
    /// Path of stock virtiofsd 1.14; by default the value of VIRTIOFSD_STOCK
    #[arg(long, value_name = "PATH")]
    stock: Option<PathBuf>,
    /// Path of the agent; by default the one in the directory of this program
    #[arg(long, value_name = "PATH")]
    agent: Option<PathBuf>,
    /// Another server instead of the agent: a program and its arguments, in which {share} and {socket} are replaced
    #[arg(long, value_name = "COMMAND", conflicts_with = "agent")]
    command: Option<String>,
    /// Compare stock virtiofsd with itself: shows the noise of this machine
    #[arg(long, conflicts_with_all = ["agent", "command"])]
    calibrate: bool,
    /// Number of rounds per figure
    #[arg(long, default_value_t = 41)]
    rounds: usize,
    /// Number of hand-overs and kills for each figure of a pause
    #[arg(long, default_value_t = 50)]
    events: usize,
    /// Numbers of inodes held by guests whose engines are replaced
    #[arg(long, value_delimiter = ',', default_value = "1000,100000,1000000")]
    inodes: Vec<usize>,
    /// RAM in MiB of guests whose engines are replaced
    #[arg(long, value_delimiter = ',', default_value = "256,1024,4096")]
    memories: Vec<u64>,
    /// Give broker, engines and the probing guest a real-time priority while pauses are measured, for a machine that
    /// others use too. Needs CAP_SYS_NICE
    #[arg(long)]
    real_time: bool,
    /// Count the system calls of each operation instead, one request at a time; needs strace
    #[arg(long)]
    syscalls: bool,
    /// Run an eighth of the rounds and events, up to 100k inodes and 1 GiB
    #[arg(long)]
    quick: bool,
    /// Milliseconds per system and round
    #[arg(long, default_value_t = 50)]
    slice: u64,
    /// Number of requests in flight
    #[arg(long, default_value_t = 8)]
    depth: usize,
    /// RAM of each guest in MiB
    #[arg(long, default_value_t = 512)]
    memory: u64,
    /// Directory for the files of the benchmark
    #[arg(long, value_name = "DIR", default_value = "target/bench/share")]
    directory: PathBuf,
    /// Directory for the files that guests hold
    #[arg(long, value_name = "DIR", default_value = "target/bench/tree")]
    tree: PathBuf,
    /// Path of the report
    #[arg(long, value_name = "FILE", default_value = "target/bench/report.json")]
    report: PathBuf,
    /// Path of the broker; by default the one in the directory of this program
    #[arg(long, value_name = "PATH")]
    broker: Option<PathBuf>,
    /// Path of virtiofsd-live; by default the one in the directory of this program
    #[arg(long, value_name = "PATH")]
    live: Option<PathBuf>,
    /// Only figures whose name contains this text; `pauses` for all figures of pauses
    #[arg(long, value_name = "TEXT")]
    only: Option<String>,
}

/// The validated command line.
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
    pub(crate) live: PathBuf,
    pub(crate) tree: PathBuf,
    pub(crate) events: usize,
    pub(crate) syscalls: bool,
    pub(crate) real_time: bool,
    pub(crate) inodes: Vec<usize>,
    pub(crate) memories: Vec<u64>,
    only: Option<String>,
}

impl Options {
    /// True if a figure is selected.
    pub(crate) fn wants(&self, name: &str) -> bool {
        self.only.as_ref().is_none_or(|text| name.contains(text.as_str()))
    }

    /// Path of a server's log, in the report's directory.
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
            bail!("--rounds, --events and --depth must be at least 1");
        }
        if let Some(directory) = arguments.report.parent() {
            std::fs::create_dir_all(directory).with_context(|| format!("creating {}", directory.display()))?;
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
            live: beside(arguments.live, "virtiofsd-live", "--live")?,
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

/// Path of a program of this project: as given, otherwise in the directory of this program.
fn beside(given: Option<PathBuf>, name: &str, option: &str) -> anyhow::Result<PathBuf> {
    let beside = std::env::current_exe().context("locating this program")?.with_file_name(name);
    let program = given.unwrap_or(beside);
    if !program.is_file() {
        bail!("no {} at {}; run `make build`, or name another with {option}", name, program.display());
    }
    Ok(program)
}

/// The values of at most `most`, in ascending order.
fn up_to<T: Ord + Copy>(values: Vec<T>, most: T) -> Vec<T> {
    let mut values: Vec<T> = values.into_iter().filter(|value| *value <= most).collect();
    values.sort_unstable();
    values
}
