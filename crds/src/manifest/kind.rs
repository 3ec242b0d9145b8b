//! The kind of a document: a share, a misspelled share, or an object of another API.

use serde_json::Value;

use crate::refusal::{Refusal, nearest};
use crate::schema::{API_VERSION, GROUP, KIND};

/// The kind of a document.
pub(super) enum Kind {
    Share,
    Foreign(String),
    Wrong(Refusal),
}

/// Classifies a document by `apiVersion` and `kind`.
pub(super) fn classify(value: &Value) -> Kind {
    if !value.is_object() {
        return Kind::Wrong(Refusal::new(
            "",
            format!("is not a mapping; a share starts with apiVersion: {API_VERSION}"),
        ));
    }
    let text = |field: &str| value[field].as_str().unwrap_or_default();
    match (text("apiVersion"), text("kind")) {
        (API_VERSION, KIND) => Kind::Share,
        ("", _) => Kind::Wrong(Refusal::new("apiVersion", format!("is missing; write {API_VERSION}"))),
        (_, "") => Kind::Wrong(Refusal::new("kind", format!("is missing; write {KIND}"))),
        ("v1", "List") => {
            Kind::Wrong(Refusal::new("kind", "List is not supported; separate its items with lines of ---"))
        }
        (version, kind) => classify_other(version, kind),
    }
}

/// A misspelled share, or an object of another API.
fn classify_other(version: &str, kind: &str) -> Kind {
    let group = version.split('/').next().unwrap_or_default();
    let ours = group == GROUP || nearest(group, [GROUP]).is_some();
    if kind != KIND && ours {
        let hint = nearest(kind, [KIND]).map_or("the known kind is", |_| "did you mean");
        return Kind::Wrong(Refusal::new("kind", format!("{kind:?} is not a kind of {GROUP}; {hint} {KIND}")));
    }
    if kind == KIND || ours || nearest(kind, [KIND]).is_some() {
        return Kind::Wrong(Refusal::new("apiVersion", format!("{version:?} is unknown; write {API_VERSION}")));
    }
    Kind::Foreign(format!("{version} {kind}"))
}
