//! The whole project on a real node: control plane, kubelet, containerd, and pods. The test is isolated (its own
//! processes, mounts and network) and therefore needs root.
//!
//! Arguments select tests by parts of their names.

mod complaints;
mod pods;
mod readme;
mod vms;
mod world;

use std::process::ExitCode;

use e2e::isolation;
use e2e::suite::{self, Test};

use crate::world::World;

// The last test uninstalls what all others use.
const TESTS: &[Test<World>] = &[
    ("a_pod_runs_and_is_deleted", pods::a_pod_runs_and_is_deleted),
    ("the_readme_leads_to_a_vm_with_a_share", readme::the_readme_leads_to_a_vm_with_a_share),
    ("a_vm_uses_a_share_and_leaves_nothing_behind", vms::a_vm_uses_a_share_and_leaves_nothing_behind),
    (
        "a_vm_uses_a_directory_of_a_share_by_a_persistent_volume",
        vms::a_vm_uses_a_directory_of_a_share_by_a_persistent_volume,
    ),
    ("the_daemons_are_replaced_under_a_vm", vms::the_daemons_are_replaced_under_a_vm),
    ("a_pod_of_another_namespace_sees_the_reason", vms::a_pod_of_another_namespace_sees_the_reason),
    ("restarts_leave_no_mounts_or_sockets", complaints::restarts_leave_no_mounts_or_sockets),
    ("pods_recover_or_end_after_a_reboot", complaints::pods_recover_or_end_after_a_reboot),
    (
        "the_driver_stays_registered_when_one_of_two_agents_ends",
        complaints::the_driver_stays_registered_when_one_of_two_agents_ends,
    ),
    ("a_vm_that_ends_slowly_ends_without_the_daemons", complaints::a_vm_that_ends_slowly_ends_without_the_daemons),
    ("uninstall_waits_for_users", complaints::uninstall_waits_for_users),
    ("uninstall_leaves_nothing_behind", complaints::uninstall_leaves_nothing_behind),
];

fn main() -> ExitCode {
    isolation::run(|| suite::run(TESTS))
}
