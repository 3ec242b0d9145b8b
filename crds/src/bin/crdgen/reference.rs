//! The API reference, from the schema of the definition.

use std::fmt::Write;

use serde_json::{Map, Value, json};
use virtiofs_crds::resolve;
use virtiofs_crds::v1alpha1::EngineStatus;
use virtiofs_crds::v1alpha1::conditions::{EXPORT_REASONS, SHARE_REASONS};

use crate::wording;

/// The manifest of the introduction, one of those that the tests accept.
const EXAMPLE: &str = include_str!("../../../tests/manifests/good/container-storage.yaml");

/// Markdown for the definitions of shares and exports.
pub(crate) fn markdown(share: &Value, export: &Value) -> String {
    let mut page = String::from("# API reference\n");
    title(&mut page, share);
    let _ = write!(
        page,
        "```yaml\n{EXAMPLE}```\n\n\
         Unknown fields, values out of range and contradictory combinations are rejected, by an API server and for a \
         manifest in a directory alike. A field that is absent or `null` has its default.\n\n\
         - *Duration*: whole numbers of up to five digits with the units `h`, `m`, `s` and `ms`, in this order and each at \
         most once, such as `24h`, `1m30s` or `500ms`. Every such text is a duration of the Gateway API (GEP-2257).\n\
         - *Quantity*: a Kubernetes quantity without sign and exponent, with a suffix `m`, `k`, `M`, `G`, `T`, `Ki`, `Mi`, \
         `Gi` or `Ti` or none, such as `500m`, `2` or `256Mi`.\n\
         - *Enumerations*: a later release can add values. A client must treat one that it does not know as an error, not \
         as a default.\n\n\
         [API versions](API-VERSIONS.md) describes compatible changes, version skew, and for how long each version is served.\n"
    );
    let schema = object(share);
    refusals(&mut page, schema);
    consequences(&mut page, &schema["properties"]["spec"]);
    sections(&mut page, schema);
    page.push('\n');
    title(&mut page, export);
    page.push_str("The operator creates one for each share on each selected node; nobody writes one by hand.\n");
    refusals(&mut page, object(export));
    sections(&mut page, object(export));
    conditions(&mut page);
    page
}

/// The heading of a kind, with its names.
fn title(page: &mut String, definition: &Value) {
    let names = &definition["spec"]["names"];
    let kind = text(&names["kind"]);
    let _ = write!(
        page,
        "\n## {kind}\n\n{}\n\n\
         `apiVersion: {}/{}`, `kind: {kind}`; cluster-scoped; `kubectl get {}`, also by category `{}`.\n\n",
        text(&object(definition)["description"]),
        text(&definition["spec"]["group"]),
        text(&definition["spec"]["versions"][0]["name"]),
        text(&names["shortNames"][0]),
        text(&names["categories"][0]),
    );
}

