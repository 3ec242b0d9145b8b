//! Output for people: how values are named, how untrusted text is shown, and writing to a standard output whose reader
//! may leave.

use std::io::{self, ErrorKind, Write};

use serde::Serialize;
use serde_json::Value;

/// Prints text on standard output. A reader that has left is not an error.
///
/// # Errors
/// Standard output cannot be written.
pub fn print(text: &str) -> io::Result<()> {
    let mut stdout = io::stdout().lock();
    match stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush()) {
        Err(error) if error.kind() != ErrorKind::BrokenPipe => Err(error),
        _ => Ok(()),
    }
}

/// A value's name in the API.
pub fn name(value: &impl Serialize) -> String {
    match serde_json::to_value(value) {
        Ok(Value::String(name)) => name,
        Ok(other) => other.to_string(),
        Err(_) => "-".to_owned(),
    }
}

/// Untrusted text on one line, with the characters escaped that a terminal would interpret: control characters, and
/// those that change the direction of text.
pub fn escaped(text: &str) -> String {
    let interpreted = |c: char| {
        c.is_control() || matches!(c, '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
    };
    text.chars().fold(String::new(), |mut shown, c| {
        if interpreted(c) {
            shown.extend(c.escape_debug());
        } else {
            shown.push(c);
        }
        shown
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn control_characters_are_escaped() {
        for (name, shown) in [
            ("plain ü 名", "plain ü 名"),
            ("\u{1b}[2J\n", "\\u{1b}[2J\\n"),
            ("a\u{9b}31m", "a\\u{9b}31m"),
            ("evil\u{202e}txt.exe", "evil\\u{202e}txt.exe"),
        ] {
            assert_eq!(escaped(name), shown);
        }
    }
}
