//! The whole of it on a real node: control plane, kubelet, containerd, and pods. The test keeps to itself, with
//! processes, mounts and a network of its own; so it needs root.
//!
//! Arguments choose tests by parts of their names.

mod pods;
mod world;

use std::process::ExitCode;

use e2e::seclusion;
use e2e::suite::{self, Test};

use crate::world::World;

const TESTS: &[Test<World>] = &[("a_pod_runs_and_goes", pods::a_pod_runs_and_goes)];

fn main() -> ExitCode {
    seclusion::run(|| suite::run(TESTS))
}
