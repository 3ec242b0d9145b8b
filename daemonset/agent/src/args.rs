//! The command line.

use std::net::SocketAddr;
use std::path::{Component, Path, PathBuf};
use std::time::Duration;

use clap::{Args, Parser, Subcommand, ValueEnum};
use virtiofs_logging::LogFormat;

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
    /// Serve what the shares of a cluster ask of this node, with a broker that somebody else starts.
    Node(NodeArgs),
    /// Say whether manifests make sense, and what follows from them. Serves nothing.
    Check(CheckArgs),
    /// Show shares, VMs and the lines that mount each share.
    Status(StatusArgs),
    /// Give every VM of a share a new engine, of the binary that lies there now, between two requests.
    Handover(HandoverArgs),
    /// Let go of a share's source so that the host can unmount it; guests wait.
    Release(ReleaseArgs),
    /// Take a released source up again.
    Resume(ResumeArgs),
    /// End sessions of a share; without --force, say which that would be.
    Close(CloseArgs),
    /// Show the requests of one session as they are answered.
    Trace(TraceArgs),
    /// Offer a share, or a directory of it, at another socket.
    Socket(SocketArgs),
    /// Pack what explains how this host's shares are doing.
    SupportBundle(SupportBundleArgs),
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

/// Options of `node`.
#[derive(Debug, Args)]
pub(crate) struct NodeArgs {
    /// Name of this node in the cluster.
    #[arg(long, value_name = "NAME")]
    pub(crate) node: String,
    /// Directory for sockets; it is made if it is not there.
    #[arg(long, value_name = "DIR", default_value_os_t = default_root())]
    pub(crate) runtime_dir: PathBuf,
    /// The kubelet's directory, such as /var/lib/kubelet: pods get shares as volumes of csi.virtiofs.dev.
    #[arg(long, value_name = "DIR", value_parser = absolute)]
    pub(crate) kubelet_dir: Option<PathBuf>,
    /// Directory below which sources are looked for: where the host's are in a container.
    #[arg(long, value_name = "DIR", default_value = "/")]
    pub(crate) source_root: PathBuf,
    /// Directory in which sources may be; may be given several times [default: anywhere; nowhere with --source-root].
    #[arg(long = "allowed-source", value_name = "PREFIX", value_parser = absolute)]
    pub(crate) allowed_sources: Vec<PathBuf>,
    /// Serve /metrics, /healthz and /readyz at this address, such as 127.0.0.1:9090.
    #[arg(long, value_name = "ADDRESS")]
    pub(crate) metrics: Option<SocketAddr>,
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
    /// Print the JSON schema of `-o json` instead.
    #[arg(long)]
    pub(crate) schema: bool,
}

/// Options of `handover`.
#[derive(Debug, Args)]
pub(crate) struct HandoverArgs {
    /// The share.
    #[arg(value_name = "SHARE")]
    pub(crate) share: String,
    /// Only this session of it.
    #[arg(long, value_name = "ID")]
    pub(crate) session: Option<String>,
    /// How long to wait for it to be done.
    #[arg(long, value_name = "TIME", default_value = "30s", value_parser = humantime::parse_duration)]
    pub(crate) timeout: Duration,
    /// Directory that agent and broker run in.
    #[arg(long, value_name = "DIR", default_value_os_t = default_root())]
    pub(crate) runtime_dir: PathBuf,
}

/// Options of `release`.
#[derive(Debug, Args)]
pub(crate) struct ReleaseArgs {
    /// The share.
    #[arg(value_name = "SHARE")]
    pub(crate) share: String,
    /// After how long guests go on by themselves.
    #[arg(long = "for", value_name = "TIME", default_value = "5m", value_parser = humantime::parse_duration)]
    pub(crate) during: Duration,
    /// Also if guests have files open that no name leads to; they lose them by it.
    #[arg(long)]
    pub(crate) force: bool,
    /// Directory that agent and broker run in.
    #[arg(long, value_name = "DIR", default_value_os_t = default_root())]
    pub(crate) runtime_dir: PathBuf,
}

/// Options of `resume`.
#[derive(Debug, Args)]
pub(crate) struct ResumeArgs {
    /// The share.
    #[arg(value_name = "SHARE")]
    pub(crate) share: String,
    /// Directory that agent and broker run in.
    #[arg(long, value_name = "DIR", default_value_os_t = default_root())]
    pub(crate) runtime_dir: PathBuf,
}