fn object(definition: &Value) -> &Value {
    &definition["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
}

fn sections(page: &mut String, schema: &Value) {
    for root in ["spec", "status"] {
        section(page, &schema["properties"][root], root);
    }
}

/// The conditions and the meaning of their reasons.
fn conditions(page: &mut String) {
    page.push_str("\n## Conditions\n");
    for (kind, reasons) in [("VirtiofsShare", SHARE_REASONS), ("VirtiofsExport", EXPORT_REASONS)] {
        let _ = write!(page, "\n### Of a {kind}\n\n| condition | reason | meaning |\n|---|---|---|\n");
        for (condition, reason, meaning) in reasons {
            let _ = writeln!(page, "| `{condition}` | `{reason}` | {meaning} |");
        }
    }
    page.push_str(
        "\nAn export that is not served, or not as specified, has the finding of its node as reason. The \
         [manual](MANUAL.md#reasons) lists the findings with their remedies.\n",
    );
}

/// The configuration for each `content`, from the code that resolves it.
fn consequences(page: &mut String, spec: &Value) {
    let contents = spec["properties"]["content"]["enum"].as_array().map_or(&[][..], Vec::as_slice);
    let columns: Vec<Value> = contents.iter().map(|content| engine_for(text(content))).collect();
    page.push_str("\n### Engine configuration by `content`\n\nOverrides in `spec.engine` win.\n\n| field |");
    contents.iter().for_each(|content| *page += &format!(" `{}` |", text(content)));
    *page += &format!("\n|---|{}\n", "---|".repeat(contents.len()));
    for name in spec["properties"]["engine"]["properties"].as_object().into_iter().flat_map(Map::keys) {
        let cells = columns.iter().map(|engine| format!(" {} |", shown(&engine[name])));
        let _ = writeln!(page, "| `{name}` |{}", cells.collect::<String>());
    }
}

/// The engine configuration of a share that sets nothing but its content.
fn engine_for(content: &str) -> Value {
    let spec = json!({"source": {"hostPath": {"path": "/srv"}}, "content": content});
    serde_json::from_value(spec).map_or(Value::Null, |spec| json!(EngineStatus::from(&resolve(&spec))))
}

fn shown(value: &Value) -> String {
    match value {
        Value::Null => "none".to_owned(),
        Value::Object(fields) if fields.is_empty() => "none".to_owned(),
        Value::String(text) => format!("`{text}`"),
        other => format!("`{other}`"),
    }
}

/// One object and, after it, every object inside it.
fn section(page: &mut String, schema: &Value, path: &str) {
    let Some(fields) = schema["properties"].as_object() else { return };
    let _ = write!(page, "\n### `{path}`\n\n{}\n\n", text(&schema["description"]));
    page.push_str("| field | type | default | meaning |\n|---|---|---|---|\n");
    for (name, field) in fields {
        row(page, name, field, is_required(schema, name));
    }
    refusals(page, schema);
    for (name, field) in fields {
        match text(&field["type"]) {
            "array" => section(page, &field["items"], &format!("{path}.{name}[]")),
            _ => section(page, field, &format!("{path}.{name}")),
        }
    }
}

fn row(page: &mut String, name: &str, field: &Value, required: bool) {
    let default = match field.get("default") {
        _ if required => "required".to_owned(),
        Some(Value::Object(_)) | None => String::new(),
        Some(default) => format!("`{}`", default.as_str().map_or_else(|| default.to_string(), str::to_owned)),
    };
    let cells = [format!("`{name}`"), kind(field), default, text(&field["description"]).replace('\n', " ")];
    let cells: Vec<String> = cells.iter().map(|cell| cell.replace('|', "\\|")).collect();
    let _ = writeln!(page, "| {} |", cells.join(" | "));
}

/// The type of a field, with what bounds it.
fn kind(field: &Value) -> String {
    if let Some(words) = field["enum"].as_array() {
        return words.iter().map(|word| format!("`{}`", text(word))).collect::<Vec<_>>().join(" or ");
    }
    if is_quantity(field) {
        return "quantity".to_owned();
    }
    if field["x-kubernetes-int-or-string"] == true {
        return format!("whole number{}, or text of the form `{}`", range(field, "imum"), text(&field["pattern"]));
    }
    match text(&field["type"]) {
        "object" if field.get("additionalProperties").is_some() => {
            format!("map of texts{}", range(field, "Properties"))
        }
        "object" => "object".to_owned(),
        "array" => format!("list of {}{}", plural(&field["items"]), range(field, "Items")),
        "string" if is_duration(field) => "duration".to_owned(),
        "string" => format!("text{}", range(field, "Length")),
        "integer" => format!("whole number{}", range(field, "imum")),
        "boolean" => "`true` or `false`".to_owned(),
        other => other.to_owned(),
    }
}

fn plural(items: &Value) -> &'static str {
    if text(&items["type"]) == "object" { "objects" } else { "texts" }
}

fn is_quantity(field: &Value) -> bool {
    field["x-kubernetes-int-or-string"] == true && text(&field["pattern"]).contains("Ki|Mi")
}

fn is_duration(field: &Value) -> bool {
    text(&field["pattern"]).contains("ms)?")
}

/// `min<what>` and `max<what>` in words.
fn range(field: &Value, what: &str) -> String {
    match (&field[format!("min{what}")], &field[format!("max{what}")]) {
        (Value::Null, Value::Null) => String::new(),
        (Value::Null, max) => format!(", at most {max}"),
        (min, Value::Null) => format!(", at least {min}"),
        (min, max) => format!(", {min} to {max}"),
    }
}

/// What the rules of an object and of its fields reject.
fn refusals(page: &mut String, schema: &Value) {
    let own = rules(schema).map(|rule| (text(&rule["fieldPath"]).trim_start_matches('.').to_owned(), rule));
    let empty = Map::new();
    let fields = schema["properties"].as_object().unwrap_or(&empty);
    let of_fields = fields
        .iter()
        .filter(|(_, field)| field.get("properties").is_none())
        .flat_map(|(name, field)| rules(field).map(move |rule| (name.clone(), rule)));
    let lines: Vec<String> = own.chain(of_fields).map(|(field, rule)| refusal_line(&field, rule)).collect();
    if !lines.is_empty() {
        let _ = write!(page, "\nRejected:\n\n{}", lines.concat());
    }
}

fn refusal_line(field: &str, rule: &Value) -> String {
    let message = wording::message(rule);
    if field.is_empty() { format!("- {message}\n") } else { format!("- `{field}`: {message}\n") }
}

fn rules(schema: &Value) -> impl Iterator<Item = &Value> {
    schema["x-kubernetes-validations"].as_array().into_iter().flatten()
}

fn is_required(schema: &Value, name: &str) -> bool {
    schema["required"].as_array().is_some_and(|required| required.iter().any(|field| field == name))
}

fn text(value: &Value) -> &str {
    value.as_str().unwrap_or_default()
}
