//! The operator against a real API server: one control plane, one test after the other. The test plays the agents of
//! kwok's nodes, each with a token that was issued for its node; a real agent has tests of its own.
//!
//! Arguments choose tests by parts of their names.

mod agent;
mod chart;
mod crash;
mod deletion;
mod exports;
mod kubelet;
mod monitoring;
mod nodes;
mod permissions;
mod placement;
mod rollouts;
mod schema;
mod uninstall;
mod volumes;
mod world;

use std::process::ExitCode;

use e2e::suite::{self, Test};

use crate::world::World;

const TESTS: &[Test<World>] = &[
    ("the_api_server_accepts_the_chart", chart::the_api_server_accepts_the_chart),
    ("values_that_cannot_be_meant_are_refused", chart::values_that_cannot_be_meant_are_refused),
    ("what_monitors_name_is_there", monitoring::what_monitors_name_is_there),
    ("pods_go_where_their_shares_are", placement::pods_go_where_their_shares_are),
    ("the_chart_stays_while_shares_are_in_use", uninstall::the_chart_stays_while_shares_are_in_use),
    ("the_api_server_accepts_and_refuses_what_check_does", schema::the_api_server_accepts_and_refuses_what_check_does),
    ("what_the_documentation_declares_is_accepted", schema::what_the_documentation_declares_is_accepted),
    ("what_a_share_says_cannot_be_moved", schema::what_a_share_says_cannot_be_moved),
    ("a_share_reaches_its_nodes_and_says_so", exports::a_share_reaches_its_nodes_and_says_so),
    ("nothing_is_written_when_nothing_changes", exports::nothing_is_written_when_nothing_changes),
    ("two_shares_of_one_path_and_long_names", exports::two_shares_of_one_path_and_long_names),
    ("an_export_that_was_tampered_with_is_put_right", exports::an_export_that_was_tampered_with_is_put_right),
    ("an_agent_writes_about_its_own_node_only", permissions::an_agent_writes_about_its_own_node_only),
    ("the_operator_may_do_no_more_than_it_does", permissions::the_operator_may_do_no_more_than_it_does),
    ("labels_that_admit_are_for_those_who_may_share", permissions::labels_that_admit_are_for_those_who_may_share),
    ("a_change_halts_and_resumes", rollouts::a_change_halts_and_resumes),
    ("whom_a_share_admits_holds_at_once", rollouts::whom_a_share_admits_holds_at_once),
    ("a_share_edited_during_a_roll_out_ends_at_the_last_word", rollouts::a_share_edited_during_a_roll_out),
    ("a_node_goes_down_and_comes_back", nodes::a_node_goes_down_and_comes_back),
    ("a_node_is_deleted_and_comes_back", nodes::a_node_is_deleted_and_comes_back),
    ("a_node_loses_its_label", nodes::a_node_loses_its_label),
    ("a_node_is_as_reachable_as_its_agent", nodes::a_node_is_as_reachable_as_its_agent),
    ("a_share_in_use_stays", deletion::a_share_in_use_stays),
    ("a_forced_deletion_waits_for_nobody", deletion::a_forced_deletion_waits_for_nobody),
    ("a_real_agent_serves_reports_changes_and_releases", agent::a_real_agent_serves_reports_changes_and_releases),
    ("a_remedy_is_reported_and_the_share_stays_ready", agent::a_remedy_is_reported_and_the_share_stays_ready),
    ("an_agent_continues_without_an_api_server", agent::an_agent_continues_without_an_api_server),
    ("a_pod_gets_a_share_and_leaves_nothing", volumes::a_pod_gets_a_share_and_leaves_nothing),
    ("a_rejected_pod_and_the_admin_see_the_reason", volumes::a_rejected_pod_and_the_admin_see_the_reason),
    ("volumes_outlast_what_dies", volumes::volumes_outlast_what_dies),
    ("the_driver_stays_registered", volumes::the_driver_stays_registered),
    ("how_long_a_volume_takes", volumes::how_long_a_volume_takes),
    ("csi_sanity_finds_nothing_wrong", volumes::csi_sanity_finds_nothing_wrong),
    ("an_operator_killed_before_any_write_is_replaced", crash::an_operator_killed_before_any_write_is_replaced),
    ("of_two_operators_one_works", crash::of_two_operators_one_works),
    ("the_api_server_goes_away_and_comes_back", crash::the_api_server_goes_away_and_comes_back),
];

fn main() -> ExitCode {
    match suite::run(TESTS) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            println!("the cluster did not start: {error:?}");
            ExitCode::FAILURE
        }
    }
}
