//! Validation errors: the field, the value, and what is right.

use std::fmt;
use std::path::PathBuf;

use serde::Serialize;

/// Where a document was read from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Origin {
    /// The file.
    pub file: PathBuf,
    /// Number of the document in the file, counted from 1 without empty ones; 0 is the whole file.
    pub document: usize,
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.document {
            0 => write!(f, "{}", self.file.display()),
            number => write!(f, "{}, document {number}", self.file.display()),
        }
    }
}

/// One reason why a document is rejected.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, thiserror::Error)]
pub struct Refusal {
    /// The document, if it came from a file.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub origin: Option<Origin>,
    /// Name of the share, if the document has one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub share: Option<String>,
    /// Path of the field, such as `spec.engine.cache`; empty for the whole document.
    pub field: String,
    /// The value, what is wrong with it, and what is right.
    pub message: String,
}

impl Refusal {
    /// A refusal of `field`, of no document yet.
    pub fn new(field: impl Into<String>, message: impl Into<String>) -> Self {
        Refusal { origin: None, share: None, field: printable(field.into()), message: printable(message.into()) }
    }

    /// The same refusal, of a document at `origin`.
    pub fn at(mut self, origin: &Origin) -> Self {
        self.origin = Some(origin.clone());
        self
    }

    /// The same refusal, of the share of this name. A name that no object can have is dropped.
    pub fn of(mut self, share: Option<&str>) -> Self {
        let possible = |name: &&str| name.len() <= 253 && !name.contains(char::is_control);
        self.share = share.filter(possible).map(str::to_owned);
        self
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(origin) = &self.origin {
            write!(f, "{origin}")?;
            if let Some(share) = &self.share {
                write!(f, " ({share})")?;
            }
            f.write_str(": ")?;
        }
        if !self.field.is_empty() {
            write!(f, "{}: ", self.field)?;
        }
        f.write_str(&self.message)
    }
}

/// The text with control characters escaped: a manifest must not inject them into a log or a terminal.
fn printable(text: String) -> String {
    if text.contains(char::is_control) { text.escape_debug().to_string() } else { text }
}

/// Longest word that is compared with known names.
const GUESSED: usize = 64;

/// The name among `known` that is closest to `word`, if any is close.
pub fn nearest<'a>(word: &str, known: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    if word.len() > GUESSED {
        return None;
    }
    let plain = |text: &str| text.to_lowercase().replace(['-', '_'], "");
    known
        .into_iter()
        .map(|candidate| (strsim::damerau_levenshtein(&plain(word), &plain(candidate)), candidate))
        .filter(|(distance, candidate)| *distance * 3 <= candidate.len().max(3))
        .min_by_key(|(distance, _)| *distance)
        .map(|(_, candidate)| candidate)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refusal_names_document_field_and_remedy() {
        let origin = Origin { file: "shares.yaml".into(), document: 2 };
        let refusal = Refusal::new("spec.engine.cache", "\"Allways\" is unknown; did you mean Always?");
        assert_eq!(refusal.to_string(), "spec.engine.cache: \"Allways\" is unknown; did you mean Always?");
        assert_eq!(
            refusal.at(&origin).of(Some("images")).to_string(),
            "shares.yaml, document 2 (images): spec.engine.cache: \"Allways\" is unknown; did you mean Always?"
        );
    }

    #[test]
    fn control_characters_are_escaped() {
        assert_eq!(Refusal::new("a\nb", "\u{1b}[31mred").to_string(), "a\\nb: \\u{1b}[31mred");
    }

    #[test]
    fn only_close_names_are_suggested() {
        let known = ["access", "content", "consumers", "inodeFileHandles"];
        assert_eq!(nearest("acess", known), Some("access"));
        assert_eq!(nearest("inode_file_handles", known), Some("inodeFileHandles"));
        assert_eq!(nearest("Content", known), Some("content"));
        assert_eq!(nearest("replicas", known), None);
    }
}
