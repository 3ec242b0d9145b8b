//! YAML, within limits.

use serde_json::Value;

/// Largest number of YAML nodes in a file, with aliases expanded.
const NODES_MAX: usize = 50_000;
/// Largest number of aliases in a file.
const ALIASES_MAX: usize = 1000;
/// Largest depth of a document.
const DEPTH_MAX: usize = 32;

/// The documents of a text, without empty ones.
pub(super) fn documents(text: &str) -> Vec<Result<Value, String>> {
    let mut bytes = text.as_bytes();
    let documents = serde_saphyr::read_with_options::<_, Value>(&mut bytes, options());
    documents.map(|document| document.map_err(|error| message(&error))).collect()
}

/// Limits far above real manifests, which keep hostile ones small.
fn options() -> serde_saphyr::Options {
    serde_saphyr::options! {
        budget: serde_saphyr::budget! {
            max_nodes: NODES_MAX,
            max_events: 4 * NODES_MAX,
            max_aliases: ALIASES_MAX,
            max_anchors: ALIASES_MAX,
            max_depth: DEPTH_MAX,
        },
        alias_limits: serde_saphyr::alias_limits! {
            max_total_replayed_events: NODES_MAX,
        },
        // Go's YAML, through which manifests reach an API server, reads 0660 as octal.
        legacy_octal_numbers: true,
        with_snippet: false,
    }
}

fn message(error: &serde_saphyr::Error) -> String {
    let formatter = serde_saphyr::UserMessageFormatter;
    format!("is not valid YAML: {}", error.render_with_formatter(&formatter))
}
