//! The operator as a process, with the rights of its own service account only.

use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus};
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use super::wait::until;
use super::{Cluster, NAMESPACE};
use crate::node::{free_port, scrape};
use crate::process::Process;

/// Time limit to end; the operator releases its lease first.
const STOP_TIMEOUT: Duration = Duration::from_secs(20);
/// Short, so that tests do not wait long for another operator to take over.
const LEASE_SECONDS: &str = "4";

/// An operator. It receives SIGTERM on drop.
pub struct Operator {
    process: Process,
    metrics: std::net::SocketAddr,
}

impl Operator {
    /// Starts an operator with this identity.
    ///
    /// # Errors
    /// If it is not built or does not start.
    pub fn start(cluster: &Cluster, name: &str) -> Result<Self> {
        Self::start_with(cluster, name, |_| {})
    }

    /// Starts an operator that watches the agents' pods which `selector` selects.
    ///
    /// # Errors
    /// If it is not built or does not start.
    pub fn start_watching_agents(cluster: &Cluster, name: &str, selector: &str) -> Result<Self> {
        Self::start_with(cluster, name, |command| {
            command.args(["--agent-selector", selector]);
        })
    }

    /// Starts an operator with additional options.
    ///
    /// # Errors
    /// If it is not built or does not start.
    pub fn start_with_options(cluster: &Cluster, name: &str, options: &[String]) -> Result<Self> {
        Self::start_with(cluster, name, |command| {
            command.args(options);
        })
    }

    /// Starts an operator that dies immediately before write number `write`.
    ///
    /// # Errors
    /// If it is not built or does not start.
    pub fn start_dying_at_write(cluster: &Cluster, name: &str, write: usize) -> Result<Self> {
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
        // An option of `prepare` takes precedence.
        let given = command.get_args().any(|argument| argument.to_string_lossy().starts_with("--metrics="));
        if !given {
            command.args(["--metrics", &metrics.to_string()]);
        }
        let process = Process::start(command, &cluster.dir().join(format!("operator-{name}.log")), STOP_TIMEOUT)?;
        Ok(Operator { process, metrics })
    }

    /// The command that the chart's uninstall hook runs, with the hook's rights and these arguments of its Job.
    ///
    /// # Errors
    /// If it is not built, or the API server issues no token.
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

    /// Its exit status, if it has ended.
    ///
    /// # Errors
    /// If `waitid` fails.
    pub fn ended(&self) -> Result<Option<ExitStatus>> {
        self.process.ended()
    }

    /// Stops the operator with SIGTERM.
    ///
    /// # Errors
    /// If it does not end in time, or not with exit status 0.
    pub fn stop(self) -> Result<()> {
        let status = self
            .process
            .stop()?
            .with_context(|| format!("the operator did not end after SIGTERM\n{}", self.log_tail()))?;
        ensure!(status.success(), "the operator ended with {status}\n{}", self.log_tail());
        Ok(())
    }

    /// The end of its log.
    pub fn log_tail(&self) -> String {
        self.process.log_tail()
    }

    /// The sum of a metric over all labels; `None` if the operator does not answer.
    pub fn metric(&self, name: &str) -> Option<u64> {
        let page = scrape(self.metrics).ok()?;
        let line = |line: &str| {
            let rest = line.strip_prefix(name)?;
            rest.starts_with(['{', ' ']).then(|| rest.rsplit(' ').next()?.parse::<u64>().ok()).flatten()
        };
        Some(page.lines().filter_map(line).sum())
    }

    /// Waits until the operator holds the lease.
    ///
    /// # Errors
    /// If it ends or does not get the lease in time.
    pub fn until_working(&self) -> Result<()> {
        until(
            "an operator to hold the lease",
            || self.log_tail(),
            || {
                ensure!(self.ended()?.is_none(), "the operator ended\n{}", self.log_tail());
                Ok(self.metric("virtiofs_operator_leader").filter(|leader| *leader == 1).map(drop))
            },
        )
    }
}

/// Path of the operator's binary for tests, built by `make api`.
fn binary() -> Result<PathBuf> {
    let given = std::env::var_os("VIRTIOFS_OPERATOR").map(PathBuf::from);
    let path = given.unwrap_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/debug/virtiofs-operator"));
    ensure!(path.exists(), "{} does not exist: run `make api`", path.display());
    Ok(path)
}
