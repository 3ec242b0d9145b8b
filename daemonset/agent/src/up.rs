//! `virtiofs-agent up`: agent and broker together, for a person at a shell.

use anyhow::Context;
use tokio::runtime::Builder;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;

use crate::agent::{self, SHUTDOWN_WITHIN};
use crate::announce::{self, Output, print_line};
use crate::args::UpArgs;
use crate::broker::process::{BrokerCommand, find, supervise};
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
    let program = find(args.broker, &std::env::var("PATH").unwrap_or_default())?;
    let agent = agent::start_directory(&args.serve).await?;
    let (runtime_dir, passes) = (&agent.running.runtime_dir, &agent.running.passes);
    print_line(&format!("serving the shares of {}; Ctrl-C ends it", agent.shares_dir.display()));

    let (end, ending) = watch::channel(false);
    let command = BrokerCommand { program, runtime_dir: runtime_dir.root().to_path_buf(), log };
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
            end.send_replace(true);
            broker.await
        }
    };
    runtime_dir.clear(passes.borrow().report.shares.iter().map(|share| share.name.clone()));
    Ok(outcome.context("the broker is no longer supervised")??)
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
