//! Carries out the planned disruptions.

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use testkit::broker::Control;
use virtiofs_contract::control::{Endpoint, EndpointStatus};

use crate::daemons::Daemons;
use crate::plan::{Done, Event, Step};

/// Time limit for a guest's request to be answered after a disruption.
const TIMEOUT: Duration = Duration::from_secs(30);
const POLL_INTERVAL: Duration = Duration::from_millis(10);

/// Carries out a plan until its end, or until `enough` is true.
pub(crate) fn disrupt(
    daemons: &mut Daemons,
    endpoint: &Endpoint,
    plan: &[Step],
    enough: &AtomicBool,
) -> anyhow::Result<Done> {
    let mut done = Done::new();
    let mut target = Target { control: daemons.control()?, endpoint: endpoint.clone(), requests: 0 };
    for (number, step) in plan.iter().enumerate() {
        if enough.load(Ordering::Relaxed) {
            break;
        }
        thread::sleep(step.pause);
        let cause = || format!("event {number}, {step:?}");
        target.disrupt(daemons, step).with_context(cause)?;
        target.await_requests(enough).with_context(cause)?;
        daemons.reap().with_context(cause)?;
        *done.entry(step.event).or_default() += 1;
    }
    Ok(done)
}

/// A share, its sessions, and the connection to their broker.
struct Target {
    control: Control,
    endpoint: Endpoint,
    /// Number of requests that its guests have sent.
    requests: u64,
}

impl Target {
    fn status(&mut self) -> anyhow::Result<EndpointStatus> {
        Ok(self.control.status_of(&self.endpoint.name)?)
    }

    fn disrupt(&mut self, daemons: &mut Daemons, step: &Step) -> anyhow::Result<()> {
        let engine = self.engine(step.choice)?;
        match step.event {
            Event::EngineKill => kill_process(engine),
            Event::HandOver => self.control.replace_engines(&self.endpoint.name)?,
            Event::Reconfiguration => {
                self.endpoint.engine.max_inodes = 100_000 + step.choice as u64;
                self.control.apply(&self.endpoint)?;
            }
            Event::BrokerKill => {
                daemons.kill_broker()?;
                self.control = daemons.start_broker()?;
            }
            Event::BrokerStop => {
                daemons.stop_broker()?;
                self.control = daemons.start_broker()?;
            }
            Event::BrokerKillInHandOver => {
                self.control.replace_engines(&self.endpoint.name)?;
                thread::sleep(step.between);
                daemons.kill_broker()?;
                self.control = daemons.start_broker()?;
            }
            Event::BrokerAndEngineKill => {
                kill_process(engine);
                thread::sleep(step.between / 8);
                daemons.kill_broker()?;
                self.control = daemons.start_broker()?;
            }
            Event::KeeperKill => daemons.replace_keeper(|| {})?,
            Event::KeeperAndEngineKill => daemons.replace_keeper(|| kill_process(engine))?,
        }
        Ok(())
    }

    /// The engine of one session, if it has one.
    fn engine(&mut self, choice: usize) -> anyhow::Result<Option<u32>> {
        let engines: Vec<u32> = self.status()?.sessions.iter().filter_map(|session| session.engine_pid).collect();
        Ok(engines.get(choice % engines.len().max(1)).copied())
    }

    /// Waits until requests of guests are answered. Counts must not decrease, and no session may be lost.
    fn await_requests(&mut self, enough: &AtomicBool) -> anyhow::Result<()> {
        let begin = Instant::now();
        let mut first = None;
        loop {
            let status = self.status()?;
            let requests = status.totals.requests();
            let first = *first.get_or_insert(requests);
            if requests < self.requests || status.sessions_lost > 0 {
                bail!(
                    "{} requests after {}, {} sessions lost; {:?}",
                    requests,
                    self.requests,
                    status.sessions_lost,
                    status.sessions
                );
            }
            if requests > first || enough.load(Ordering::Relaxed) {
                self.requests = requests;
                return Ok(());
            }
            if begin.elapsed() > TIMEOUT {
                bail!("no request answered for {TIMEOUT:?}; sessions: {:?}", status.sessions);
            }
            thread::sleep(POLL_INTERVAL);
        }
    }
}

/// Kills a process, which may have ended meanwhile.
fn kill_process(pid: Option<u32>) {
    let _ = pid.map(|pid| kill(Pid::from_raw(pid.cast_signed()), Signal::SIGKILL));
}
