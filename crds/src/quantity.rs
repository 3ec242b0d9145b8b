//! Quantities as Kubernetes writes them.

use std::borrow::Cow;
use std::fmt;
use std::str::FromStr;

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Deserializer, Serialize};

/// The quantities that this API accepts: every one of Kubernetes without sign and exponent, up to `T` and `Ti`. Their
/// digits are bounded, so that none overflows.
const PATTERN: &str = r"^[0-9]{1,15}(\.[0-9]{1,6})?(m|k|M|G|T|Ki|Mi|Gi|Ti)?$";

/// Suffixes with their factor, in thousandths.
const SUFFIXES: [(&str, u128); 9] = [
    ("Ki", 1000 << 10),
    ("Mi", 1000 << 20),
    ("Gi", 1000 << 30),
    ("Ti", 1000 << 40),
    ("m", 1),
    ("k", 1_000_000),
    ("M", 1_000_000_000),
    ("G", 1_000_000_000_000),
    ("T", 1_000_000_000_000_000),
];

/// A quantity such as `500m`, `2`, `1.5` or `256Mi`, kept as it was written.
#[derive(Clone, Debug, Serialize)]
#[serde(transparent)]
pub struct Quantity {
    text: String,
    #[serde(skip)]
    thousandths: u128,
}

/// Text that is no [`Quantity`].
#[derive(Debug, thiserror::Error)]
#[error("{0:?} is not a quantity such as 500m, 2 or 256Mi")]
pub struct InvalidQuantity(String);

impl Quantity {
    /// A number of bytes, written with the largest binary suffix that is exact.
    pub fn from_bytes(bytes: u64) -> Self {
        Quantity::exact(bytes, &[("Ti", 1 << 40), ("Gi", 1 << 30), ("Mi", 1 << 20), ("Ki", 1 << 10)])
    }

    /// A plain number, written with the largest decimal suffix that is exact.
    pub fn from_count(count: u64) -> Self {
        Quantity::exact(count, &[("T", 1_000_000_000_000), ("G", 1_000_000_000), ("M", 1_000_000), ("k", 1000)])
    }

    /// A number of thousandths, such as CPUs have.
    pub fn from_thousandths(thousandths: u64) -> Self {
        let text = match thousandths % 1000 {
            0 => (thousandths / 1000).to_string(),
            _ => format!("{thousandths}m"),
        };
        Quantity { text, thousandths: thousandths.into() }
    }

    fn exact(number: u64, suffixes: &[(&str, u64)]) -> Self {
        let fits = |(_, factor): &&(&str, u64)| number >= *factor && number.is_multiple_of(*factor);
        let text = match suffixes.iter().find(fits) {
            Some((suffix, factor)) => format!("{}{suffix}", number / factor),
            None => number.to_string(),
        };
        Quantity { text, thousandths: u128::from(number) * 1000 }
    }

    /// The quantity in whole units, rounded up as Kubernetes does.
    pub fn units(&self) -> u64 {
        u64::try_from(self.thousandths.div_ceil(1000)).unwrap_or(u64::MAX)
    }

    /// The quantity in thousandths, rounded up.
    pub fn thousandths(&self) -> u64 {
        u64::try_from(self.thousandths).unwrap_or(u64::MAX)
    }
}

/// Quantities are equal if their values are, as `1` and `1000m`.
impl PartialEq for Quantity {
    fn eq(&self, other: &Self) -> bool {
        self.thousandths == other.thousandths
    }
}

impl Eq for Quantity {}

impl FromStr for Quantity {
    type Err = InvalidQuantity;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let thousandths = parse(text).ok_or_else(|| InvalidQuantity(text.to_owned()))?;
        Ok(Quantity { text: text.to_owned(), thousandths })
    }
}

