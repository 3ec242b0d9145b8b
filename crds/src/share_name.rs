//! The name of a share.

use std::fmt;

use serde::Serialize;

use crate::refusal::Refusal;

/// Longest name of a share, which is the value of labels, and part of names and socket paths.
const NAME_MAX: usize = 63;

/// Name of a share: a DNS label of 1 to 63 of `[a-z0-9-]`, which neither starts nor ends with `-`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(transparent)]
pub struct ShareName(String);

impl ShareName {
    /// Parses a name.
    pub fn parse(name: &str) -> Result<Self, Refusal> {
        let inner = |c: u8| c.is_ascii_lowercase() || c.is_ascii_digit() || c == b'-';
        let edge = |c: Option<&u8>| c.is_some_and(|c| *c != b'-');
        let bytes = name.as_bytes();
        let sound =
            bytes.len() <= NAME_MAX && bytes.iter().copied().all(inner) && edge(bytes.first()) && edge(bytes.last());
        if sound {
            return Ok(ShareName(name.to_owned()));
        }
        Err(Refusal::new(
            "metadata.name",
            format!(
                "{name:?} is not a name of 1 to {NAME_MAX} of a-z, 0-9 and -, starting and ending with a letter or digit"
            ),
        ))
    }

    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for ShareName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}
