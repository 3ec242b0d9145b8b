//! The command line.

use std::net::SocketAddr;

use clap::{Args, Parser, Subcommand};
use virtiofs_logging::LogFormat;

/// Brings VirtiofsShares of a cluster to its nodes. Finds the API server as kubectl does: KUBECONFIG, ~/.kube/config,
/// or the service account of its pod.
#[derive(Debug, Parser)]
#[command(name = "virtiofs-operator", version)]
pub(crate) struct Arguments {
    /// What to do instead of operating.
    #[command(subcommand)]
    pub(crate) command: Option<Command>,
    /// Namespace of the lease that tells which of several operators works, and of the agents' pods.
    #[arg(long, global = true, value_name = "NAME", default_value = "virtiofs-system")]
    pub(crate) namespace: String,
    /// Name that this operator holds the lease by; a pod's name. Else one by chance.
    #[arg(long, value_name = "NAME")]
    pub(crate) identity: Option<String>,
    /// After how many seconds without a word from the operator that works another takes over.
    #[arg(long, value_name = "SECONDS", default_value_t = 15, value_parser = clap::value_parser!(u64).range(3..=300))]
    pub(crate) lease_seconds: u64,
    /// Labels of the agents' pods. A node whose agent is not ready then counts as unreachable; without this only a
    /// node that is not ready does.
    #[arg(long, value_name = "SELECTOR")]
    pub(crate) agent_selector: Option<String>,
    /// Serve /metrics, /healthz and /readyz at this address, such as 0.0.0.0:8080.
    #[arg(long, value_name = "ADDRESS")]
    pub(crate) metrics: Option<SocketAddr>,
    /// Which log lines to write, such as `info` or `warn,virtiofs_operator=debug`.
    #[arg(long, global = true, value_name = "FILTER", default_value = "info")]
    pub(crate) log: String,
    /// How log lines look.
    #[arg(long, global = true, value_enum, value_name = "FORMAT", default_value_t = LogFormat::Text)]
    pub(crate) log_format: LogFormat,
}

/// What an operator can do besides.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Before the chart is removed: refuses while shares are in use, and names who uses them. Otherwise ends the
    /// operators and takes their finalizer off all shares.
    PrepareUninstall(Uninstall),
}

/// What is to be removed.
#[derive(Args, Debug)]
pub(crate) struct Uninstall {
    /// The operators' Deployment.
    #[arg(long, value_name = "NAME", default_value = "virtiofs-operator")]
    pub(crate) deployment: String,
    /// How long operators get to end.
    #[arg(long, value_name = "SECONDS", default_value_t = 60, value_parser = clap::value_parser!(u64).range(1..=3600))]
    pub(crate) wait_seconds: u64,
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
