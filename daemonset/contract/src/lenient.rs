//! Reads JSON of a newer release: unknown fields are ignored, also those of types that deny them, and named.
//!
//! For reports and records. Requests are read as their types say, because an unknown field of a request may restrict what a
//! guest can do.

use std::cell::RefCell;

use serde::de::value::{MapDeserializer, SeqDeserializer};
use serde::de::{
    DeserializeOwned, DeserializeSeed, Deserializer, EnumAccess, IntoDeserializer, VariantAccess, Visitor,
};
use serde::forward_to_deserialize_any;
use serde_json::{Error, Value};

/// Reads a value. Returns the paths of the unknown fields too, such as `endpoint.engine.newField`.
///
/// # Errors
/// The bytes are not JSON, or not of this type whatever unknown fields are.
pub fn from_slice<T: DeserializeOwned>(bytes: &[u8]) -> Result<(T, Vec<String>), Error> {
    let unknown = RefCell::default();
    let reader = Reader { value: serde_json::from_slice(bytes)?, path: String::new(), unknown: &unknown };
    let value = T::deserialize(reader)?;
    Ok((value, unknown.into_inner()))
}

struct Reader<'a> {
    value: Value,
    path: String,
    unknown: &'a RefCell<Vec<String>>,
}

impl Reader<'_> {
    fn below(&self, name: &str, value: Value) -> Self {
        let path = if self.path.is_empty() { name.to_owned() } else { format!("{}.{name}", self.path) };
        Reader { value, path, unknown: self.unknown }
    }
}

impl<'de> IntoDeserializer<'de, Error> for Reader<'_> {
    type Deserializer = Self;

    fn into_deserializer(self) -> Self {
        self
    }
}

impl<'de> Deserializer<'de> for Reader<'_> {
    type Error = Error;

    fn deserialize_any<V: Visitor<'de>>(mut self, visitor: V) -> Result<V::Value, Error> {
        match self.value.take() {
            Value::Array(values) => {
                let elements = values.into_iter().enumerate();
                let elements = elements.map(|(number, value)| self.below(&number.to_string(), value));
                visitor.visit_seq(SeqDeserializer::new(elements))
            }
            Value::Object(fields) => {
                let fields = fields.into_iter().map(|(name, value)| {
                    let reader = self.below(&name, value);
                    (name, reader)
                });
                visitor.visit_map(MapDeserializer::new(fields))
            }
            plain => plain.deserialize_any(visitor),
        }
    }

    fn deserialize_option<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        if self.value.is_null() { visitor.visit_none() } else { visitor.visit_some(self) }
    }

    fn deserialize_newtype_struct<V: Visitor<'de>>(self, _: &'static str, visitor: V) -> Result<V::Value, Error> {
        visitor.visit_newtype_struct(self)
    }

    fn deserialize_struct<V: Visitor<'de>>(
        mut self,
        _: &'static str,
        known: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Error> {
        if let Value::Object(fields) = &mut self.value {
            let unknown: Vec<String> = fields.keys().filter(|name| !known.contains(&name.as_str())).cloned().collect();
            unknown.iter().for_each(|name| drop(fields.remove(name)));
            let paths = unknown.iter().map(|name| self.below(name, Value::Null).path);
            self.unknown.borrow_mut().extend(paths);
        }
        self.deserialize_any(visitor)
    }

    fn deserialize_enum<V: Visitor<'de>>(
        mut self,
        name: &'static str,
        variants: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Error> {
        match self.value.take() {
            Value::Object(variant) if variant.len() == 1 => {
                let (name, content) = variant.into_iter().next().unwrap_or_default();
                let content = self.below(&name, content);
                visitor.visit_enum(Variant { name, content })
            }
            plain => plain.deserialize_enum(name, variants, visitor),
        }
    }

    forward_to_deserialize_any! {
        bool i8 i16 i32 i64 i128 u8 u16 u32 u64 u128 f32 f64 char str string bytes byte_buf unit unit_struct seq tuple
        tuple_struct map identifier ignored_any
    }
}

/// A variant with content.
struct Variant<'a> {
    name: String,
    content: Reader<'a>,
}