/// Options of `close`.
#[derive(Debug, Args)]
pub(crate) struct CloseArgs {
    /// The share.
    #[arg(value_name = "SHARE")]
    pub(crate) share: String,
    /// Only this session of it.
    #[arg(long, value_name = "ID")]
    pub(crate) session: Option<String>,
    /// Do it: their VMs lose the share until they are restarted.
    #[arg(long)]
    pub(crate) force: bool,
    /// Directory that agent and broker run in.
    #[arg(long, value_name = "DIR", default_value_os_t = default_root())]
    pub(crate) runtime_dir: PathBuf,
}

/// Options of `trace`.
#[derive(Debug, Args)]
pub(crate) struct TraceArgs {
    /// The session, as `status` shows it.
    #[arg(value_name = "SESSION")]
    pub(crate) session: String,
    /// For how long; Ctrl-C ends it before.
    #[arg(long = "for", value_name = "TIME", default_value = "10s", value_parser = humantime::parse_duration)]
    pub(crate) during: Duration,
    /// Most requests to show of one second; more are counted and left out.
    #[arg(long, value_name = "COUNT", default_value_t = 1000)]
    pub(crate) rate: u32,
    /// For people or for programs: a line, or a JSON object, for each request.
    #[arg(short, long, value_enum, default_value_t = OutputFormat::Table)]
    pub(crate) output: OutputFormat,
    /// Directory that agent and broker run in.
    #[arg(long, value_name = "DIR", default_value_os_t = default_root())]
    pub(crate) runtime_dir: PathBuf,
}

/// Options of `socket`.
#[derive(Debug, Args)]
pub(crate) struct SocketArgs {
    /// The share.
    #[arg(value_name = "SHARE")]
    pub(crate) share: String,
    /// What to call the socket: a-z, 0-9 and -. It lies beside the share's own as SHARE.NAME.sock.
    #[arg(value_name = "NAME")]
    pub(crate) name: String,
    /// Offer this directory of the share instead of all of it; a path below the source.
    #[arg(long, value_name = "PATH")]
    pub(crate) sub_path: Option<PathBuf>,
    /// Owner of the socket; else that of the share's own.
    #[arg(long, value_name = "UID")]
    pub(crate) owner: Option<u32>,
    /// Its group; else that of the share's own.
    #[arg(long, value_name = "GID")]
    pub(crate) group: Option<u32>,
    /// Its permission bits, octal; else those of the share's own.
    #[arg(long, value_name = "MODE", value_parser = octal)]
    pub(crate) mode: Option<u32>,
    /// Take the socket away; VMs that use it go on.
    #[arg(long, conflicts_with_all = ["sub_path", "owner", "group", "mode"])]
    pub(crate) remove: bool,
    /// Directory that agent and broker run in.
    #[arg(long, value_name = "DIR", default_value_os_t = default_root())]
    pub(crate) runtime_dir: PathBuf,
}

/// Options of `support-bundle`.
#[derive(Debug, Args)]
pub(crate) struct SupportBundleArgs {
    /// The file to write; it must not be there yet.
    #[arg(long, value_name = "FILE", default_value = "virtiofs-support.tar.gz")]
    pub(crate) output: PathBuf,
    /// With names of guests' files, where they are known.
    #[arg(long)]
    pub(crate) guest_paths: bool,
    /// Directory that agent and broker run in.
    #[arg(long, value_name = "DIR", default_value_os_t = default_root())]
    pub(crate) runtime_dir: PathBuf,
}

/// A path as it is, but for a slash at its end.
fn absolute(text: &str) -> Result<PathBuf, String> {
    let path: PathBuf = Path::new(text).components().collect();
    let normal = path.is_absolute() && !path.components().any(|part| part == Component::ParentDir);
    if normal { Ok(path) } else { Err("not an absolute path without `..`".to_owned()) }
}

fn octal(text: &str) -> Result<u32, String> {
    let mode = u32::from_str_radix(text, 8).ok().filter(|mode| *mode <= 0o777);
    mode.ok_or_else(|| "not an octal mode such as 0660".to_owned())
}

/// How an answer looks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum OutputFormat {
    /// For people.
    Table,
    /// For programs; the schema is versioned.
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
