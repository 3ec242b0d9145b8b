//! The key-value store of the agent. The broker does not interpret the values.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use thiserror::Error;
use virtiofs_contract::control::store::{MAX_KEY, MAX_KEYS, MAX_TOTAL, MAX_VALUE};

/// Why a value is not stored. The old value stays.
#[derive(Debug, Error, PartialEq, Eq)]
pub(crate) enum StoreError {
    #[error("key: {0} bytes; 1 to {MAX_KEY} are expected")]
    Key(usize),
    #[error("value: {0} bytes; at most {MAX_VALUE} are kept under one key")]
    Value(usize),
    #[error("{MAX_KEYS} keys are kept already; put nothing under one that is not needed any more")]
    Keys,
    #[error("{0} bytes of keys and values; at most {MAX_TOTAL} are kept")]
    Total(usize),
}

/// Values by key.
#[derive(Debug, Default)]
pub(crate) struct Store {
    values: Mutex<BTreeMap<String, String>>,
}

impl Store {
    fn values(&self) -> MutexGuard<'_, BTreeMap<String, String>> {
        self.values.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Stores a value, or deletes the key.
    pub(crate) fn put(&self, key: String, value: Option<String>) -> Result<(), StoreError> {
        if key.is_empty() || key.len() > MAX_KEY {
            return Err(StoreError::Key(key.len()));
        }
        let mut values = self.values();
        let Some(value) = value else {
            values.remove(&key);
            return Ok(());
        };
        check(&values, &key, &value)?;
        values.insert(key, value);
        Ok(())
    }

    pub(crate) fn get(&self, key: &str) -> Option<String> {
        self.values().get(key).cloned()
    }

    /// Keys with this prefix, in order.
    pub(crate) fn keys(&self, prefix: &str) -> Vec<String> {
        self.values().keys().filter(|key| key.starts_with(prefix)).cloned().collect()
    }
}

fn check(values: &BTreeMap<String, String>, key: &str, value: &str) -> Result<(), StoreError> {
    if value.len() > MAX_VALUE {
        return Err(StoreError::Value(value.len()));
    }
    if !values.contains_key(key) && values.len() >= MAX_KEYS {
        return Err(StoreError::Keys);
    }
    let others: usize =
        values.iter().filter(|(other, _)| *other != key).map(|(key, value)| key.len() + value.len()).sum();
    match others + key.len() + value.len() {
        total if total > MAX_TOTAL => Err(StoreError::Total(total)),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn put(store: &Store, key: &str, bytes: usize) -> Result<(), StoreError> {
        store.put(key.into(), Some("x".repeat(bytes)))
    }

    #[test]
    fn value_is_stored_until_deleted() {
        let store = Store::default();
        put(&store, "shares/a", 3).unwrap();
        put(&store, "shares/b", 0).unwrap();
        put(&store, "totals", 1).unwrap();
        assert_eq!(store.get("shares/a").as_deref(), Some("xxx"));
        assert_eq!(store.keys("shares/"), ["shares/a", "shares/b"]);
        store.put("shares/a".into(), None).unwrap();
        assert_eq!((store.get("shares/a"), store.keys("").len()), (None, 2));
    }

    #[test]
    fn value_over_the_limit_is_refused() {
        let store = Store::default();
        put(&store, "kept", 1).unwrap();
        assert_eq!(put(&store, "", 1), Err(StoreError::Key(0)));
        assert_eq!(put(&store, &"k".repeat(MAX_KEY + 1), 1), Err(StoreError::Key(MAX_KEY + 1)));
        assert_eq!(put(&store, "kept", MAX_VALUE + 1), Err(StoreError::Value(MAX_VALUE + 1)));
        assert_eq!(store.get("kept").as_deref(), Some("x"));
        let mut full = 0;
        while put(&store, &format!("big-{full:02}"), MAX_VALUE).is_ok() {
            full += 1;
        }
        assert_eq!(full, MAX_TOTAL / MAX_VALUE - 1);
        assert!(matches!(put(&store, "more", MAX_VALUE), Err(StoreError::Total(_))));
        put(&store, "big-00", MAX_VALUE).unwrap();
    }

    #[test]
    fn number_of_keys_is_limited() {
        let store = Store::default();
        (0..MAX_KEYS).for_each(|key| put(&store, &key.to_string(), 0).unwrap());
        assert_eq!(put(&store, "one more", 0), Err(StoreError::Keys));
        put(&store, "7", 5).unwrap();
    }
}