impl<'de, 'a> EnumAccess<'de> for Variant<'a> {
    type Error = Error;
    type Variant = Reader<'a>;

    fn variant_seed<S: DeserializeSeed<'de>>(self, seed: S) -> Result<(S::Value, Reader<'a>), Error> {
        Ok((seed.deserialize(Value::String(self.name))?, self.content))
    }
}

impl<'de> VariantAccess<'de> for Reader<'_> {
    type Error = Error;

    fn unit_variant(self) -> Result<(), Error> {
        serde::Deserialize::deserialize(self)
    }

    fn newtype_variant_seed<S: DeserializeSeed<'de>>(self, seed: S) -> Result<S::Value, Error> {
        seed.deserialize(self)
    }

    fn tuple_variant<V: Visitor<'de>>(self, _: usize, visitor: V) -> Result<V::Value, Error> {
        self.deserialize_any(visitor)
    }

    fn struct_variant<V: Visitor<'de>>(self, known: &'static [&'static str], visitor: V) -> Result<V::Value, Error> {
        self.deserialize_struct("", known, visitor)
    }
}

#[cfg(test)]
mod tests {
    use serde::{Deserialize, Serialize};

    use super::*;

    #[derive(Debug, PartialEq, Serialize, Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Inner {
        number: u64,
        #[serde(default)]
        text: Option<String>,
    }

    #[derive(Debug, PartialEq, Serialize, Deserialize)]
    enum Kind {
        Plain,
        Wrapped(Box<Inner>),
        Fields { inner: Inner, pair: (u32, u32) },
    }

    #[derive(Debug, PartialEq, Serialize, Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Outer {
        kinds: Vec<Kind>,
        by_name: std::collections::BTreeMap<String, Inner>,
        maybe: Option<Inner>,
        fixed: [i64; 2],
    }

    fn inner(number: u64) -> Inner {
        Inner { number, text: Some("x".into()) }
    }

    fn outer() -> Outer {
        let fields = Kind::Fields { inner: inner(2), pair: (3, 4) };
        let kinds = vec![Kind::Plain, Kind::Wrapped(Box::new(inner(1))), fields];
        Outer { kinds, by_name: [("a".to_owned(), inner(u64::MAX))].into(), maybe: Some(inner(5)), fixed: [-1, 2] }
    }

    #[test]
    fn values_without_unknown_fields_are_read_as_usual() {
        let (read, unknown) = from_slice::<Outer>(&serde_json::to_vec(&outer()).unwrap()).unwrap();
        assert_eq!((read, unknown), (outer(), vec![]));
    }

    #[test]
    fn unknown_fields_are_ignored_and_named_at_every_depth() {
        let mut newer = serde_json::to_value(outer()).unwrap();
        newer["new"] = 1.into();
        newer["kinds"][1]["Wrapped"]["deep"] = 2.into();
        newer["kinds"][2]["Fields"]["also"] = 3.into();
        newer["kinds"][2]["Fields"]["inner"]["more"] = serde_json::json!({"a": [1]});
        newer["by_name"]["a"]["last"] = serde_json::Value::Null;
        let (read, mut unknown) = from_slice::<Outer>(newer.to_string().as_bytes()).unwrap();
        assert_eq!(read, outer());
        unknown.sort();
        let expected =
            ["by_name.a.last", "kinds.1.Wrapped.deep", "kinds.2.Fields.also", "kinds.2.Fields.inner.more", "new"];
        assert_eq!(unknown, expected);
    }

    #[test]
    fn missing_and_wrong_fields_are_errors() {
        let without = serde_json::json!({"number": "text"});
        assert!(from_slice::<Inner>(without.to_string().as_bytes()).is_err());
        let error = from_slice::<Inner>(b"{\"text\": \"x\"}").unwrap_err().to_string();
        assert!(error.contains("number"), "{error}");
        assert!(from_slice::<Kind>(b"\"New\"").is_err(), "an unknown variant has no meaning");
        assert!(from_slice::<Inner>(b"{\"number\": 1} more").is_err());
    }
}
