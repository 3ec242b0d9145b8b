//! `virtiofs-agent up`: agent and broker together, for a person at a shell.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use tokio::runtime::Builder;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;

use crate::announce::changes;
use crate::args::UpArgs;
use crate::broker::observer::Observer;
use crate::broker::process::{BrokerCommand, find, supervise};
use crate::logging::LogChoice;
use crate::metrics;
use crate::output::print;
use crate::plan::Site;
use crate::published::Published;
use crate::reconcile::{Reconciler, Turn};
use crate::report::Report;
use crate::runtime_dir::RuntimeDir;

/// How long threads that wait for a source that hangs are waited for at the end.
const LEAVE_BEHIND_AFTER: Duration = Duration::from_millis(200);

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
    let shares_dir =
        std::fs::canonicalize(&args.shares).with_context(|| format!("--shares {}", args.shares.display()))?;
    let runtime_dir = RuntimeDir::prepare(&args.runtime_dir)?;
    let _only_agent = runtime_dir.lock()?;
    let listener = match args.metrics {
        Some(address) => Some(metrics::bind(address).await?),
        None => None,
    };

    let desired = crate::manifests::follow(&shares_dir)?;
    let observer = Arc::new(Observer::new(runtime_dir.broker_socket()));
    let (reports, turns) = watch::channel(Turn::default());
    let site = Site { runtime_dir: runtime_dir.clone(), manifests: Some(shares_dir.clone()) };
    tokio::spawn(Reconciler { site, desired, reports, observer: observer.clone() }.run());
    if let Some(listener) = listener {
        tokio::spawn(metrics::serve(listener, metrics::Serving { observer, turns: turns.clone() }));
    }
    print(&format!("serving the shares of {}; Ctrl-C ends it\n", shares_dir.display()))?;

    let (end, ending) = watch::channel(false);
    let command = BrokerCommand { program, runtime_dir: runtime_dir.root().to_path_buf(), log };
    let mut broker = tokio::spawn(supervise(command, ending));
    let told = tell(turns.clone(), &runtime_dir, &shares_dir);
    let outcome = tokio::select! {
        () = stop.requested() => None,
        () = told => None,
        outcome = &mut broker => Some(outcome),
    };
    let outcome = match outcome {
        Some(outcome) => outcome,
        None => {
            print("ending\n")?;
            end.send_replace(true);
            broker.await
        }
    };
    runtime_dir.clear(turns.borrow().report.shares.iter().map(|share| share.name.clone()));
    Ok(outcome.context("the broker is no longer looked after")??)
}

/// Tells everyone who wants to know what each turn has changed. Ends with the loop that turns.
async fn tell(mut turns: watch::Receiver<Turn>, runtime_dir: &RuntimeDir, shares_dir: &Path) {
    let mut known = Report::default();
    while turns.changed().await.is_ok() {
        let report = turns.borrow_and_update().report.clone();
        for change in changes(&known, &report) {
            change.log();
            if let Err(error) = print(&format!("{}\n", change.text())) {
                tracing::warn!(%error, "cannot write to standard output");
            }
        }
        if report != known {
            let published = Published::new(Some(shares_dir.to_path_buf()), report.clone());
            if let Err(error) = published.write(&runtime_dir.published()) {
                tracing::warn!(%error, path = %runtime_dir.published().display(), "cannot publish");
            }
            known = report;
        }
    }
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
