//! The key-value store of the agent. The broker does not interpret the values. They outlive it at the holder.

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use thiserror::Error;
use virtiofs_contract::control::store::{MAX_KEY, MAX_KEYS, MAX_TOTAL, MAX_VALUE};

use crate::holder::Hold;
use crate::holder::names::Part;
use crate::state_file::{StateFile, StateFileError};

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

type Values = BTreeMap<String, String>;

/// Most bytes of the values in JSON, in which a control character takes six.
const MOST: usize = 6 * MAX_TOTAL + 16 * MAX_KEYS;

/// Values by key.
#[derive(Debug)]
pub(crate) struct Store {
    content: Mutex<Content>,
}

#[derive(Debug)]
struct Content {
    values: Values,
    /// None: they do not outlive the broker.
    file: Option<StateFile<Values>>,
}

impl Store {
    /// The store with the values of an earlier broker, if the holder has them.
    pub(crate) fn open(hold: Hold, held: Option<Arc<OwnedFd>>) -> Result<Self, StateFileError> {
        let opened = held.map(|fd| StateFile::open(fd.try_clone()?)).transpose().unwrap_or_else(|error| {
            tracing::error!(%error, "values of the agent not read");
            hold.remove(Part::Store);
            None
        });
        let (file, values) = match opened {
            Some((file, values)) => (Some(file), values),
            None if hold.is_present() => {
                let mut file = StateFile::create("virtiofs-store", MOST)?;
                file.write(&Values::new())?;
                hold.deposit_copy(Part::Store, &file)?;
                (Some(file), Values::new())
            }
            None => (None, Values::new()),
        };
        Ok(Store { content: Mutex::new(Content { values, file }) })
    }

    fn content(&self) -> MutexGuard<'_, Content> {
        self.content.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Stores a value, or deletes the key.
    pub(crate) fn put(&self, key: String, value: Option<String>) -> Result<(), StoreError> {
        if key.is_empty() || key.len() > MAX_KEY {
            return Err(StoreError::Key(key.len()));
        }
        let mut content = self.content();
        match value {
            None if content.values.remove(&key).is_none() => return Ok(()),
            None => {}
            Some(value) => {
                check(&content.values, &key, &value)?;
                content.values.insert(key, value);
            }
        }
        content.record();
        Ok(())
    }

    pub(crate) fn get(&self, key: &str) -> Option<String> {
        self.content().values.get(key).cloned()
    }

    /// Keys with this prefix, in order.
    pub(crate) fn keys(&self, prefix: &str) -> Vec<String> {
        self.content().values.keys().filter(|key| key.starts_with(prefix)).cloned().collect()
    }
}

impl Content {
    fn record(&mut self) {
        let Content { values, file } = self;
        if let Some(file) = file
            && let Err(error) = file.write(values)
        {
            tracing::error!(%error, "values of the agent not recorded");
        }
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

    fn store() -> Store {
        Store::open(crate::holder::Holder::default().group(crate::holder::names::Group::Broker), None).unwrap()
    }

    #[test]
    fn values_are_read_by_the_next_broker() {
        let store = store();
        let file = StateFile::create("test", MOST).unwrap();
        let held = std::os::fd::AsFd::as_fd(&file).try_clone_to_owned().unwrap();
        store.content().file = Some(file);
        let hostile = "\u{1}".repeat(MAX_VALUE);
        for (key, value) in
            [("a", Some("1".into())), ("b", Some(hostile.clone())), ("a", None), ("c", Some("3".into()))]
        {
            store.put(key.into(), value).unwrap();
        }
        let hold = crate::holder::Holder::default().group(crate::holder::names::Group::Broker);
        let next = Store::open(hold, Some(Arc::new(held))).unwrap();
        assert_eq!((next.keys(""), next.get("b")), (vec!["b".into(), "c".into()], Some(hostile)));
    }

    #[test]
    fn values_are_stored_in_the_layout_of_their_version() {
        crate::state_file::check_layout("store", &Values::from([("a/b".into(), "1".into()), ("c".into(), "2".into())]));
    }

    #[test]
    fn value_is_stored_until_deleted() {
        let store = store();
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
        let store = store();
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
        let store = store();
        (0..MAX_KEYS).for_each(|key| put(&store, &key.to_string(), 0).unwrap());
        assert_eq!(put(&store, "one more", 0), Err(StoreError::Keys));
        put(&store, "7", 5).unwrap();
    }
}
