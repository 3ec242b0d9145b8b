//! The command line.

use std::net::SocketAddr;

use clap::{Args, Parser, Subcommand};
use virtiofs_http::AccessArgs;
use virtiofs_logging::LogFormat;

/// Serves the VirtiofsShares of a cluster on its nodes. Finds the API server as kubectl does: by KUBECONFIG,
/// ~/.kube/config, or the service account of its pod.
#[derive(Debug, Parser)]
#[command(name = "virtiofs-operator", version)]
pub(crate) struct Arguments {
    /// A task other than operating.
    #[command(subcommand)]
    pub(crate) command: Option<Command>,
    /// Namespace of the lease and of the agents' pods.
    #[arg(long, global = true, value_name = "NAME", default_value = "virtiofs-system")]
    pub(crate) namespace: String,
    /// Holder of the lease, such as the name of the pod. Random by default.
    #[arg(long, value_name = "NAME")]
    pub(crate) identity: Option<String>,
    /// Seconds without a renewal of the lease after which another operator takes over.
    #[arg(long, value_name = "SECONDS", default_value_t = 15, value_parser = clap::value_parser!(u64).range(3..=300))]
    pub(crate) lease_seconds: u64,
    /// Label selector of the agents' pods. A node whose agent is not ready then counts as unreachable; without it, only
    /// a node that is not ready does.
    #[arg(long, value_name = "SELECTOR")]
    pub(crate) agent_selector: Option<String>,
    /// Serve /metrics, /healthz and /readyz at this address, such as 0.0.0.0:8080.
    #[arg(long, value_name = "ADDRESS")]
    pub(crate) metrics: Option<SocketAddr>,
    /// Serve /healthz and /readyz at this address, too: without TLS, such as 0.0.0.0:8081.
    #[arg(long, value_name = "ADDRESS")]
    pub(crate) probes: Option<SocketAddr>,
    /// Who may read the metrics.
    #[command(flatten)]
    pub(crate) access: AccessArgs,
    /// Filter of log lines, such as `info` or `warn,virtiofs_operator=debug`.
    #[arg(long, global = true, value_name = "FILTER", default_value = "info")]
    pub(crate) log: String,
    /// Format of log lines.
    #[arg(long, global = true, value_enum, value_name = "FORMAT", default_value_t = LogFormat::Text)]
    pub(crate) log_format: LogFormat,
}

/// Tasks other than operating.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Prepares the removal of the chart. Fails while shares are in use, and lists their users. Otherwise stops the
    /// operators and removes their finalizer from all shares.
    PrepareUninstall(Uninstall),
}

/// Arguments of `prepare-uninstall`.
#[derive(Args, Debug)]
pub(crate) struct Uninstall {
    /// The operators' Deployment.
    #[arg(long, value_name = "NAME", default_value = "virtiofs-operator")]
    pub(crate) deployment: String,
    /// Seconds to wait for the operators to end.
    #[arg(long, value_name = "SECONDS", default_value_t = 60, value_parser = clap::value_parser!(u64).range(1..=3600))]
    pub(crate) wait_seconds: u64,
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_valid() {
        Arguments::command().debug_assert();
    }
}
