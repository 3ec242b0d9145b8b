//! Messages of rules, for people.

use serde_json::Value;

/// The message of a rule, with its values in angle brackets.
///
/// Messages are CEL expressions that concatenate texts and values.
pub(crate) fn message(rule: &Value) -> String {
    let expression = rule["messageExpression"].as_str().unwrap_or_default();
    let text: String = pieces(expression).into_iter().map(Piece::words).collect();
    text.trim().to_owned()
}

enum Piece<'a> {
    Text(&'a str),
    Code(&'a str),
}

impl Piece<'_> {
    fn words(self) -> String {
        match self {
            Piece::Text(text) => text.to_owned(),
            Piece::Code(code) => format!("‹{}›", name(code)),
        }
    }
}

/// What a piece of code stands for: the last field that it names, or the value itself.
fn name(code: &str) -> &str {
    if code.starts_with("self.filter") || code.starts_with('(') {
        return "value";
    }
    let code = code.trim_start_matches("string(").trim_end_matches(')');
    if code == "self" {
        return "value";
    }
    code.rsplit('.').next().unwrap_or(code)
}

/// The operands of the top-level `+` of an expression.
fn pieces(expression: &str) -> Vec<Piece<'_>> {
    split(expression)
        .into_iter()
        .map(str::trim)
        .filter(|piece| !piece.is_empty())
        .map(|piece| match piece.strip_prefix('\'').and_then(|rest| rest.strip_suffix('\'')) {
            Some(text) => Piece::Text(text),
            None => Piece::Code(piece),
        })
        .collect()
}

/// Splits at every `+` outside of quotes and brackets.
fn split(expression: &str) -> Vec<&str> {
    let (mut quoted, mut depth, mut start, mut parts) = (false, 0, 0, Vec::new());
    for (at, symbol) in expression.char_indices() {
        match symbol {
            '\'' => quoted = !quoted,
            '(' | '[' if !quoted => depth += 1,
            ')' | ']' if !quoted => depth -= 1,
            '+' if !quoted && depth == 0 => {
                parts.push(&expression[start..at]);
                start = at + 1;
            }
            _ => {}
        }
    }
    parts.push(&expression[start..]);
    parts
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_is_read_from_its_expression() {
        let read = |expression: &str| message(&serde_json::json!({"messageExpression": expression}));
        assert_eq!(read("'is empty; give one'"), "is empty; give one");
        assert_eq!(read("self.access + ' contradicts it; a + b'"), "‹access› contradicts it; a + b");
        assert_eq!(read("self.filter(n, n.matches('a+'))[0] + ' is no name'"), "‹value› is no name");
        assert_eq!(read("'from ' + string(self.from) + '; less'"), "from ‹from›; less");
        assert_eq!(read("string(self) + ' is out of range'"), "‹value› is out of range");
    }
}
