//! The project on a host like those of its users: Debian with systemd as a VM, shared mounts, version 2 of control
//! groups, AppArmor and Yama. The tests run the commands of the README and the manual.
//!
//! Arguments select tests by parts of their names.

mod facts;
mod mounts;
mod packages;
mod services;
mod up;
mod world;

use std::process::ExitCode;

use e2e::suite::{self, Test};

use crate::world::World;

const TESTS: &[Test<World>] = &[
    ("the_host_is_what_users_have", facts::the_host_is_what_users_have),
    ("the_readme_serves_a_share_as_root", up::the_readme_serves_a_share_as_root),
    ("an_ordinary_user_serves_a_share", up::an_ordinary_user_serves_a_share),
    ("limits_of_up_need_a_delegated_group", up::limits_of_up_need_a_delegated_group),
    ("services_serve_shares_within_limits", services::services_serve_shares_within_limits),
    ("the_agent_restarts_under_a_guest", services::the_agent_restarts_under_a_guest),
    ("a_broker_that_was_killed_starts_again", services::a_broker_that_was_killed_starts_again),
    ("a_support_bundle_explains_the_host", services::a_support_bundle_explains_the_host),
    ("mounts_of_the_host_reach_a_guest", mounts::mounts_of_the_host_reach_a_guest),
    ("a_package_is_upgraded_under_a_guest", packages::a_package_is_upgraded_under_a_guest),
    ("an_upgrade_without_a_keeper_ends_no_session", packages::an_upgrade_without_a_keeper_ends_no_session),
];

fn main() -> ExitCode {
    match suite::run(TESTS) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            println!("{error:?}");
            ExitCode::FAILURE
        }
    }
}
