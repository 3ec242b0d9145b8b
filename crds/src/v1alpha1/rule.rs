//! How a CEL rule is written down here.
//!
//! Rules keep to what both the API server and kube-cel understand: the operators, `has`, `in`, `all`,
//! `filter`, `size`, `matches`, `startsWith`, `endsWith`, `contains` and `duration`.

use kube::core::{Message, Rule};

/// What must hold, and what is said where it does not: a CEL expression that makes a text, so that it can
/// repeat the value. The text goes on where the path of the field ended: value, what is wrong, what is right.
pub(crate) fn rule(holds: impl Into<String>, says: impl Into<String>) -> Rule {
    Rule::new(holds).message(Message::Expression(says.into()))
}

/// The same for the field at `path` below the node that the rule stands on.
pub(crate) fn rule_on(path: &str, holds: impl Into<String>, says: impl Into<String>) -> Rule {
    rule(holds, says).field_path(path)
}
