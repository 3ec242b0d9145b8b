//! Workloads against a model: scripted or grown from a seed, from one guest or several on one
//! share, with every error and every wrong byte counted.
//!
//! A workload has lanes. Each has a directory, a model and a seed of its own and runs in a thread
//! of its own, so that what a lane does depends on its seed alone, however the threads interleave:
//! a failure is repeated by running the workload again from the same seed.

mod data;
mod execute;
mod lane;
mod listing;
mod names;
pub mod op;
mod plan;
pub mod report;
mod shared;
mod verify;
mod view;

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

pub use lane::{Features, Lane};
pub use op::Op;
pub use report::Report;
pub use shared::SharedPart;

use crate::fuse::client::Fuse;

/// What kind of workload.
#[derive(Debug, Clone, Default)]
pub struct Config {
    /// All randomness grows from this.
    pub seed: u64,
    /// Lanes in each guest.
    pub lanes: usize,
    /// What lanes may use.
    pub features: Features,
    /// What all lanes read; it must exist on the share ([`SharedPart::create`]).
    pub shared: Option<Arc<SharedPart>>,
    /// The share's directory on the host, to compare with at the end.
    pub host: Option<PathBuf>,
    /// A directory for a file per lane with each step, written before it is done.
    pub trace: Option<PathBuf>,
}

impl Config {
    /// One lane in each guest.
    pub fn new(seed: u64) -> Self {
        Self { seed, lanes: 1, ..Self::default() }
    }

    /// With so many lanes in each guest.
    pub fn lanes(mut self, lanes: usize) -> Self {
        self.lanes = lanes;
        self
    }

    /// With this directory on the host to compare with.
    pub fn host(mut self, share: impl Into<PathBuf>) -> Self {
        self.host = Some(share.into());
        self
    }

    /// With each step written to a file per lane in this directory.
    pub fn trace(mut self, directory: impl Into<PathBuf>) -> Self {
        self.trace = Some(directory.into());
        self
    }

    /// With a part that all lanes read.
    pub fn shared(mut self, part: SharedPart) -> Self {
        self.shared = Some(Arc::new(part));
        self
    }
}

/// When lanes stop: at the first of what is given.
#[derive(Debug, Clone, Copy, Default)]
pub struct Limit<'a> {
    /// Steps of each lane.
    pub steps: Option<u64>,
    /// A point in time.
    pub deadline: Option<Instant>,
    /// Somebody else's wish.
    pub stop: Option<&'a AtomicBool>,
}

impl<'a> Limit<'a> {
    /// After so many steps of each lane.
    pub fn steps(steps: u64) -> Self {
        Self { steps: Some(steps), ..Self::default() }
    }

    /// After some time.
    pub fn within(time: Duration) -> Self {
        Self { deadline: Some(Instant::now() + time), ..Self::default() }
    }

    /// When `stop` becomes true.
    pub fn until(stop: &'a AtomicBool) -> Self {
        Self { stop: Some(stop), ..Self::default() }
    }

    fn reached(&self, steps: u64) -> bool {
        self.steps.is_some_and(|limit| steps >= limit)
            || self.deadline.is_some_and(|deadline| Instant::now() >= deadline)
            || self.stop.is_some_and(|stop| stop.load(Ordering::Relaxed))
    }
}

/// A workload in progress.
#[derive(Debug)]
pub struct Workload {
    config: Config,
    lanes: Vec<(usize, Lane)>,
}

impl Workload {
    /// Makes the lanes' directories, in each guest its own. What goes wrong is in the report.
    pub fn start(config: Config, guests: &[&Fuse]) -> Self {
        let mut lanes = Vec::new();
        for (guest, fuse) in guests.iter().enumerate() {
            for lane in 0..config.lanes.max(1) {
                let name = format!("lane-{guest}-{lane}");
                let seed = lane_seed(config.seed, guest, lane);
                let shared = config.shared.clone();
                let trace = config.trace.as_ref().map(|directory| directory.join(&name).with_extension("steps"));
                let mut lane = Lane::new(name, seed, config.features, fuse, shared);
                lane.trace_to(trace.as_deref());
                lanes.push((guest, lane));
            }
        }
        Self { config, lanes }
    }

    /// Runs all lanes, each in a thread, until the limit is reached. May be called again: lanes go
    /// on where they were.
    pub fn run(&mut self, limit: Limit<'_>) {
        self.in_parallel(|lane| {
            let mut steps = 0;
            while !lane.is_stopped() && !limit.reached(steps) {
                lane.run_random();
                steps += 1;
            }
        });
    }

    /// Runs the same script in all lanes.
    pub fn run_script(&mut self, script: &[Op]) {
        self.in_parallel(|lane| {
            for op in script {
                if lane.is_stopped() {
                    return;
                }
                lane.run(op);
            }
        });
    }

    /// A guest was rebooted and mounted again: what it held is gone.
    pub fn remount(&mut self, guest: usize) {
        for (_, lane) in self.lanes.iter_mut().filter(|(of, _)| *of == guest) {
            lane.remount();
        }
    }

    /// What was found so far.
    pub fn report(&self) -> Report {
        let mut report = Report::default();
        for (_, lane) in &self.lanes {
            report.add(lane.report());
        }
        report
    }

    /// Compares the whole tree, gives everything back and says what was found. Afterwards the
    /// server holds nothing for these guests, and its descriptors may be counted.
    pub fn finish(mut self) -> Report {
        let host = self.config.host.clone();
        self.in_parallel(|lane| {
            // A lane that hung would hang again.
            if lane.is_stopped() {
                return;
            }
            lane.verify_in_guest();
            if let Some(share) = &host {
                lane.verify_on_host(share);
            }
            lane.release_all();
        });
        self.report()
    }

    fn in_parallel(&mut self, work: impl Fn(&mut Lane) + Sync) {
        std::thread::scope(|threads| {
            for (_, lane) in &mut self.lanes {
                threads.spawn(|| work(lane));
            }
        });
    }
}

/// Lanes must differ, and the same lane must not.
fn lane_seed(seed: u64, guest: usize, lane: usize) -> u64 {
    let index = (guest as u64) << 32 | lane as u64;
    // The step of SplitMix64: any odd constant with well-mixed bits would do.
    seed.wrapping_add(index.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15))
}
