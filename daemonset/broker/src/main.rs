//! `virtiofs-broker`: serves shares to VMs and keeps their mounts alive while engines are replaced.

use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;
use virtiofs_broker::{Config, HolderChoice, run};
use virtiofs_logging::LogFormat;

/// Shares host directories with VMs over virtiofs. The agent configures it through its control socket.
#[derive(Parser)]
#[command(version)]
struct Args {
    /// Directory for sockets and the lock; created if it is missing.
    #[arg(long)]
    runtime_dir: PathBuf,
    /// The engine's binary [default: virtiofs-engine beside this one].
    #[arg(long)]
    engine: Option<PathBuf>,
    /// Directory below which source paths are resolved: the mount of the host's root in a container.
    #[arg(long, value_name = "DIR", default_value = "/")]
    source_root: PathBuf,
    /// Directory that sources must be in; repeatable [default: any directory; none with --source-root].
    #[arg(long = "allowed-source", value_name = "PREFIX")]
    allowed_sources: Vec<PathBuf>,
    /// The kubelet's directory: no source may overlap it.
    #[arg(long, value_name = "DIR")]
    kubelet_dir: Option<PathBuf>,
    /// Directory of the virtiofs-keeper that holds the descriptors of sessions while no broker runs. Sessions then survive
    /// the end of the broker.
    #[arg(long, value_name = "DIR", conflicts_with = "systemd_store")]
    keeper: Option<PathBuf>,
    /// Let systemd hold them instead of a keeper: needs FileDescriptorStoreMax= and KillMode=process in the unit.
    #[arg(long)]
    systemd_store: bool,
    /// What to log: a level, or `target=level` directives.
    #[arg(long, default_value = "info")]
    log: String,
    /// Format of log lines.
    #[arg(long, value_enum, default_value_t = LogFormat::Text)]
    log_format: LogFormat,
}

fn main() -> ExitCode {
    let args = Args::parse();
    match start(args) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // `eprintln!` would panic if standard error is closed.
            let _ = writeln!(std::io::stderr(), "virtiofs-broker: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn start(args: Args) -> anyhow::Result<()> {
    let log = virtiofs_logging::init_queued(&args.log, args.log_format)?;
    let sibling = || Ok::<_, std::io::Error>(std::env::current_exe()?.with_file_name("virtiofs-engine"));
    let engine = args.engine.map_or_else(sibling, Ok)?;
    let holder = match args.keeper {
        Some(directory) => HolderChoice::Keeper(directory),
        None if args.systemd_store => HolderChoice::Systemd,
        None => HolderChoice::Nobody,
    };
    let outcome = run(&Config {
        runtime_dir: args.runtime_dir,
        engine,
        source_root: args.source_root,
        allowed_sources: args.allowed_sources,
        kubelet_dir: args.kubelet_dir,
        holder,
    });
    log.finish();
    Ok(outcome?)
}
