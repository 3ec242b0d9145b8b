//! `virtiofs-broker`: serves shares to VMs and keeps their mounts alive while engines are replaced.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::Context;
use clap::{Parser, Subcommand};
use virtiofs_broker::{
    Config, End, HolderChoice, await_engines, become_waiting, block_ending_signals, read_readiness, run,
};
use virtiofs_logging::LogFormat;

/// Shares host directories with VMs over virtiofs. The agent configures it through its control socket.
#[derive(Parser)]
#[command(version, args_conflicts_with_subcommands = true, subcommand_negates_reqs = true)]
struct Cli {
    #[command(subcommand)]
    command: Option<CliCommand>,
    #[command(flatten)]
    args: Option<Args>,
}

#[derive(Subcommand)]
enum CliCommand {
    /// Prints what the ready file of a broker says. Fails unless that broker is ready: a probe of its container.
    Ready {
        /// The file that the broker got with --ready-file.
        file: PathBuf,
    },
}

#[derive(clap::Args)]
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
    /// Allow a source that contains the runtime directory, such as `/`. Only for a broker that serves a single VM, whose guest
    /// may then end its own session.
    #[arg(long)]
    shared_runtime_dir: bool,
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
    /// If another broker has the runtime directory, stand by: try own engines, and take over when that broker ends.
    #[arg(long, requires = "keeper")]
    stand_by: bool,
    /// File that says whether this broker serves or could take over; see the command `ready`.
    #[arg(long, value_name = "FILE")]
    ready_file: Option<PathBuf>,
    /// Only wait for engines: a broker becomes this when it ends.
    #[arg(long, hide = true)]
    await_engines: bool,
    /// What to log: a level, or `target=level` directives.
    #[arg(long, default_value = "info")]
    log: String,
    /// Format of log lines.
    #[arg(long, value_enum, default_value_t = LogFormat::Text)]
    log_format: LogFormat,
}

fn main() -> ExitCode {
    let outcome = match Cli::parse() {
        Cli { command: Some(CliCommand::Ready { file }), .. } => ready(&file),
        Cli { args: Some(args), .. } => start(args),
        Cli { args: None, .. } => Err(anyhow::anyhow!("--runtime-dir is missing")),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // `eprintln!` would panic if standard error is closed.
            let _ = writeln!(std::io::stderr(), "virtiofs-broker: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn ready(file: &Path) -> anyhow::Result<()> {
    let (text, ready) = read_readiness(file).with_context(|| format!("ready file {}", file.display()))?;
    anyhow::ensure!(ready, "{}", text.trim());
    Ok(writeln!(std::io::stdout(), "{}", text.trim())?)
}

fn start(args: Args) -> anyhow::Result<()> {
    let signals = block_ending_signals().context("signals")?;
    let log = virtiofs_logging::init_queued(&args.log, args.log_format)?;
    if args.await_engines {
        let outcome = await_engines();
        log.finish();
        return Ok(outcome?);
    }
    let outcome = run(&config(args)?, &signals);
    log.finish();
    match outcome? {
        End::Over => Ok(()),
        // The lock is held until this process has become the other one.
        End::EnginesServe(_lock) => Err(become_waiting("--await-engines")).context("wait for engines"),
    }
}

fn config(args: Args) -> anyhow::Result<Config> {
    let sibling = || Ok::<_, std::io::Error>(std::env::current_exe()?.with_file_name("virtiofs-engine"));
    let engine = args.engine.map_or_else(sibling, Ok)?;
    let holder = match args.keeper {
        Some(directory) => HolderChoice::Keeper(directory),
        None if args.systemd_store => HolderChoice::Systemd,
        None => HolderChoice::Nobody,
    };
    Ok(Config {
        runtime_dir: args.runtime_dir,
        engine,
        source_root: args.source_root,
        allowed_sources: args.allowed_sources,
        shared_runtime_dir: args.shared_runtime_dir,
        kubelet_dir: args.kubelet_dir,
        holder,
        stand_by: args.stand_by,
        ready_file: args.ready_file,
    })
}
