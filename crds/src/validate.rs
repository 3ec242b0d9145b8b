//! The validation that the API server does when an object is created or updated, in this process.
//!
//! In its order: unknown fields are rejected (as `kubectl` requests), nulls of fields that are not nullable are dropped,
//! defaults are set, the structure is checked, and if it is valid, the rules.

use std::cell::LazyCell;
use std::thread::LocalKey;

use crate::v1alpha1::{VirtiofsExport, VirtiofsShare};
use kube_cel::{CompiledSchema, Validator, compile_schema};
use serde_json::Value;

use crate::refusal::Refusal;
use crate::schema;
use crate::share_name::ShareName;
use crate::structural;

thread_local! {
    /// The rules, compiled once per thread: compiled programs cannot be shared between threads.
    static RULES: LazyCell<(Validator, CompiledSchema)> =
        LazyCell::new(|| (Validator::new(), compile_schema(schema::object())));
    static EXPORT_RULES: LazyCell<(Validator, CompiledSchema)> =
        LazyCell::new(|| (Validator::new(), compile_schema(schema::export_object())));
}

/// The document with defaults, or every reason why it is rejected.
///
/// With `old`, the object that it replaces, the rules about changes apply too.
pub fn validate(document: &Value, old: Option<&Value>) -> Result<Value, Vec<Refusal>> {
    let mut document = document.clone();
    // The API server ignores the status in a write of the spec.
    if let Some(object) = document.as_object_mut() {
        object.remove("status");
    }
    structural::drop_nulls(schema::object(), &mut document);
    let document = kube_cel::apply_defaults(schema::object(), &document);
    let mut refusals = structural::check(schema::object(), &document);
    refusals.extend(check_metadata(&document["metadata"]));
    if refusals.is_empty() {
        refusals = rules_broken(&RULES, &document, old);
    }
    if refusals.is_empty() { Ok(document) } else { Err(refusals) }
}

/// The same validation of an export, whose metadata the operator writes.
pub fn validate_export(export: &VirtiofsExport) -> Result<(), Vec<Refusal>> {
    let export = VirtiofsExport { status: None, ..export.clone() };
    let document = serde_json::to_value(export).map_err(|e| vec![Refusal::new("", e.to_string())])?;
    let refusals = structural::check(schema::export_object(), &document);
    if !refusals.is_empty() {
        return Err(refusals);
    }
    match rules_broken(&EXPORT_RULES, &document, None) {
        refusals if refusals.is_empty() => Ok(()),
        refusals => Err(refusals),
    }
}

/// Checks whether `new` can replace `old`: the validation of `new`, and the rules about changes.
pub fn check_change(old: &VirtiofsShare, new: &VirtiofsShare) -> Result<(), Vec<Refusal>> {
    let value = |object| serde_json::to_value(object).map_err(|e| vec![Refusal::new("", e.to_string())]);
    validate(&value(new)?, Some(&value(old)?)).map(drop)
}

/// The checks of the API server on `metadata` of a cluster-scoped object.
fn check_metadata(metadata: &Value) -> Vec<Refusal> {
    let mut refusals = Vec::new();
    match metadata["name"].as_str() {
        Some(name) => refusals.extend(ShareName::parse(name).err()),
        None => refusals.push(Refusal::new("metadata.name", "is missing; every share has a name")),
    }
    if let Some(namespace) = metadata["namespace"].as_str() {
        let message = format!("{namespace:?}: a share is cluster-scoped; remove this field");
        refusals.push(Refusal::new("metadata.namespace", message));
    }
    refusals
}

type Rules = LocalKey<LazyCell<(Validator, CompiledSchema)>>;

fn rules_broken(rules: &'static Rules, document: &Value, old: Option<&Value>) -> Vec<Refusal> {
    let result = rules.with(|rules| rules.0.validate_compiled(&rules.1, document, old));
    let errors = result.err().map(kube_cel::ValidationErrors::into_vec).unwrap_or_default();
    errors.into_iter().map(|error| Refusal::new(error.field_path, error.message)).collect()
}
