//! Runs a random workload on existing sockets, by hand or beside a harness that kills engines. Exits with 1 if anything
//! went wrong.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::Context;
use clap::Parser;
use testkit::guest::{Guest, GuestConfig};
use testkit::workload::{Config, Limit, SharedPart, Workload};

/// Number of shared files, and maximum length of a file in bytes.
const SHARED: (usize, usize) = (20, 200_000);

/// Runs a random workload of one guest or several on one share
#[derive(Debug, Parser)]
struct Arguments {
    /// A vhost-user socket; one guest for each occurrence
    #[arg(long, required = true, value_name = "PATH")]
    socket: Vec<PathBuf>,
    /// The share's directory on the host, for a comparison at the end and for files that all guests read
    #[arg(long, value_name = "DIR")]
    host: Option<PathBuf>,
    /// Seed of all randomness
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Number of lanes in each guest
    #[arg(long, default_value_t = 2)]
    lanes: usize,
    /// Number of steps of each lane; without it the time decides
    #[arg(long, conflicts_with = "until")]
    steps: Option<u64>,
    /// Maximum time in seconds
    #[arg(long, default_value_t = 10)]
    seconds: u64,
    /// End as soon as this file exists; checked once a second
    #[arg(long, value_name = "FILE")]
    until: Option<PathBuf>,
    /// RAM of each guest in MiB
    #[arg(long, default_value_t = 256)]
    memory: u64,
    /// Number of seconds after which a request counts as hung
    #[arg(long, default_value_t = 30)]
    patience: u64,
    /// Write each step to a file per lane in this directory
    #[arg(long, value_name = "DIR")]
    trace: Option<PathBuf>,
    /// Print the result as JSON
    #[arg(long)]
    json: bool,
}

fn main() -> anyhow::Result<ExitCode> {
    let arguments = Arguments::parse();
    let guests = boot(&arguments)?;
    let mut config = Config::new(arguments.seed).lanes(arguments.lanes);
    if let Some(host) = &arguments.host {
        let part = SharedPart::new(arguments.seed, SHARED.0, SHARED.1);
        part.create(host).with_context(|| format!("creating the shared files in {}", host.display()))?;
        config = config.host(host).shared(part);
    }
    if let Some(trace) = &arguments.trace {
        std::fs::create_dir_all(trace).with_context(|| format!("creating {}", trace.display()))?;
        config = config.trace(trace);
    }
    let clients: Vec<_> = guests.iter().map(Guest::fuse).collect();
    let mut workload = Workload::start(config, &clients);
    let limit = Limit::within(Duration::from_secs(arguments.seconds));
    match &arguments.until {
        None => workload.run(Limit { steps: arguments.steps, ..limit }),
        Some(file) => {
            let end = Instant::now() + Duration::from_secs(arguments.seconds);
            while !file.exists() && Instant::now() < end {
                workload.run(Limit::within(Duration::from_secs(1)));
            }
        }
    }
    let report = workload.finish();
    let violations: Vec<String> = guests.iter().flat_map(Guest::violations).map(|violation| violation.0).collect();
    if arguments.json {
        println!("{}", serde_json::json!({"report": report, "ring violations": violations}));
    } else {
        println!("{report}");
        violations.iter().for_each(|violation| println!("  {violation}"));
    }
    let clean = report.is_clean() && violations.is_empty();
    Ok(if clean { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn boot(arguments: &Arguments) -> anyhow::Result<Vec<Guest>> {
    let boot = |socket: &PathBuf| {
        let config =
            GuestConfig::new(socket).memory(arguments.memory << 20).timeout(Duration::from_secs(arguments.patience));
        Guest::boot(config).with_context(|| socket.display().to_string())
    };
    arguments.socket.iter().map(boot).collect()
}
