//! What an API server demands of the definition before it looks at any object.

use kube_cel::{compile_schema, estimate_rule_cost};
use serde_json::Value;
use virtiofs_crds::schema;

/// What our own evaluation of a schema knows; a keyword outside it would not be enforced on a file.
const KEYWORDS: &[&str] = &[
    "additionalProperties",
    "default",
    "description",
    "enum",
    "format",
    "items",
    "maxItems",
    "maxLength",
    "maxProperties",
    "maximum",
    "minItems",
    "minLength",
    "minimum",
    "pattern",
    "properties",
    "required",
    "type",
    "x-kubernetes-int-or-string",
    "x-kubernetes-list-map-keys",
    "x-kubernetes-list-type",
    "x-kubernetes-validations",
];

/// Calls `look` on a schema and all schemas in it, with the path of each.
fn walk(schema: &Value, path: &str, look: &mut impl FnMut(&Value, &str)) {
    look(schema, path);
    for (name, field) in schema["properties"].as_object().into_iter().flatten() {
        walk(field, &format!("{path}.{name}"), look);
    }
    if let Some(items) = schema.get("items") {
        walk(items, &format!("{path}[]"), look);
    }
    if let Some(values) = schema.get("additionalProperties") {
        walk(values, &format!("{path}{{}}"), look);
    }
}

fn version() -> &'static Value {
    &schema::definition()["spec"]["versions"][0]
}

fn spec() -> &'static Value {
    &version()["schema"]["openAPIV3Schema"]["properties"]["spec"]
}

#[test]
fn the_definition_is_what_the_design_names() {
    let definition = schema::definition();
    assert_eq!(definition["metadata"]["name"], "virtiofsshares.virtiofs.dev");
    assert_eq!(definition["spec"]["scope"], "Cluster");
    assert_eq!(definition["spec"]["names"]["kind"], "VirtiofsShare");
    assert_eq!(definition["spec"]["names"]["shortNames"], serde_json::json!(["vfs"]));
    assert_eq!(definition["spec"]["names"]["categories"], serde_json::json!(["virtiofs"]));
    assert_eq!(version()["name"], "v1alpha1");
    assert!(version()["subresources"]["status"].is_object());
}

#[test]
fn no_keyword_goes_unenforced() {
    walk(schema::object(), "", &mut |schema, path| {
        for keyword in schema.as_object().unwrap().keys() {
            assert!(KEYWORDS.contains(&keyword.as_str()), "{path}: {keyword}");
        }
    });
}

#[test]
fn every_node_says_its_type_and_every_field_what_it_means() {
    walk(spec(), "spec", &mut |schema, path| {
        assert!(schema.get("type").is_some() || schema["x-kubernetes-int-or-string"] == true, "{path} has no type");
        let inner = path.ends_with("[]") || path.ends_with("{}");
        assert!(inner || schema["description"].is_string(), "{path} has no description");
    });
}

/// The cost of a rule is estimated by the largest value that the schema lets through.
#[test]
fn everything_in_the_spec_is_bounded() {
    walk(spec(), "spec", &mut |schema, path| {
        let bound = match schema["type"].as_str() {
            Some("string") => schema.get("maxLength").or(schema.get("enum")),
            Some("array") => schema.get("maxItems"),
            Some("object") if schema.get("additionalProperties").is_some() => schema.get("maxProperties"),
            Some("integer") => schema.get("maximum"),
            _ => return,
        };
        assert!(bound.is_some(), "{path} has no upper bound");
    });
}

#[test]
fn rules_are_cheap() {
    walk(schema::object(), "", &mut |schema, path| {
        let compiled = compile_schema(schema);
        for rule in schema["x-kubernetes-validations"].as_array().into_iter().flatten() {
            let warnings = estimate_rule_cost(rule["rule"].as_str().unwrap(), &compiled);
            assert_eq!(warnings, [], "{path}");
        }
    });
}

#[test]
fn every_rule_says_what_is_wrong_and_what_would_be_right() {
    walk(schema::object(), "", &mut |schema, path| {
        for rule in schema["x-kubernetes-validations"].as_array().into_iter().flatten() {
            let says = rule["messageExpression"].as_str().unwrap_or_else(|| panic!("{path}: {rule}"));
            assert!(says.contains("; ") || says.contains("needs"), "{path}: {says}");
        }
    });
}
