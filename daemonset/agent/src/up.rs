//! `virtiofs-agent up`: agent and broker together, for a person at a shell.

use std::time::Duration;

use anyhow::Context;
use tokio::runtime::Builder;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;

use crate::announce::{self, Audience};
use crate::args::UpArgs;
use crate::broker::process::{BrokerCommand, find, supervise};
use crate::logging::LogChoice;
use crate::output::tell;
use crate::serve;

/// How long threads that wait for a source that hangs are waited for at the end.
pub(crate) const LEAVE_BEHIND_AFTER: Duration = Duration::from_millis(200);

/// Serves until a signal. One thread runs everything that does not block: the broker's parent-death signal is
/// bound to the thread that started it, and this one lives as long as the program.
pub(crate) fn up(args: UpArgs, log: LogChoice) -> anyhow::Result<()> {
    let runtime = Builder::new_current_thread().enable_all().build().context("cannot start")?;
    let result = runtime.block_on(serve(args, log));
    runtime.shutdown_timeout(LEAVE_BEHIND_AFTER);
    result
}

async fn serve(args: UpArgs, log: LogChoice) -> anyhow::Result<()> {
    let mut stop = Stop::listen().context("cannot listen for signals")?;
    let program = find(args.broker, &std::env::var("PATH").unwrap_or_default())?;
    let serving = serve::start(&args.serve).await?;
    tell(&format!("serving the shares of {}; Ctrl-C ends it\n", serving.shares_dir.display()));

    let (end, ending) = watch::channel(false);
    let command = BrokerCommand { program, runtime_dir: serving.runtime_dir.root().to_path_buf(), log };
    let mut broker = tokio::spawn(supervise(command, ending));
    let outcome = tokio::select! {
        () = stop.requested() => None,
        () = announce::follow(serving.turns.clone(), Audience::Person) => None,
        outcome = &mut broker => Some(outcome),
    };
    let outcome = match outcome {
        Some(outcome) => outcome,
        None => {
            tell("ending\n");
            end.send_replace(true);
            broker.await
        }
    };
    serving.runtime_dir.clear(serving.turns.borrow().report.shares.iter().map(|share| share.name.clone()));
    Ok(outcome.context("the broker is no longer looked after")??)
}

/// The signals that end the program in good order.
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
