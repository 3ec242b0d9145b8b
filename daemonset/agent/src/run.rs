//! `virtiofs-agent run`: the agent alone, for a service manager. The broker is a service of its own, which this one
//! neither starts nor ends: an agent that comes and goes disturbs no VM.

use anyhow::Context;
use tokio::runtime::Builder;
use tokio::signal::unix::{Signal, SignalKind, signal};

use crate::announce::{self, Audience};
use crate::args::ServeArgs;
use crate::manifests::Manifests;
use crate::serve;
use crate::service;
use crate::up::LEAVE_BEHIND_AFTER;

/// Works until a signal.
pub(crate) fn run(args: &ServeArgs) -> anyhow::Result<()> {
    let runtime = Builder::new_current_thread().enable_all().build().context("cannot start")?;
    let result = runtime.block_on(work(args));
    runtime.shutdown_timeout(LEAVE_BEHIND_AFTER);
    result
}

async fn work(args: &ServeArgs) -> anyhow::Result<()> {
    let mut signals = Signals::listen().context("cannot listen for signals")?;
    let mut serving = serve::start(args).await?;
    let (shares, runtime_dir) = (serving.shares_dir.display(), serving.runtime_dir.root().display());
    tracing::info!(%shares, %runtime_dir, "agent started");
    tokio::spawn(announce::follow(serving.turns.clone(), Audience::Log));
    tokio::spawn(service::tell_status(serving.turns.clone()));
    if let Some(every) = service::watchdog() {
        tokio::spawn(service::keep_watchdog(every, serving.turns.clone()));
    }
    while signals.next().await == Wish::Reload {
        reload(&mut serving.manifests).await;
    }
    service::stopping();
    tracing::info!("agent ends; the broker and all sessions go on");
    Ok(())
}

/// Reads the declarations at once, which the service manager waits for.
async fn reload(manifests: &mut Manifests) {
    service::reloading();
    manifests.read_again().await;
    tracing::info!(shares = manifests.desired.borrow().shares.len(), "declarations were read again");
    service::ready();
}

/// What a signal asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Wish {
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

    async fn next(&mut self) -> Wish {
        tokio::select! {
            _ = self.interrupt.recv() => Wish::End,
            _ = self.terminate.recv() => Wish::End,
            _ = self.hangup.recv() => Wish::Reload,
        }
    }
}
