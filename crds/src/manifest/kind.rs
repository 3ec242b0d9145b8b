//! Whose document it is: ours, ours but misspelt, or someone else's.

use serde_json::Value;

use crate::refusal::{Refusal, nearest};
use crate::schema::{API_VERSION, GROUP, KIND};

/// Whose document it is.
pub(super) enum Kind {
    Share,
    Foreign(String),
    Wrong(Refusal),
}

/// Looks at `apiVersion` and `kind`.
pub(super) fn classify(value: &Value) -> Kind {
    if !value.is_object() {
        return Kind::Wrong(Refusal::new("", format!("is no mapping; a share begins with apiVersion: {API_VERSION}")));
    }
    let text = |field: &str| value[field].as_str().unwrap_or_default();
    match (text("apiVersion"), text("kind")) {
        (API_VERSION, KIND) => Kind::Share,
        ("", _) => Kind::Wrong(Refusal::new("apiVersion", format!("is missing; write {API_VERSION}"))),
        (_, "") => Kind::Wrong(Refusal::new("kind", format!("is missing; write {KIND}"))),
        ("v1", "List") => Kind::Wrong(Refusal::new("kind", "a List is not read; separate its items by a line of ---")),
        (version, kind) => classify_other(version, kind),
    }
}

/// Ours but misspelt, or someone else's?
fn classify_other(version: &str, kind: &str) -> Kind {
    let group = version.split('/').next().unwrap_or_default();
    let ours = group == GROUP || nearest(group, [GROUP]).is_some();
    if kind != KIND && ours {
        let hint = nearest(kind, [KIND]).map_or("known is", |_| "did you mean");
        return Kind::Wrong(Refusal::new("kind", format!("{kind:?} is not a kind of {GROUP}; {hint} {KIND}")));
    }
    if kind == KIND || ours || nearest(kind, [KIND]).is_some() {
        return Kind::Wrong(Refusal::new("apiVersion", format!("{version:?} is not known; write {API_VERSION}")));
    }
    Kind::Foreign(format!("{version} {kind}"))
}
