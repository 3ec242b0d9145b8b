//! CEL rules of the schema.
//!
//! Rules use what both the API server and kube-cel implement: the operators, `has`, `in`, `all`, `filter`, `size`,
//! `matches`, `startsWith`, `endsWith`, `contains`, `string`, `duration` and `quantity`.

use kube::core::{Message, Rule};

/// A condition, and the message where it is false: a CEL expression of type string, so that it can repeat the value.
/// The message follows the path of the field: the value, what is wrong with it, and what is right.
pub(crate) fn rule(condition: impl Into<String>, message: impl Into<String>) -> Rule {
    Rule::new(condition).message(Message::Expression(message.into()))
}

/// A rule about the field at `path` below the node that carries the rule.
pub(crate) fn rule_on(path: &str, condition: impl Into<String>, message: impl Into<String>) -> Rule {
    rule(condition, message).field_path(path)
}
