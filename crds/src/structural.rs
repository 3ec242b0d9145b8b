//! Validates a value against a structural schema of Kubernetes: types, bounds, patterns, unknown fields.
//!
//! No JSON Schema crate does this: a structural schema has `nullable`, `x-kubernetes-int-or-string` and
//! `x-kubernetes-list-type`, drops nulls, and rejects undeclared fields without `additionalProperties: false`. Of JSON
//! Schema it uses a dozen keywords.

use std::fmt;

use regex::Regex;
use serde_json::{Map, Value};

use crate::refusal::{Refusal, nearest};

/// Largest number of characters of a value in a message.
const SHOWN: usize = 120;

/// Every reason why `value` does not fit `schema`.
pub(crate) fn check(schema: &Value, value: &Value) -> Vec<Refusal> {
    let mut refusals = Vec::new();
    visit(schema, value, "", &mut refusals);
    refusals
}

/// Removes nulls of declared fields: Kubernetes treats null as absent where a field is not nullable.
pub(crate) fn drop_nulls(schema: &Value, value: &mut Value) {
    match value {
        Value::Object(fields) => {
            fields.retain(|name, field| !(field.is_null() && schema["properties"].get(name).is_some()));
            for (name, field) in fields {
                drop_nulls(field_schema(schema, name).unwrap_or(&Value::Null), field);
            }
        }
        Value::Array(items) => items.iter_mut().for_each(|item| drop_nulls(&schema["items"], item)),
        _ => {}
    }
}

fn visit(schema: &Value, value: &Value, path: &str, refusals: &mut Vec<Refusal>) {
    if let Err(message) = check_type(schema, value) {
        refusals.push(Refusal::new(path, message));
        return;
    }
    refusals.extend(check_value(schema, value).into_iter().map(|message| Refusal::new(path, message)));
    match value {
        Value::Object(fields) => visit_object(schema, fields, path, refusals),
        Value::Array(items) => visit_array(schema, items, path, refusals),
        _ => {}
    }
}

fn visit_object(schema: &Value, fields: &Map<String, Value>, path: &str, refusals: &mut Vec<Refusal>) {
    for name in schema["required"].as_array().into_iter().flatten().filter_map(Value::as_str) {
        if !fields.contains_key(name) {
            refusals.push(Refusal::new(join(path, name), missing(&schema["properties"][name])));
        }
    }
    for (name, value) in fields {
        let path = join(path, name);
        match field_schema(schema, name) {
            Some(schema) => visit(schema, value, &path, refusals),
            None if is_open(schema) => {}
            None => refusals.push(Refusal::new(path, unknown(schema, name))),
        }
    }
}

fn visit_array(schema: &Value, items: &[Value], path: &str, refusals: &mut Vec<Refusal>) {
    for (index, item) in items.iter().enumerate() {
        visit(&schema["items"], item, &format!("{path}[{index}]"), refusals);
        if schema["x-kubernetes-list-type"] == "set" && items[..index].contains(item) {
            refusals
                .push(Refusal::new(format!("{path}[{index}]"), format!("{} is listed twice; remove one", Shown(item))));
        }
    }
}

/// The schema of one field: declared by name, or that of all values of a map.
fn field_schema<'a>(schema: &'a Value, name: &str) -> Option<&'a Value> {
    schema["properties"].get(name).or_else(|| schema.get("additionalProperties").filter(|s| s.is_object()))
}

/// True if the schema does not declare its fields, as a definition does not for `metadata`.
fn is_open(schema: &Value) -> bool {
    schema["x-kubernetes-preserve-unknown-fields"] == true
        || (schema.get("properties").is_none() && schema.get("additionalProperties").is_none())
}

fn join(path: &str, name: &str) -> String {
    if path.is_empty() { name.to_owned() } else { format!("{path}.{name}") }
}

fn missing(schema: &Value) -> String {
    match schema["description"].as_str().and_then(|text| text.lines().next()) {
        Some(description) => format!("is missing: {description}"),
        None => "is missing".to_owned(),
    }
}

fn unknown(schema: &Value, name: &str) -> String {
    let known: Vec<&str> =
        schema["properties"].as_object().into_iter().flatten().map(|(name, _)| name.as_str()).collect();
    match nearest(name, known.iter().copied()) {
        Some(near) => format!("unknown field; did you mean {near:?}?"),
        None => format!("unknown field; known here: {}", known.join(", ")),
    }
}

