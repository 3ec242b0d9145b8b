//! Workloads against a model: scripted or random, from one guest or several on one share. Counts every error and every
//! wrong byte.
//!
//! A workload has lanes. Each lane has its own directory, model, seed and thread, so that its steps depend on its seed
//! only, however the threads interleave. Running the workload again with the same seed reproduces a failure.

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

/// Configuration of a workload.
#[derive(Debug, Clone, Default)]
pub struct Config {
    /// Seed of all randomness.
    pub seed: u64,
    /// Number of lanes in each guest.
    pub lanes: usize,
    /// Features that lanes may use.
    pub features: Features,
    /// Files that all lanes read; they must exist on the share ([`SharedPart::create`]).
    pub shared: Option<Arc<SharedPart>>,
    /// The share's directory on the host, for the comparison at the end.
    pub host: Option<PathBuf>,
    /// Directory for one file per lane to which each step is written before it runs.
    pub trace: Option<PathBuf>,
}

impl Config {
    /// One lane in each guest.
    pub fn new(seed: u64) -> Self {
        Self { seed, lanes: 1, ..Self::default() }
    }

    /// Sets the number of lanes in each guest.
    pub fn lanes(mut self, lanes: usize) -> Self {
        self.lanes = lanes;
        self
    }

    /// Sets the directory on the host for the comparison.
    pub fn host(mut self, share: impl Into<PathBuf>) -> Self {
        self.host = Some(share.into());
        self
    }

    /// Writes each step to a file per lane in this directory.
    pub fn trace(mut self, directory: impl Into<PathBuf>) -> Self {
        self.trace = Some(directory.into());
        self
    }

    /// Sets the files that all lanes read.
    pub fn shared(mut self, part: SharedPart) -> Self {
        self.shared = Some(Arc::new(part));
        self
    }
}

/// When lanes stop: as soon as one of the limits is reached.
#[derive(Debug, Clone, Copy, Default)]
pub struct Limit<'a> {
    /// Number of steps of each lane.
    pub steps: Option<u64>,
    /// A point in time.
    pub deadline: Option<Instant>,
    /// Set by another thread to stop the lanes.
    pub stop: Option<&'a AtomicBool>,
}

impl<'a> Limit<'a> {
    /// Stops after this number of steps of each lane.
    pub fn steps(steps: u64) -> Self {
        Self { steps: Some(steps), ..Self::default() }
    }

    /// Stops after this time.
    pub fn within(time: Duration) -> Self {
        Self { deadline: Some(Instant::now() + time), ..Self::default() }
    }

    /// Stops when `stop` becomes true.
    pub fn until(stop: &'a AtomicBool) -> Self {
        Self { stop: Some(stop), ..Self::default() }
    }

    fn reached(&self, steps: u64) -> bool {
        self.steps.is_some_and(|limit| steps >= limit)
            || self.deadline.is_some_and(|deadline| Instant::now() >= deadline)
            || self.stop.is_some_and(|stop| stop.load(Ordering::Relaxed))
    }
}

/// A running workload.
#[derive(Debug)]
pub struct Workload {
    config: Config,
    lanes: Vec<(usize, Lane)>,
}

impl Workload {
    /// Creates the directories of the lanes. Failures are in the report.
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

    /// Runs all lanes, each in a thread, until the limit is reached. Lanes continue where they stopped if it is called
    /// again.
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

    /// Records that a guest was rebooted and mounted again. It then holds no node and no open file.
    pub fn remount(&mut self, guest: usize) {
        for (_, lane) in self.lanes.iter_mut().filter(|(of, _)| *of == guest) {
            lane.remount();
        }
    }

    /// Results so far.
    pub fn report(&self) -> Report {
        let mut report = Report::default();
        for (_, lane) in &self.lanes {
            report.add(lane.report());
        }
        report
    }

    /// Compares the whole tree, releases everything and returns the results. Afterwards the server holds nothing for
    /// these guests, so its descriptors can be counted.
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

/// A different seed for each lane, always the same for one lane.
fn lane_seed(seed: u64, guest: usize, lane: usize) -> u64 {
    let index = (guest as u64) << 32 | lane as u64;
    // The increment of SplitMix64: any odd constant with well-mixed bits works.
    seed.wrapping_add(index.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15))
}
