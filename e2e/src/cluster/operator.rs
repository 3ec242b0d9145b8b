//! The operator as a process, with its own service account's rights and no more.

use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus};
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use super::wait::until;
use super::{Cluster, NAMESPACE};
use crate::node::{free_port, scrape};
use crate::process::Process;

/// Time to release its lease.
const FAREWELL: Duration = Duration::from_secs(20);
/// Short, so that a test need not wait long for another to take over.
const LEASE_SECONDS: &str = "4";

/// An operator. On drop it receives SIGTERM.
pub struct Operator {
    process: Process,
    metrics: std::net::SocketAddr,
}

impl Operator {
    /// Starts an operator by this name.
    ///
    /// # Errors
    /// When it is not built or does not start.
    pub fn start(cluster: &Cluster, name: &str) -> Result<Self> {
        Self::start_with(cluster, name, |_| {})
    }

    /// Starts one that looks at the agents' pods, which this selects.
    ///
    /// # Errors
    /// When it is not built or does not start.
    pub fn start_watching_agents(cluster: &Cluster, name: &str, selector: &str) -> Result<Self> {
        Self::start_with(cluster, name, |command| {
            command.args(["--agent-selector", selector]);
        })
    }

    /// Starts one with more options.
    ///
    /// # Errors
    /// When it is not built or does not start.
    pub fn start_with_options(cluster: &Cluster, name: &str, options: &[String]) -> Result<Self> {
        Self::start_with(cluster, name, |command| {
            command.args(options);
        })
    }

    /// Starts one that dies before its write of this number.
    ///
    /// # Errors
    /// When it is not built or does not start.
    pub fn start_mortal(cluster: &Cluster, name: &str, write: usize) -> Result<Self> {
        Self::start_with(cluster, name, |command| {
            command.env("VIRTIOFS_DIE_AT_WRITE", write.to_string());
        })
    }

    fn start_with(cluster: &Cluster, name: &str, prepare: impl FnOnce(&mut Command)) -> Result<Self> {
        let access = cluster.service_account("virtiofs-operator")?;
        let metrics = free_port()?;
        let mut command = Command::new(binary()?);
        command.env("KUBECONFIG", access.kubeconfig());
        command.args(["--namespace", NAMESPACE, "--identity", name, "--lease-seconds", LEASE_SECONDS]);
        command.args(["--log", "info,virtiofs_operator=debug"]);
        prepare(&mut command);
        // An option that `prepare` gives takes its place.
        let given = command.get_args().any(|argument| argument.to_string_lossy().starts_with("--metrics="));
        if !given {
            command.args(["--metrics", &metrics.to_string()]);
        }
        let process = Process::start(command, &cluster.dir().join(format!("operator-{name}.log")), FAREWELL)?;
        Ok(Operator { process, metrics })
    }

    /// What the chart's hook runs before the chart is removed, with its rights and these arguments of its Job.
    ///
    /// # Errors
    /// When it is not built, or the API server issues no token.
    pub fn hook(cluster: &Cluster, arguments: &[String]) -> Result<Command> {
        let access = cluster.service_account("virtiofs-uninstall")?;
        let mut command = Command::new(binary()?);
        command.env("KUBECONFIG", access.kubeconfig()).args(arguments);
        Ok(command)
    }

    /// Its process id.
    pub fn id(&self) -> u32 {
        self.process.id()
    }

    /// How it ended, if it has.
    ///
    /// # Errors
    /// When the system does not report it.
    pub fn ended(&self) -> Result<Option<ExitStatus>> {
        self.process.ended()
    }

    /// Asks it to end in good order.
    ///
    /// # Errors
    /// When it does not, or not with success.
    pub fn stop(self) -> Result<()> {
        let status = self.process.stop()?.with_context(|| format!("it does not end\n{}", self.log_tail()))?;
        ensure!(status.success(), "the operator ended with {status}\n{}", self.log_tail());
        Ok(())
    }

    /// The end of its log.
    pub fn log_tail(&self) -> String {
        self.process.log_tail()
    }

    /// The sum of a metric over all its labels; none while nobody answers.
    pub fn metric(&self, name: &str) -> Option<u64> {
        let page = scrape(self.metrics).ok()?;
        let line = |line: &str| {
            let rest = line.strip_prefix(name)?;
            rest.starts_with(['{', ' ']).then(|| rest.rsplit(' ').next()?.parse::<u64>().ok()).flatten()
        };
        Some(page.lines().filter_map(line).sum())
    }

    /// Waits until it holds the lease.
    ///
    /// # Errors
    /// When it does not.
    pub fn until_working(&self) -> Result<()> {
        until(
            "an operator to work",
            || self.log_tail(),
            || {
                ensure!(self.ended()?.is_none(), "the operator has ended\n{}", self.log_tail());
                Ok(self.metric("virtiofs_operator_leader").filter(|leader| *leader == 1).map(drop))
            },
        )
    }
}

/// The operator for tests, built by `make api`.
fn binary() -> Result<PathBuf> {
    let given = std::env::var_os("VIRTIOFS_OPERATOR").map(PathBuf::from);
    let path = given.unwrap_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/debug/virtiofs-operator"));
    ensure!(path.exists(), "{} is not there: use `make api`", path.display());
    Ok(path)
}
