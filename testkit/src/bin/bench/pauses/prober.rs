//! A guest that sends requests continuously, and the longest time that it waited.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use testkit::fuse::call::{Call, CallError};
use testkit::fuse::client::Fuse;
use testkit::fuse::wire::{AttrOut, GetattrIn, Opcode};
use zerocopy::IntoBytes;

use super::priority::set_real_time;

/// Interval at which it is checked whether requests are answered again.
const POLL_INTERVAL: Duration = Duration::from_millis(1);
/// Time after which requests count as no longer answered.
const TIMEOUT: Duration = Duration::from_secs(30);

#[derive(Debug, Default)]
struct Shared {
    stop: AtomicBool,
    answered: AtomicU64,
    /// Nanoseconds of the slowest request since this was last set to 0.
    slowest: AtomicU64,
    /// Nanoseconds between the last reply of one configuration and the first reply of another.
    change: AtomicU64,
}

/// Sends GETATTR for random nodes, one request at a time, in a thread of its own.
#[derive(Debug)]
pub(crate) struct Prober {
    shared: Arc<Shared>,
    thread: JoinHandle<anyhow::Result<()>>,
}

impl Prober {
    /// With `real_time` it has a real-time priority.
    pub(crate) fn start(fuse: Fuse, nodes: Vec<u64>, real_time: bool) -> std::io::Result<Self> {
        let shared = Arc::<Shared>::default();
        let of_thread = Arc::clone(&shared);
        let work = move || {
            set_real_time(real_time).context("setting a real-time priority")?;
            Ok(probe(&fuse, &nodes, &of_thread)?)
        };
        let thread = std::thread::Builder::new().name("prober".into()).spawn(work)?;
        Ok(Self { shared, thread })
    }

    /// Resets the slowest request, including the one in flight.
    pub(crate) fn forget(&self) -> anyhow::Result<()> {
        self.check_continues()?;
        self.shared.slowest.store(0, Ordering::Relaxed);
        self.shared.change.store(0, Ordering::Relaxed);
        Ok(())
    }

    /// The pause of the last change of configuration: from the last reply of the old engine to the first reply of the
    /// new one.
    pub(crate) fn change(&self) -> anyhow::Result<Duration> {
        self.check_continues()?;
        match self.shared.change.load(Ordering::Relaxed) {
            0 => bail!("the guest has not seen the new configuration"),
            nanoseconds => Ok(Duration::from_nanos(nanoseconds)),
        }
    }

    /// The slowest request since then, including the one in flight.
    pub(crate) fn slowest(&self) -> anyhow::Result<Duration> {
        self.check_continues()?;
        Ok(Duration::from_nanos(self.shared.slowest.load(Ordering::Relaxed)))
    }

    /// Waits until the request in flight and another one are answered.
    fn check_continues(&self) -> anyhow::Result<()> {
        let answered = || self.shared.answered.load(Ordering::Relaxed);
        let (target, begin) = (answered() + 2, Instant::now());
        while answered() < target {
            if self.thread.is_finished() || begin.elapsed() > TIMEOUT {
                bail!("the guest's requests are no longer answered");
            }
            std::thread::sleep(POLL_INTERVAL);
        }
        Ok(())
    }

    /// Stops the prober. An error if any request failed.
    pub(crate) fn stop(self) -> anyhow::Result<()> {
        self.shared.stop.store(true, Ordering::Relaxed);
        match self.thread.join() {
            Ok(result) => result.context("a request of the prober"),
            Err(_) => bail!("the prober panicked"),
        }
    }
}

fn probe(fuse: &Fuse, nodes: &[u64], shared: &Shared) -> Result<(), CallError> {
    let mut random = ChaCha8Rng::seed_from_u64(nodes.len() as u64);
    let (mut answered, mut lifetime) = (Instant::now(), None);
    while !shared.stop.load(Ordering::Relaxed) {
        let node = nodes[random.random_range(0..nodes.len())];
        let begin = Instant::now();
        let granted = attribute_lifetime(fuse, node)?;
        let now = Instant::now();
        if lifetime.replace(granted).is_some_and(|before| before != granted) {
            shared.change.store((now - answered).as_nanos() as u64, Ordering::Relaxed);
        }
        answered = now;
        shared.slowest.fetch_max((now - begin).as_nanos() as u64, Ordering::Relaxed);
        shared.answered.fetch_add(1, Ordering::Relaxed);
    }
    Ok(())
}

/// GETATTR. The attribute timeout in the reply identifies the configuration.
fn attribute_lifetime(fuse: &Fuse, node: u64) -> Result<u64, CallError> {
    let body = GetattrIn::default();
    let arguments = [body.as_bytes()];
    let reply = fuse.call(&Call::new(Opcode::Getattr, node, &arguments).expecting::<AttrOut>())?;
    Ok(reply.body::<AttrOut>()?.attr_valid)
}