fn check_type(schema: &Value, value: &Value) -> Result<(), String> {
    if schema["x-kubernetes-int-or-string"] == true {
        let valid = value.is_string() || is_integer(value);
        return if valid {
            Ok(())
        } else {
            Err(format!("{} is neither a whole number nor text; put it in quotes", Shown(value)))
        };
    }
    let (valid, expected, remedy) = match schema["type"].as_str() {
        Some("object") => (value.is_object(), "a mapping", ""),
        Some("array") => (value.is_array(), "a list", ""),
        Some("string") => (value.is_string(), "text", "; put it in quotes"),
        Some("boolean") => (value.is_boolean(), "true or false", "; write one of them, without quotes"),
        Some("integer") => (is_integer(value), "a whole number", "; write it without quotes"),
        Some("number") => (value.is_number(), "a number", "; write it without quotes"),
        _ => return Ok(()),
    };
    if !valid && schema["enum"].is_array() {
        return Err(format!("{} is not text; write one of {}", Shown(value), words(schema).join(", ")));
    }
    let remedy = if value.is_object() || value.is_array() { "" } else { remedy };
    if valid { Ok(()) } else { Err(format!("{} is not {expected}{remedy}{}", Shown(value), description(schema))) }
}

fn is_integer(value: &Value) -> bool {
    value.is_i64() || value.is_u64()
}

/// The bounds that a value of the right type violates.
fn check_value(schema: &Value, value: &Value) -> Vec<String> {
    match value {
        Value::String(text) => check_text(schema, text),
        Value::Number(number) => check_number(schema, number.as_f64().unwrap_or(f64::NAN), value),
        Value::Array(items) => check_size(schema, "Items", items.len(), "entries"),
        Value::Object(fields) => check_size(schema, "Properties", fields.len(), "entries"),
        _ => Vec::new(),
    }
}

fn check_text(schema: &Value, text: &str) -> Vec<String> {
    let mut messages = check_size(schema, "Length", text.chars().count(), "characters");
    if schema["enum"].is_array() && !words(schema).contains(&text) {
        messages.push(not_one_of(text, &words(schema)));
    }
    if let Some(pattern) = schema["pattern"].as_str()
        && !Regex::new(pattern).is_ok_and(|pattern| pattern.is_match(text))
    {
        messages.push(format!("{} does not match {pattern}{}", Shown(&text.into()), description(schema)));
    }
    messages
}

/// The values of an enumeration.
fn words(schema: &Value) -> Vec<&str> {
    schema["enum"].as_array().into_iter().flatten().filter_map(Value::as_str).collect()
}

fn not_one_of(text: &str, words: &[&str]) -> String {
    let hint = nearest(text, words.iter().copied()).map(|near| format!("; did you mean {near}?"));
    format!("{} is not one of {}{}", Shown(&text.into()), words.join(", "), hint.unwrap_or_default())
}

/// The first line of a description, for messages that need it.
fn description(schema: &Value) -> String {
    let first = schema["description"].as_str().and_then(|text| text.lines().next());
    first.map(|text| format!(" ({text})")).unwrap_or_default()
}

fn check_number(schema: &Value, number: f64, value: &Value) -> Vec<String> {
    let below = schema["minimum"].as_f64().filter(|minimum| number < *minimum);
    let above = schema["maximum"].as_f64().filter(|maximum| number > *maximum);
    let below = below.map(|minimum| format!("{value} is too small; the minimum is {minimum}"));
    let above = above.map(|maximum| format!("{value} is too large; the maximum is {maximum}"));
    below.into_iter().chain(above).collect()
}

/// Checks `min<what>` and `max<what>`.
fn check_size(schema: &Value, what: &str, size: usize, unit: &str) -> Vec<String> {
    let limit = |edge: &str| schema[format!("{edge}{what}")].as_u64();
    let size = size as u64;
    let below = limit("min").filter(|min| size < *min).map(|min| format!("has {size} {unit}; the minimum is {min}"));
    let above = limit("max").filter(|max| size > *max).map(|max| format!("has {size} {unit}; the maximum is {max}"));
    below.into_iter().chain(above).collect()
}

/// A value in a message: JSON, shortened.
struct Shown<'a>(&'a Value);

impl fmt::Display for Shown<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let text = self.0.to_string();
        match text.char_indices().nth(SHOWN) {
            Some((end, _)) => write!(f, "{}...", &text[..end]),
            None => f.write_str(&text),
        }
    }
}
