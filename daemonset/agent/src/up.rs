//! `virtiofs-agent up`: agent, broker and keeper together, for a person at a shell.

use std::path::PathBuf;

use anyhow::Context;
use tokio::runtime::Builder;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;
use virtiofs_client::broker::Client;

use crate::agent::{self, SHUTDOWN_WITHIN};
use crate::announce::{self, Output, print_line};
use crate::args::UpArgs;
use crate::broker::process::{Daemon, find, supervise};
use crate::logging::LogChoice;

/// Serves until a signal. One thread runs everything that does not block: the broker's parent-death signal is bound to the
/// thread that started the broker, and this thread lives as long as the program.
pub(crate) fn up(args: UpArgs, log: LogChoice) -> anyhow::Result<()> {
    let runtime = Builder::new_current_thread().enable_all().build().context("cannot start")?;
    let result = runtime.block_on(serve(args, log));
    runtime.shutdown_timeout(SHUTDOWN_WITHIN);
    result
}

async fn serve(args: UpArgs, log: LogChoice) -> anyhow::Result<()> {
    let mut stop = Stop::listen().context("cannot listen for signals")?;
    let path = std::env::var("PATH").unwrap_or_default();
    let (program, keeper) = (find("broker", args.broker, &path)?, find("keeper", args.keeper, &path)?);
    let agent = agent::start_directory(&args.serve).await?;
    let (runtime_dir, passes) = (&agent.running.runtime_dir, &agent.running.passes);
    print_line(&format!("serving the shares of {}; Ctrl-C ends it", agent.shares_dir.display()));

    let keeper_dir = runtime_dir.root().join("keeper");
    let (end_keeper, keeper_ending) = watch::channel(false);
    let keeper = tokio::spawn(supervise(Daemon::keeper(keeper, &keeper_dir, &log), keeper_ending));
    let (end, ending) = watch::channel(false);
    let command = Daemon::broker(program, runtime_dir.root(), &keeper_dir, &log);
    let mut broker = tokio::spawn(supervise(command, ending));
    let outcome = tokio::select! {
        () = stop.requested() => None,
        () = announce::follow(passes.clone(), Output::Terminal) => None,
        outcome = &mut broker => Some(outcome),
    };
    let outcome = match outcome {
        Some(outcome) => outcome,
        None => {
            print_line("ending");
            drain(runtime_dir.broker_socket()).await;
            end.send_replace(true);
            broker.await
        }
    };
    // Last: whatever the broker has left ends with the keeper.
    end_keeper.send_replace(true);
    keeper.await.context("the keeper is no longer supervised")??;
    runtime_dir.clear(passes.borrow().report.shares.iter().map(|share| share.name.clone()));
    Ok(outcome.context("the broker is no longer supervised")??)
}

/// Ends all sessions. If the broker does not answer, they end with the keeper.
async fn drain(socket: PathBuf) {
    let drained = tokio::task::spawn_blocking(move || Client::connect(&socket)?.drain()).await;
    match drained {
        Ok(Ok(sessions)) => tracing::info!(sessions, "sessions ended"),
        Ok(Err(error)) => tracing::warn!(%error, "sessions not ended in order"),
        Err(error) => tracing::warn!(%error, "sessions not ended in order"),
    }
}

/// The signals that end the program.
struct Stop {
    signals: [tokio::signal::unix::Signal; 3],
}

impl Stop {
    fn listen() -> std::io::Result<Self> {
        let kinds = [SignalKind::interrupt(), SignalKind::terminate(), SignalKind::hangup()];
        let [interrupt, terminate, hangup] = kinds.map(signal);
        Ok(Stop { signals: [interrupt?, terminate?, hangup?] })
    }

    async fn requested(&mut self) {
        let [interrupt, terminate, hangup] = &mut self.signals;
        tokio::select! {
            _ = interrupt.recv() => {}
            _ = terminate.recv() => {}
            _ = hangup.recv() => {}
        }
    }
}
