//! What commands print: how values read, and standard output that may be piped into something that does not
//! read it all.

use std::io::{self, ErrorKind, Write};

use serde::Serialize;
use serde_json::Value;

/// Prints text; a reader that has left is no error.
pub(crate) fn print(text: &str) -> anyhow::Result<()> {
    let mut stdout = io::stdout().lock();
    match stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush()) {
        Err(error) if error.kind() != ErrorKind::BrokenPipe => Err(error.into()),
        _ => Ok(()),
    }
}

/// Tells a person at a shell. That it cannot be told is no reason to stop serving.
pub(crate) fn tell(text: &str) {
    if let Err(error) = print(text) {
        tracing::warn!(%error, "cannot write to standard output");
    }
}

/// A value as the API writes it.
pub(crate) fn word(value: &impl Serialize) -> String {
    match serde_json::to_value(value) {
        Ok(Value::String(word)) => word,
        Ok(other) => other.to_string(),
        Err(_) => "-".to_owned(),
    }
}

/// A text that somebody else chose, on one line and without what a terminal would obey: control characters, and
/// those that turn the direction of what follows.
pub(crate) fn clean(text: &str) -> String {
    let obeyed = |c: char| {
        c.is_control() || matches!(c, '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
    };
    text.chars().fold(String::new(), |mut clean, c| {
        if obeyed(c) {
            clean.extend(c.escape_debug());
        } else {
            clean.push(c);
        }
        clean
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_shown_and_not_obeyed() {
        for (name, shown) in [
            ("plain ü 名", "plain ü 名"),
            ("\u{1b}[2J\n", "\\u{1b}[2J\\n"),
            ("a\u{9b}31m", "a\\u{9b}31m"),
            ("evil\u{202e}txt.exe", "evil\\u{202e}txt.exe"),
        ] {
            assert_eq!(clean(name), shown);
        }
    }
}
