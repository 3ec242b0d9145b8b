//! `virtiofs-agent run`: the agent alone, for a service manager. The broker is a service of its own, which the agent neither
//! starts nor ends: restarting the agent does not affect VMs.

use anyhow::Context;
use tokio::runtime::Builder;
use tokio::signal::unix::{Signal, SignalKind, signal};

use crate::agent::{self, SHUTDOWN_WITHIN};
use crate::announce::{self, Output};
use crate::args::ServeArgs;
use crate::manifests::Manifests;
use crate::service;

/// Runs until a signal.
pub(crate) fn run(args: &ServeArgs) -> anyhow::Result<()> {
    let runtime = Builder::new_current_thread().enable_all().build().context("cannot start")?;
    let result = runtime.block_on(work(args));
    runtime.shutdown_timeout(SHUTDOWN_WITHIN);
    result
}

async fn work(args: &ServeArgs) -> anyhow::Result<()> {
    let mut signals = Signals::listen().context("cannot listen for signals")?;
    let mut agent = agent::start_directory(args).await?;
    let passes = &agent.running.passes;
    let (shares, runtime_dir) = (agent.shares_dir.display(), agent.running.runtime_dir.root().display());
    tracing::info!(%shares, %runtime_dir, "agent started");
    tokio::spawn(announce::follow(passes.clone(), Output::Log));
    tokio::spawn(service::report_status(passes.clone()));
    if let Some(every) = service::watchdog() {
        tokio::spawn(service::reset_watchdog(every, passes.clone()));
    }
    while signals.next().await == Request::Reload {
        reload(&mut agent.manifests).await;
    }
    service::stopping();
    tracing::info!("agent ends; the broker and all sessions continue");
    Ok(())
}

/// Reads the declarations at once. The service manager waits for it.
async fn reload(manifests: &mut Manifests) {
    service::reloading();
    manifests.read_again().await;
    tracing::info!(shares = manifests.desired.borrow().shares.len(), "declarations read again");
    service::ready();
}

/// What a signal requests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Request {
    End,
    Reload,
}

struct Signals {
    interrupt: Signal,
    terminate: Signal,
    hangup: Signal,
}

impl Signals {
    fn listen() -> std::io::Result<Self> {
        let [interrupt, terminate, hangup] =
            [SignalKind::interrupt(), SignalKind::terminate(), SignalKind::hangup()].map(signal);
        Ok(Signals { interrupt: interrupt?, terminate: terminate?, hangup: hangup? })
    }

    async fn next(&mut self) -> Request {
        tokio::select! {
            _ = self.interrupt.recv() => Request::End,
            _ = self.terminate.recv() => Request::End,
            _ = self.hangup.recv() => Request::Reload,
        }
    }
}
