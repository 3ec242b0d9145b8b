//! `virtiofs-broker`: gives VMs their shares, and keeps them through whatever happens to the engines.

mod logging;

use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;
use logging::LogFormat;
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
    /// Directory below which sources are looked for: where the host's are in a container.
    #[arg(long, value_name = "DIR", default_value = "/")]
    source_root: PathBuf,
    /// Directory in which sources may be; may be given several times [default: anywhere; nowhere with --source-root].
    #[arg(long = "allowed-source", value_name = "PREFIX")]
    allowed_sources: Vec<PathBuf>,
    /// The kubelet's directory: no source may overlap it.
    #[arg(long, value_name = "DIR")]
    kubelet_dir: Option<PathBuf>,
    /// What to log: a level, or `target=level` directives.
    #[arg(long, default_value = "info")]
    log: String,
    /// How log lines look.
    #[arg(long, value_enum, default_value_t = LogFormat::Text)]
    log_format: LogFormat,
}

fn main() -> ExitCode {
    let args = Args::parse();
    match start(args) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // Standard error may lead nowhere, and `eprintln!` would panic.
            let _ = writeln!(std::io::stderr(), "virtiofs-broker: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn start(args: Args) -> anyhow::Result<()> {
    let log = logging::start(&args.log, args.log_format)?;
    let beside = || Ok::<_, std::io::Error>(std::env::current_exe()?.with_file_name("virtiofs-engine"));
    let engine = args.engine.map_or_else(beside, Ok)?;
    let outcome = run(&Config {
        runtime_dir: args.runtime_dir,
        engine,
        source_root: args.source_root,
        allowed_sources: args.allowed_sources,
        kubelet_dir: args.kubelet_dir,
    });
    log.finish();
    Ok(outcome?)
}
