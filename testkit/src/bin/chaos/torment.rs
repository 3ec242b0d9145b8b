//! What happens to the engines.

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::bail;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use testkit::broker::Control;
use virtiofs_contract::control::{EndpointStatus, SessionState};

use crate::arguments::Arguments;

/// How long the broker may take to bring about what was ordered last.
const PATIENCE: Duration = Duration::from_secs(30);

/// What was done.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Done {
    pub(crate) kills: u64,
    pub(crate) recoveries: u64,
    pub(crate) handovers: u64,
}

/// Kills and exchanges until there were enough of both, or until the workload has had enough.
pub(crate) fn torment(
    control: &mut Control,
    share: &str,
    arguments: &Arguments,
    enough: &AtomicBool,
) -> anyhow::Result<Done> {
    let mut random = ChaCha8Rng::seed_from_u64(arguments.seed);
    let (mut done, mut progress) = (Done::default(), Instant::now());
    while !enough.load(Ordering::Relaxed) {
        thread::sleep(random.random_range(arguments.every()));
        let status = control.status_of(share)?;
        if note(&mut done, &status) {
            progress = Instant::now();
        }
        if progress.elapsed() > PATIENCE {
            bail!("nothing happens any more after {done:?}; sessions: {:?}", status.sessions);
        }
        let left = [done.recoveries, done.handovers];
        let [kills, handovers] = [arguments.kills.saturating_sub(left[0]), arguments.handovers.saturating_sub(left[1])];
        if kills + handovers == 0 {
            break;
        }
        if random.random_range(0..kills + handovers) < kills {
            done.kills += u64::from(kill_one(&status, &mut random));
        } else {
            control.exchange(share)?;
        }
    }
    Ok(done)
}

/// Counts what the broker has done; true if that increased.
fn note(done: &mut Done, status: &EndpointStatus) -> bool {
    let exchanges = &status.totals.replacements;
    let before = (done.recoveries, done.handovers);
    (done.recoveries, done.handovers) = (exchanges.recoveries.count, exchanges.hand_overs.count);
    before != (done.recoveries, done.handovers)
}

/// Kills the engine of one session that is served.
fn kill_one(status: &EndpointStatus, random: &mut ChaCha8Rng) -> bool {
    let serving = status.sessions.iter().filter(|session| session.state == SessionState::Serving);
    let engines: Vec<u32> = serving.filter_map(|session| session.engine_pid).collect();
    if engines.is_empty() {
        return false;
    }
    let engine = engines[random.random_range(0..engines.len())];
    // It may have been exchanged meanwhile.
    kill(Pid::from_raw(engine as i32), Signal::SIGKILL).is_ok()
}
