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
    "x-kubernetes-map-type",
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

/// The schemas of a definition: of its kind as a whole.
fn schemas() -> [(&'static str, &'static Value); 2] {
    let of = |definition: &'static Value| &definition["spec"]["versions"][0]["schema"]["openAPIV3Schema"];
    [("VirtiofsShare", of(schema::definition())), ("VirtiofsExport", of(schema::export_definition()))]
}

#[test]
fn the_definition_has_the_documented_names() {
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
fn every_keyword_is_enforced() {
    walk(schema::object(), "", &mut |schema, path| {
        for keyword in schema.as_object().unwrap().keys() {
            assert!(KEYWORDS.contains(&keyword.as_str()), "{path}: {keyword}");
        }
    });
}

#[test]
fn every_node_has_a_type_and_every_field_a_description() {
    for (kind, object) in schemas() {
        walk(object, kind, &mut |schema, path| {
            assert!(schema.get("type").is_some() || schema["x-kubernetes-int-or-string"] == true, "{path} has no type");
            let inner = path.ends_with("[]") || path.ends_with("{}") || !path.contains('.');
            assert!(inner || schema["description"].is_string(), "{path} has no description");
        });
    }
}

/// The cost of a rule is estimated by the largest value that the schema lets through.
#[test]
fn everything_is_bounded() {
    for (kind, object) in schemas() {
        walk(&object["properties"]["spec"], &format!("{kind}.spec"), &mut |schema, path| {
            let bounded = schema["type"] != "integer" || schema.get("maximum").is_some();
            assert!(bounded && is_bounded(schema), "{path} has no upper bound");
        });
        walk(&object["properties"]["status"], &format!("{kind}.status"), &mut |schema, path| {
            // Conditions are Kubernetes' own; what is in them has no bounds.
            assert!(is_bounded(schema) || path.contains(".conditions[]"), "{path} has no upper bound");
        });
    }
}

/// Texts, lists and maps: what a writer could make as large as they like.
fn is_bounded(schema: &Value) -> bool {
    let bound = match schema["type"].as_str() {
        Some("string") => schema.get("maxLength").or(schema.get("enum")).or(schema.get("format")),
        Some("array") => schema.get("maxItems"),
        Some("object") if schema.get("additionalProperties").is_some() => schema.get("maxProperties"),
        _ => return true,
    };
    bound.is_some()
}

/// Server-side apply merges a list without a type as a whole, and a later type would change that.
#[test]
fn every_list_and_selector_has_a_merge_strategy() {
    for (kind, object) in schemas() {
        walk(object, kind, &mut |schema, path| {
            let list = schema["type"] == "array";
            assert!(!list || schema["x-kubernetes-list-type"].is_string(), "{path} has no list type");
            let selector = path.ends_with("elector");
            assert!(!selector || schema["x-kubernetes-map-type"] == "atomic", "{path} is not atomic");
        });
    }
}

/// Whatever the release of its writer, the API server must accept a status.
#[test]
fn the_engine_in_a_status_has_no_rules_enumerations_or_required_fields() {
    let share = &schema::definition()["spec"]["versions"][0]["schema"]["openAPIV3Schema"];
    walk(&share["properties"]["status"]["properties"]["engine"], "engine", &mut |schema, path| {
        for keyword in ["enum", "pattern", "required", "x-kubernetes-validations", "default"] {
            assert!(schema.get(keyword).is_none(), "{path}: {keyword}");
        }
    });
}

#[test]
fn exports_are_selectable_by_node_and_by_share() {
    let definition = schema::export_definition();
    assert_eq!(definition["metadata"]["name"], "virtiofsexports.virtiofs.dev");
    assert_eq!(definition["spec"]["scope"], "Cluster");
    assert_eq!(definition["spec"]["names"]["shortNames"], serde_json::json!(["vfe"]));
    assert_eq!(definition["spec"]["names"]["categories"], serde_json::json!(["virtiofs"]));
    let version = &definition["spec"]["versions"][0];
    let selectable = serde_json::json!([{"jsonPath": ".spec.nodeName"}, {"jsonPath": ".spec.shareName"}]);
    assert_eq!(version["selectableFields"], selectable);
    assert!(version["subresources"]["status"].is_object());
}

#[test]
fn rules_are_within_the_cost_budget() {
    for (kind, object) in schemas() {
        walk(object, kind, &mut |schema, path| {
            let compiled = compile_schema(schema);
            for rule in schema["x-kubernetes-validations"].as_array().into_iter().flatten() {
                let warnings = estimate_rule_cost(rule["rule"].as_str().unwrap(), &compiled);
                assert_eq!(warnings, [], "{path}");
            }
        });
    }
}

#[test]
fn every_rule_has_a_message_with_a_remedy() {
    for (kind, object) in schemas() {
        walk(object, kind, &mut |schema, path| {
            for rule in schema["x-kubernetes-validations"].as_array().into_iter().flatten() {
                let says = rule["messageExpression"].as_str().unwrap_or_else(|| panic!("{path}: {rule}"));
                assert!(says.contains("; ") || says.contains("needs"), "{path}: {says}");
            }
        });
    }
}
