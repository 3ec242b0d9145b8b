//! The command line.

use std::net::SocketAddr;
use std::path::{Component, Path, PathBuf};

use clap::{Args, Parser, Subcommand};
use virtiofs_client::runtime_dir::default_root;
use virtiofs_http::AccessArgs;
use virtiofs_logging::LogFormat;

use crate::csi::VolumeLimits;

/// Shares directories of this host with VMs over virtiofs, as VirtiofsShare documents declare.
///
/// `virtiofsctl` has the commands for people, such as `check` and `status`.
#[derive(Debug, Parser)]
#[command(name = "virtiofs-agent", version)]
pub(crate) struct Arguments {
    /// The command.
    #[command(subcommand)]
    pub(crate) command: Command,
    /// Filter of log lines, such as `info` or `warn,virtiofs_agent=debug`.
    #[arg(long, global = true, value_name = "FILTER")]
    pub(crate) log: Option<String>,
    /// Format of log lines.
    #[arg(long, global = true, value_enum, value_name = "FORMAT")]
    pub(crate) log_format: Option<LogFormat>,
}

/// The commands.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Serve all shares of a directory until Ctrl-C, and follow changes of the directory.
    Up(UpArgs),
    /// The same for a service manager, with a broker that is a service of its own.
    Run(ServeArgs),
    /// Serve the shares of a cluster on this node, with a broker that is a pod of its own.
    Node(NodeArgs),
}

/// Options of `up` and `run`.
#[derive(Debug, Args)]
pub(crate) struct ServeArgs {
    /// Directory of VirtiofsShare documents (*.yaml, *.yml, *.json).
    #[arg(long, value_name = "DIR")]
    pub(crate) shares: PathBuf,
    /// Directory for sockets; created if it does not exist.
    #[arg(long, value_name = "DIR", default_value_os_t = default_root())]
    pub(crate) runtime_dir: PathBuf,
    /// Serve /metrics, /healthz and /readyz at this address, such as 127.0.0.1:9090.
    #[arg(long, value_name = "ADDRESS")]
    pub(crate) metrics: Option<SocketAddr>,
}

/// Options of `up`.
#[derive(Debug, Args)]
pub(crate) struct UpArgs {
    /// Options that `run` has, too.
    #[command(flatten)]
    pub(crate) serve: ServeArgs,
    /// The virtiofs-broker to start [default: the one next to this program, else the one in PATH].
    #[arg(long, value_name = "PATH")]
    pub(crate) broker: Option<PathBuf>,
    /// The virtiofs-keeper to start [default: the one next to this program, else the one in PATH].
    #[arg(long, value_name = "PATH")]
    pub(crate) keeper: Option<PathBuf>,
}

/// Options of `node`.
#[derive(Debug, Args)]
pub(crate) struct NodeArgs {
    /// Name of this node in the cluster.
    #[arg(long, value_name = "NAME")]
    pub(crate) node: String,
    /// Directory for sockets; created if it does not exist.
    #[arg(long, value_name = "DIR", default_value_os_t = default_root())]
    pub(crate) runtime_dir: PathBuf,
    /// The kubelet's directory, such as /var/lib/kubelet; enables volumes of csi.virtiofs.dev.
    #[arg(long, value_name = "DIR", value_parser = absolute)]
    pub(crate) kubelet_dir: Option<PathBuf>,
    /// Directory where the host's root is mounted in this container.
    #[arg(long, value_name = "DIR", default_value = "/")]
    pub(crate) source_root: PathBuf,
    /// Directory that sources may be in; can be repeated [default: anywhere; nowhere with --source-root].
    #[arg(long = "allowed-source", value_name = "PREFIX", value_parser = absolute)]
    pub(crate) allowed_sources: Vec<PathBuf>,
    /// How many volumes may exist.
    #[command(flatten)]
    pub(crate) limits: VolumeLimits,
    /// Serve /metrics, /healthz and /readyz at this address, such as 0.0.0.0:9090.
    #[arg(long, value_name = "ADDRESS")]
    pub(crate) metrics: Option<SocketAddr>,
    /// Serve /healthz and /readyz at this address, too: without TLS, such as 0.0.0.0:9091.
    #[arg(long, value_name = "ADDRESS")]
    pub(crate) probes: Option<SocketAddr>,
    /// Who may read the metrics.
    #[command(flatten)]
    pub(crate) access: AccessArgs,
}

/// An absolute path without a slash at its end.
fn absolute(text: &str) -> Result<PathBuf, String> {
    let path: PathBuf = Path::new(text).components().collect();
    let normal = path.is_absolute() && !path.components().any(|part| part == Component::ParentDir);
    if normal { Ok(path) } else { Err("not an absolute path without `..`".to_owned()) }
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
