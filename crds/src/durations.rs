//! Durations as Kubernetes writes them.

use std::borrow::Cow;
use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Serialize};

/// The grammar of durations in this API: whole numbers of up to five digits with the units `h`, `m`, `s` and `ms`, in
/// this order and each at most once. Every such text is a duration of the Gateway API (GEP-2257) as well, has one
/// meaning in Go, in CEL and here, and overflows nowhere.
const PATTERN: &str = "^([0-9]{1,5}h)?([0-9]{1,5}m)?([0-9]{1,5}s)?([0-9]{1,5}ms)?$";

/// Units in the order in which they may follow each other, in milliseconds.
const UNITS: [(&str, u64); 4] = [("h", 3_600_000), ("m", 60_000), ("s", 1000), ("ms", 1)];

/// A duration such as `500ms`, `1m30s` or `24h`, kept as it was written.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Interval {
    text: String,
    millis: u64,
}

/// Text that is not an [`Interval`].
#[derive(Debug, thiserror::Error)]
#[error("{0:?} is not a duration such as 500ms, 1s, 1m30s or 24h")]
pub struct InvalidInterval(String);

impl Interval {
    /// A number of milliseconds, written with the largest units that are exact.
    pub fn from_millis(millis: u64) -> Self {
        let (mut text, mut rest) = (String::new(), millis);
        for (unit, factor) in UNITS {
            if rest >= factor {
                text += &format!("{}{unit}", rest / factor);
                rest %= factor;
            }
        }
        if text.is_empty() {
            text.push_str("0s");
        }
        Interval { text, millis }
    }

    /// The duration in milliseconds.
    pub fn millis(&self) -> u64 {
        self.millis
    }

    /// The duration as a type of the standard library.
    pub fn duration(&self) -> Duration {
        Duration::from_millis(self.millis)
    }
}

impl FromStr for Interval {
    type Err = InvalidInterval;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let millis = parse(text).ok_or_else(|| InvalidInterval(text.to_owned()))?;
        Ok(Interval { text: text.to_owned(), millis })
    }
}

/// The milliseconds of a text that matches [`PATTERN`].
fn parse(text: &str) -> Option<u64> {
    let (mut rest, mut units, mut total) = (text, UNITS.iter(), 0);
    while !rest.is_empty() {
        let digits = rest.find(|c: char| !c.is_ascii_digit())?;
        let unit_end = rest[digits..].find(|c: char| c.is_ascii_digit()).map_or(rest.len(), |at| digits + at);
        let (number, unit) = (&rest[..digits], &rest[digits..unit_end]);
        let (_, factor) = units.find(|(name, _)| *name == unit)?;
        if number.len() > 5 {
            return None;
        }
        total += number.parse::<u64>().ok()? * factor;
        rest = &rest[unit_end..];
    }
    (!text.is_empty()).then_some(total)
}

impl TryFrom<String> for Interval {
    type Error = InvalidInterval;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        text.parse()
    }
}

impl From<Interval> for String {
    fn from(interval: Interval) -> Self {
        interval.text
    }
}

impl fmt::Display for Interval {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl JsonSchema for Interval {
    fn schema_name() -> Cow<'static, str> {
        "Interval".into()
    }

    fn inline_schema() -> bool {
        true
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({"type": "string", "minLength": 2, "maxLength": 32, "pattern": PATTERN})
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_are_parsed_and_kept_as_written() {
        for (text, millis) in [
            ("500ms", 500),
            ("0s", 0),
            ("1s", 1000),
            ("90s", 90_000),
            ("1m30s", 90_000),
            ("24h", 86_400_000),
            ("1h2m3s4ms", 3_723_004),
            ("99999h", 359_996_400_000),
        ] {
            let interval: Interval = text.parse().unwrap();
            assert_eq!(interval.millis(), millis, "{text}");
            assert_eq!(interval.to_string(), text);
        }
    }

    #[test]
    fn milliseconds_are_written_with_the_largest_units() {
        for (millis, text) in [(0, "0s"), (1, "1ms"), (1000, "1s"), (90_000, "1m30s"), (86_400_000, "24h")] {
            assert_eq!(Interval::from_millis(millis).to_string(), text);
            assert_eq!(text.parse::<Interval>().unwrap(), Interval::from_millis(millis));
        }
    }

    #[test]
    fn anything_else_is_rejected_here_and_by_the_pattern() {
        let pattern = regex::Regex::new(PATTERN).unwrap();
        for text in ["", "1", "s", "1d", "-1s", "1.5s", "1s1h", "1s1s", "100000s", "1 s", "1S", "1sm", "ms", "1µs"] {
            assert!(text.parse::<Interval>().is_err(), "{text}");
            assert!(text.is_empty() || !pattern.is_match(text), "{text}");
        }
    }
}
