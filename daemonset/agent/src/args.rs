//! The command line.

use std::net::SocketAddr;
use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};

use crate::runtime_dir::default_root;

/// Shares directories of this host with VMs over virtiofs, as VirtiofsShare documents declare it.
#[derive(Debug, Parser)]
#[command(name = "virtiofs-agent", version)]
pub(crate) struct Arguments {
    /// What to do.
    #[command(subcommand)]
    pub(crate) command: Command,
    /// Which log lines to write, such as `info` or `warn,virtiofs_agent=debug`.
    #[arg(long, global = true, value_name = "FILTER")]
    pub(crate) log: Option<String>,
    /// How log lines look.
    #[arg(long, global = true, value_enum, value_name = "FORMAT")]
    pub(crate) log_format: Option<LogFormat>,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Serve every share of a directory until Ctrl-C; changes of the directory are followed.
    Up(UpArgs),
    /// The same for a service manager, beside a broker that is a service of its own.
    Run(ServeArgs),
    /// Say whether manifests make sense, and what follows from them. Serves nothing.
    Check(CheckArgs),
    /// Show shares, VMs and the lines that mount each share.
    Status(StatusArgs),
}

/// Options of `up` and `run`.
#[derive(Debug, Args)]
pub(crate) struct ServeArgs {
    /// Directory of VirtiofsShare documents (*.yaml, *.yml, *.json).
    #[arg(long, value_name = "DIR")]
    pub(crate) shares: PathBuf,
    /// Directory for sockets; it is made if it is not there.
    #[arg(long, value_name = "DIR", default_value_os_t = default_root())]
    pub(crate) runtime_dir: PathBuf,
    /// Serve /metrics, /healthz and /readyz at this address, such as 127.0.0.1:9090.
    #[arg(long, value_name = "ADDRESS")]
    pub(crate) metrics: Option<SocketAddr>,
}

/// Options of `up`.
#[derive(Debug, Args)]
pub(crate) struct UpArgs {
    /// What `run` takes too.
    #[command(flatten)]
    pub(crate) serve: ServeArgs,
    /// The virtiofs-broker to start; else the one beside this program, else the one in PATH.
    #[arg(long, value_name = "PATH")]
    pub(crate) broker: Option<PathBuf>,
}

/// Options of `check`.
#[derive(Debug, Args)]
pub(crate) struct CheckArgs {
    /// Manifests, or directories of them.
    #[arg(required = true, value_name = "FILE")]
    pub(crate) files: Vec<PathBuf>,
}

/// Options of `status`.
#[derive(Debug, Args)]
pub(crate) struct StatusArgs {
    /// Shares to show; all when none is named.
    #[arg(value_name = "SHARE")]
    pub(crate) shares: Vec<String>,
    /// Directory that agent and broker run in.
    #[arg(long, value_name = "DIR", default_value_os_t = default_root())]
    pub(crate) runtime_dir: PathBuf,
    /// For people or for programs.
    #[arg(short, long, value_enum, default_value_t = OutputFormat::Table)]
    pub(crate) output: OutputFormat,
}

/// How an answer looks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum OutputFormat {
    /// For people.
    Table,
    /// For programs; the schema is versioned.
    Json,
}

/// How log lines look.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum LogFormat {
    /// One line of text each.
    Text,
    /// One JSON object each.
    Json,
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_sound() {
        Arguments::command().debug_assert();
    }
}
