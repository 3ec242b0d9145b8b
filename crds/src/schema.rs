//! The CustomResourceDefinitions, generated from the types on the wire.

use std::sync::LazyLock;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::CustomResourceExt;
use schemars::JsonSchema;
use schemars::generate::SchemaSettings;
use serde_json::{Map, Value, json};

use crate::v1alpha1::{VirtiofsExport, VirtiofsShare};

/// `apiVersion` of the API.
pub const API_VERSION: &str = "virtiofs.dev/v1alpha1";
/// Its group.
pub const GROUP: &str = "virtiofs.dev";
/// The kind of a share.
pub const KIND: &str = "VirtiofsShare";

static DEFINITION: LazyLock<Value> = LazyLock::new(|| tidied(json!(VirtiofsShare::crd())));

static EXPORT_DEFINITION: LazyLock<Value> = LazyLock::new(|| tidied(json!(VirtiofsExport::crd())));

static OBJECT: LazyLock<Value> = LazyLock::new(|| whole_object(&DEFINITION));

static EXPORT_OBJECT: LazyLock<Value> = LazyLock::new(|| whole_object(&EXPORT_DEFINITION));

fn whole_object(definition: &Value) -> Value {
    let mut schema = definition["spec"]["versions"][0]["schema"]["openAPIV3Schema"].clone();
    for field in ["apiVersion", "kind"] {
        schema["properties"][field] = json!({"type": "string"});
    }
    schema["properties"]["metadata"] = metadata();
    schema
}

/// The CustomResourceDefinition of `VirtiofsShare`.
pub fn definition() -> &'static Value {
    &DEFINITION
}

/// The CustomResourceDefinition of `VirtiofsExport`.
pub fn export_definition() -> &'static Value {
    &EXPORT_DEFINITION
}

/// The schema of a whole `VirtiofsShare` object: that of the definition, with the fields that the API server adds to
/// every object.
pub fn object() -> &'static Value {
    &OBJECT
}

/// The same of a whole `VirtiofsExport` object.
pub fn export_object() -> &'static Value {
    &EXPORT_OBJECT
}

fn tidied(mut definition: Value) -> Value {
    for version in array_mut(&mut definition["spec"]["versions"]) {
        tidy(&mut version["schema"]["openAPIV3Schema"]);
    }
    definition
}

fn metadata() -> Value {
    let settings = SchemaSettings::openapi3().with(|s| s.inline_subschemas = true);
    let mut schema = json!(ObjectMeta::json_schema(&mut settings.into_generator()));
    tidy(&mut schema);
    schema
}

/// Converts the output of schemars to a structural schema of Kubernetes.
fn tidy(schema: &mut Value) {
    if let Some(node) = schema.as_object_mut() {
        // Kubernetes treats null as absent where a field is not nullable; with `nullable`, a null would make `has()` true.
        node.remove("nullable");
        node.remove("title");
        unwrap_lines(node);
        signed_format(node);
        for bound in ["minimum", "maximum"] {
            whole(node.get_mut(bound));
        }
    }
    for child in children_mut(schema) {
        tidy(child);
    }
}

/// Joins the lines of a paragraph; `kubectl explain` wraps them. An empty line separates paragraphs.
fn unwrap_lines(node: &mut Map<String, Value>) {
    if let Some(Value::String(description)) = node.get_mut("description") {
        let paragraphs: Vec<String> = description.split("\n\n").map(|text| text.replace('\n', " ")).collect();
        *description = paragraphs.join("\n\n");
    }
}

/// Kubernetes has signed formats only; the bounds stay.
fn signed_format(node: &mut Map<String, Value>) {
    let (format, maximum) = match node.get("format").and_then(Value::as_str) {
        Some("uint8" | "uint16") => ("int32", Some(u64::from(u16::MAX))),
        Some("uint32") => ("int64", Some(u64::from(u32::MAX))),
        Some("uint64" | "uint") => ("int64", None),
        _ => return,
    };
    node.insert("format".to_owned(), json!(format));
    if let Some(maximum) = maximum {
        node.entry("maximum").or_insert(json!(maximum));
    }
}

/// Writes a bound such as `1.0` as `1`.
fn whole(bound: Option<&mut Value>) {
    if let Some(bound) = bound
        && let Some(number) = bound.as_f64().filter(|number| number.fract() == 0.0)
    {
        *bound = json!(number as i64);
    }
}

/// The schemas directly inside a schema.
fn children_mut(schema: &mut Value) -> Vec<&mut Value> {
    let Some(node) = schema.as_object_mut() else { return Vec::new() };
    let mut children = Vec::new();
    for (keyword, value) in node {
        match keyword.as_str() {
            "properties" => children.extend(value.as_object_mut().into_iter().flat_map(Map::values_mut)),
            "items" | "additionalProperties" => children.push(value),
            _ => {}
        }
    }
    children
}

fn array_mut(value: &mut Value) -> &mut [Value] {
    value.as_array_mut().map_or(&mut [], Vec::as_mut_slice)
}
