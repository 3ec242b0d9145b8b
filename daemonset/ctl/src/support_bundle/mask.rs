//! Removes file names of guests and credentials.

use serde_json::Value;

/// Replaces what was removed.
const LEFT_OUT: &str = "(left out)";

/// Fields of a session that contain file names of guests.
const GUESTS: [&str; 3] = ["oldestRequest", "staleEvents", "lastStale"];

/// The status, without file names of guests unless `guest_paths`.
pub(super) fn status(mut document: Value, guest_paths: bool) -> Value {
    if !guest_paths {
        mask(&mut document, false);
    }
    document
}

fn mask(value: &mut Value, guests: bool) {
    match value {
        Value::Object(fields) => {
            for (name, value) in fields {
                match value {
                    Value::String(text) if guests && matches!(name.as_str(), "path" | "name") => {
                        LEFT_OUT.clone_into(text)
                    }
                    Value::String(text) if name == "message" => *text = self::fields(text),
                    _ => mask(value, guests || GUESTS.contains(&name.as_str())),
                }
            }
        }
        Value::Array(values) => values.iter_mut().for_each(|value| mask(value, guests)),
        _ => {}
    }
}

/// Text of a log or table without the values of `path=` and `name=`: up to the next field, or the end of the line.
pub(super) fn text(text: &str) -> String {
    text.lines().map(|line| fields(line) + "\n").collect()
}

fn fields(line: &str) -> String {
    let mut rest = line;
    let mut masked = String::new();
    while let Some(at) = FIELDS.iter().filter_map(|field| rest.find(field).map(|at| at + field.len())).min() {
        masked.push_str(&rest[..at]);
        masked.push_str(LEFT_OUT);
        rest = &rest[at + end(&rest[at..])..];
    }
    masked + rest
}

/// What precedes a value: in text, in JSON, and in a table.
const FIELDS: [&str; 6] = [" path=", " name=", "\"path\":", "\"name\":", "oldest request at ", "last path: "];

/// Length of a value: up to its closing quote, else up to the next field.
fn end(value: &str) -> usize {
    if let Some(quoted) = value.strip_prefix('"') {
        let mut escaped = false;
        for (at, c) in quoted.char_indices() {
            match c {
                '"' if !escaped => return at + 2,
                '\\' => escaped = !escaped,
                _ => escaped = false,
            }
        }
        return value.len();
    }
    let next = |at: usize| {
        let word = value[at + 1..].split([' ', '=']).next().unwrap_or_default();
        let is_field = value[at + 1 + word.len()..].starts_with('=');
        is_field && !word.is_empty() && word.chars().all(|c| c.is_ascii_lowercase() || c == '_')
    };
    value.match_indices(' ').map(|(at, _)| at).find(|at| next(*at)).unwrap_or(value.len())
}

/// A line of mountinfo without options that may be credentials.
pub(super) fn mount(line: &str) -> String {
    let secret = |option: &str| {
        let name = option.split('=').next().unwrap_or_default();
        option.contains('=') && ["user", "pass", "cred", "secret", "key", "token"].iter().any(|it| name.contains(it))
    };
    let option = |option: &str| match option.split_once('=') {
        Some((name, _)) if secret(option) => format!("{name}={LEFT_OUT}"),
        _ => option.to_owned(),
    };
    line.split(' ').map(|word| word.split(',').map(option).collect::<Vec<_>>().join(",")).collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn only_file_names_of_guests_are_removed() {
        let document = json!({"shares": [{"name": "a", "socket": {"path": "/run/a"}, "sessions": [
            {"id": "a-1", "oldestRequest": {"path": "/secret/plan", "ageMs": 5}}]}]});
        let masked = status(document.clone(), false);
        assert_eq!(masked["shares"][0]["sessions"][0]["oldestRequest"], json!({"path": LEFT_OUT, "ageMs": 5}));
        assert_eq!(
            (&masked["shares"][0]["name"], &masked["shares"][0]["socket"]["path"]),
            (&json!("a"), &json!("/run/a"))
        );
        assert_eq!(status(document.clone(), true), document);
    }

    #[test]
    fn a_log_line_loses_the_values_of_its_paths() {
        for (line, masked) in [
            (r#"WARN stale path="/my \"secret\" x" cause=Gone"#, "WARN stale path=(left out) cause=Gone"),
            ("WARN stale path=/my secret x cause=Gone", "WARN stale path=(left out) cause=Gone"),
            (r#"{"share":"a","path":"/s","cause":"Gone"}"#, r#"{"share":"a","path":(left out),"cause":"Gone"}"#),
            ("plain line", "plain line"),
            ("ends with path=/x y", "ends with path=(left out)"),
        ] {
            assert_eq!(text(line), format!("{masked}\n"));
        }
    }

    #[test]
    fn credentials_of_a_mount_are_removed() {
        let line = "36 35 0:30 / /srv rw shared:1 - cifs //host/x rw,username=me,password=pw,vers=3.0";
        let masked = mount(line);
        assert!(!masked.contains("me,") && !masked.contains("pw") && masked.contains("vers=3.0"), "{masked}");
    }
}