/// The thousandths of a text that matches [`PATTERN`], rounded up.
fn parse(text: &str) -> Option<u128> {
    let end = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, suffix) = text.split_at(end);
    let factor = match suffix {
        "" => 1000,
        _ => SUFFIXES.iter().find(|(name, _)| *name == suffix)?.1,
    };
    let (whole, fraction) = match number.split_once('.') {
        Some((whole, fraction)) if (1..=6).contains(&fraction.len()) => (whole, fraction),
        Some(_) => return None,
        None => (number, ""),
    };
    if !(1..=15).contains(&whole.len()) || fraction.contains('.') {
        return None;
    }
    let digits: u128 = format!("{whole}{fraction}").parse().ok()?;
    Some((digits * factor).div_ceil(10_u128.pow(u32::try_from(fraction.len()).ok()?)))
}

/// YAML reads `2` as a number and `2Gi` as text; both are quantities.
#[derive(Deserialize)]
#[serde(untagged)]
enum IntOrText {
    Int(u64),
    Text(String),
}

impl<'de> Deserialize<'de> for Quantity {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = match IntOrText::deserialize(deserializer)? {
            IntOrText::Int(number) => number.to_string(),
            IntOrText::Text(text) => text,
        };
        text.parse().map_err(serde::de::Error::custom)
    }
}

impl fmt::Display for Quantity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl JsonSchema for Quantity {
    fn schema_name() -> Cow<'static, str> {
        "Quantity".into()
    }

    fn inline_schema() -> bool {
        true
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({"x-kubernetes-int-or-string": true, "pattern": PATTERN, "maxLength": 32})
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantities_have_the_values_that_kubernetes_gives_them() {
        for (text, thousandths) in [
            ("0", 0),
            ("1", 1000),
            ("500m", 500),
            ("1.5", 1500),
            ("0.5k", 500_000),
            ("1k", 1_000_000),
            ("1Ki", 1_024_000),
            ("64Mi", 67_108_864_000),
            ("1.5Gi", 1_610_612_736_000),
            ("1Ti", 1_099_511_627_776_000),
            ("1.0005", 1001),
        ] {
            let quantity: Quantity = text.parse().unwrap();
            assert_eq!(quantity.thousandths(), thousandths, "{text}");
            assert_eq!(quantity.to_string(), text);
        }
        assert_eq!("1500m".parse::<Quantity>().unwrap().units(), 2);
        assert_eq!("1".parse::<Quantity>().unwrap(), "1000m".parse().unwrap());
    }

    #[test]
    fn numbers_are_written_with_the_largest_exact_suffix() {
        for (quantity, text) in [
            (Quantity::from_bytes(1 << 30), "1Gi"),
            (Quantity::from_bytes(3 << 19), "1536Ki"),
            (Quantity::from_bytes(1000), "1000"),
            (Quantity::from_bytes(0), "0"),
            (Quantity::from_count(1000), "1k"),
            (Quantity::from_count(1500), "1500"),
            (Quantity::from_thousandths(1500), "1500m"),
            (Quantity::from_thousandths(2000), "2"),
        ] {
            assert_eq!(quantity.to_string(), text);
            assert_eq!(text.parse::<Quantity>().unwrap(), quantity);
        }
    }

    #[test]
    fn numbers_and_text_are_read() {
        let read = |json: &str| serde_json::from_str::<Quantity>(json);
        assert_eq!(read("2").unwrap(), read("\"2\"").unwrap());
        assert_eq!(serde_json::to_string(&read("2").unwrap()).unwrap(), "\"2\"");
        assert!(read("-2").is_err() && read("1.5").is_err());
    }

    #[test]
    fn anything_else_is_rejected_here_and_by_the_pattern() {
        let pattern = regex::Regex::new(PATTERN).unwrap();
        for text in [
            "",
            "Mi",
            "-1",
            "+1",
            "1e3",
            "1 Gi",
            "1gi",
            "1K",
            "1Pi",
            "1.",
            ".5",
            "1.1.1",
            "1.1234567",
            "1234567890123456",
        ] {
            assert!(text.parse::<Quantity>().is_err(), "{text}");
            assert!(!pattern.is_match(text), "{text}");
        }
    }
}
