//! The operator against a real API server: one control plane, one test after the other. The test acts as the agents of
//! kwok's nodes, each with a token that was issued for its node. Some tests use a real agent.
//!
//! Arguments select tests by parts of their names.

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
    ("invalid_values_are_rejected", chart::invalid_values_are_rejected),
    ("monitors_match_existing_objects", monitoring::monitors_match_existing_objects),
    ("pods_are_scheduled_where_their_shares_are", placement::pods_are_scheduled_where_their_shares_are),
    ("uninstall_fails_while_shares_are_in_use", uninstall::uninstall_fails_while_shares_are_in_use),
    ("the_api_server_validates_like_check", schema::the_api_server_validates_like_check),
    ("documented_manifests_are_accepted", schema::documented_manifests_are_accepted),
    ("sources_and_nodes_are_immutable", schema::sources_and_nodes_are_immutable),
    ("a_share_gets_exports_and_a_status", exports::a_share_gets_exports_and_a_status),
    ("nothing_is_written_when_nothing_changes", exports::nothing_is_written_when_nothing_changes),
    ("two_shares_of_one_path_and_long_names", exports::two_shares_of_one_path_and_long_names),
    ("changes_of_an_export_are_reverted", exports::changes_of_an_export_are_reverted),
    ("foreign_exports_are_deleted", exports::foreign_exports_are_deleted),
    ("only_the_operator_writes_exports", permissions::only_the_operator_writes_exports),
    ("metrics_are_served_to_authorized_clients", monitoring::metrics_are_served_to_authorized_clients),
    ("an_agent_writes_exports_of_its_own_node_only", permissions::an_agent_writes_exports_of_its_own_node_only),
    ("a_namespace_admin_reaches_no_share", permissions::a_namespace_admin_reaches_no_share),
    ("the_operator_has_minimal_permissions", permissions::the_operator_has_minimal_permissions),
    ("only_share_editors_set_consumer_labels", permissions::only_share_editors_set_consumer_labels),
    ("a_rollout_halts_and_continues", rollouts::a_rollout_halts_and_continues),
    ("consumers_change_at_once", rollouts::consumers_change_at_once),
    (
        "an_edit_during_a_rollout_goes_to_the_last_revision",
        rollouts::an_edit_during_a_rollout_goes_to_the_last_revision,
    ),
    ("a_node_goes_down_and_comes_back", nodes::a_node_goes_down_and_comes_back),
    ("a_node_is_deleted_and_comes_back", nodes::a_node_is_deleted_and_comes_back),
    ("a_node_loses_its_label", nodes::a_node_loses_its_label),
    ("a_node_is_as_reachable_as_its_agent", nodes::a_node_is_as_reachable_as_its_agent),
    ("a_share_in_use_is_kept", deletion::a_share_in_use_is_kept),
    ("a_forced_deletion_does_not_wait", deletion::a_forced_deletion_does_not_wait),
    ("a_real_agent_serves_and_releases_a_share", agent::a_real_agent_serves_and_releases_a_share),
    ("a_remedy_is_reported_and_the_share_stays_ready", agent::a_remedy_is_reported_and_the_share_stays_ready),
    ("an_agent_serves_without_an_api_server", agent::an_agent_serves_without_an_api_server),
    ("a_pod_gets_a_share_and_leaves_nothing", volumes::a_pod_gets_a_share_and_leaves_nothing),
    ("denied_pods_get_a_reason_and_the_share_an_event", volumes::denied_pods_get_a_reason_and_the_share_an_event),
    ("volumes_survive_crashes", volumes::volumes_survive_crashes),
    ("the_driver_stays_registered", volumes::the_driver_stays_registered),
    ("volumes_are_published_quickly", volumes::volumes_are_published_quickly),
    ("csi_sanity_passes", volumes::csi_sanity_passes),
    ("an_operator_killed_before_any_write_is_replaced", crash::an_operator_killed_before_any_write_is_replaced),
    ("one_of_two_operators_leads", crash::one_of_two_operators_leads),
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
