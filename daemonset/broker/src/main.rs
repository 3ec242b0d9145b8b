//! `virtiofs-broker`: gives VMs their shares, and keeps them through whatever happens to the engines.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, ValueEnum};
use tracing_subscriber::EnvFilter;
use virtiofs_broker::{Config, run};

/// Shares host directories with VMs over virtiofs. Told what to share on its control socket.
#[derive(Parser)]
#[command(version)]
struct Args {
    /// Directory for sockets and the lock; created if it is missing.
    #[arg(long)]
    runtime_dir: PathBuf,
    /// The engine's binary [default: virtiofs-engine beside this one].
    #[arg(long)]
    engine: Option<PathBuf>,
    /// What to log: a level, or `target=level` directives.
    #[arg(long, default_value = "info")]
    log: String,
    /// How log lines look.
    #[arg(long, value_enum, default_value_t = LogFormat::Text)]
    log_format: LogFormat,
}

#[derive(Clone, Copy, ValueEnum)]
enum LogFormat {
    Text,
    Json,
}

fn main() -> ExitCode {
    let args = Args::parse();
    match start(args) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("virtiofs-broker: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn start(args: Args) -> anyhow::Result<()> {
    let log = tracing_subscriber::fmt().with_env_filter(EnvFilter::try_new(&args.log)?).with_writer(std::io::stderr);
    match args.log_format {
        LogFormat::Text => log.with_ansi(false).init(),
        LogFormat::Json => log.json().init(),
    }
    let beside = || Ok::<_, std::io::Error>(std::env::current_exe()?.with_file_name("virtiofs-engine"));
    let engine = args.engine.map_or_else(beside, Ok)?;
    Ok(run(&Config { runtime_dir: args.runtime_dir, engine })?)
}
