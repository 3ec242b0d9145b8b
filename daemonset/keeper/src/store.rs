//! Descriptors by name, in groups. Pure: generic over `F`, the type of a descriptor.
//!
//! The group of a descriptor is its name up to the first `.`. When a polled descriptor hangs up, its whole group is
//! dropped. This frees the memory of a VM that has ended, without any knowledge of VMs here.

use std::collections::{BTreeMap, BTreeSet};

use thiserror::Error;

/// Maximum numbers of descriptors and groups.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Bounds {
    pub(crate) descriptors: usize,
    pub(crate) groups: usize,
}

/// Reason why a descriptor is not stored.
#[derive(Debug, Error, PartialEq, Eq)]
pub(crate) enum StoreError {
    #[error("{0} descriptors are held, which is the limit")]
    Descriptors(usize),
    #[error("{0} groups are held, which is the limit")]
    Groups(usize),
}

/// What became of a descriptor that was to be stored. One that is not stored is given back, because closing it can block.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Insertion<F> {
    Stored(Token),
    /// The same file is held under this name.
    Known(F),
    Full(StoreError, F),
}

/// Identifies a stored descriptor for as long as it is held.
pub(crate) type Token = u64;

/// A stored descriptor.
#[derive(Debug)]
struct Entry<F> {
    name: String,
    fd: F,
}

/// The stored descriptors.
#[derive(Debug)]
pub(crate) struct Store<F> {
    bounds: Bounds,
    entries: BTreeMap<Token, Entry<F>>,
    by_name: BTreeMap<String, Vec<Token>>,
    /// Numbers of descriptors by group.
    groups: BTreeMap<String, usize>,
    /// Groups that were dropped because a descriptor hung up, until one of their names is removed.
    hung_up: BTreeSet<String>,
    next: Token,
}

/// The group of a name.
fn group_of(name: &str) -> &str {
    name.split_once('.').map_or(name, |(group, _)| group)
}

impl<F> Store<F> {
    pub(crate) fn new(bounds: Bounds) -> Self {
        let (entries, by_name, groups) = (BTreeMap::new(), BTreeMap::new(), BTreeMap::new());
        Store { bounds, entries, by_name, groups, hung_up: BTreeSet::new(), next: 1 }
    }

    /// Stores a descriptor, unless `same` is true for one that has this name, or a limit is reached.
    pub(crate) fn insert(&mut self, name: &str, fd: F, same: impl Fn(&F, &F) -> bool) -> Insertion<F> {
        let known = self.by_name.get(name).into_iter().flatten();
        if known.filter_map(|token| self.entries.get(token)).any(|entry| same(&entry.fd, &fd)) {
            return Insertion::Known(fd);
        }
        if self.entries.len() >= self.bounds.descriptors {
            return Insertion::Full(StoreError::Descriptors(self.bounds.descriptors), fd);
        }
        let group = group_of(name);
        if !self.groups.contains_key(group) && self.groups.len() >= self.bounds.groups {
            return Insertion::Full(StoreError::Groups(self.bounds.groups), fd);
        }
        *self.groups.entry(group.to_owned()).or_default() += 1;
        self.hung_up.remove(group);
        let token = self.next;
        self.next += 1;
        self.entries.insert(token, Entry { name: name.to_owned(), fd });
        self.by_name.entry(name.to_owned()).or_default().push(token);
        Insertion::Stored(token)
    }

    /// Removes all descriptors of a name, and forgets that its group hung up.
    pub(crate) fn remove(&mut self, name: &str) -> Vec<F> {
        self.hung_up.remove(group_of(name));
        let tokens = self.by_name.get(name).cloned().unwrap_or_default();
        tokens.into_iter().filter_map(|token| self.take(token)).collect()
    }

    /// A descriptor hung up: removes its group. Returns the name of the group and its descriptors.
    pub(crate) fn hang_up(&mut self, token: Token) -> Option<(String, Vec<F>)> {
        let group = group_of(&self.entries.get(&token)?.name).to_owned();
        let of_group = |(token, entry): (&Token, &Entry<F>)| (group_of(&entry.name) == group).then_some(*token);
        let tokens: Vec<Token> = self.entries.iter().filter_map(of_group).collect();
        let fds = tokens.into_iter().filter_map(|token| self.take(token)).collect();
        // Its names may never be removed, so the number of these groups is bounded here.
        if self.hung_up.len() >= self.bounds.groups {
            self.hung_up.pop_first();
        }
        self.hung_up.insert(group.clone());
        Some((group, fds))
    }

    fn take(&mut self, token: Token) -> Option<F> {
        let Entry { name, fd } = self.entries.remove(&token)?;
        if let Some(tokens) = self.by_name.get_mut(&name) {
            tokens.retain(|other| *other != token);
            if tokens.is_empty() {
                self.by_name.remove(&name);
            }
        }
        let group = group_of(&name);
        if let Some(count) = self.groups.get_mut(group) {
            *count -= 1;
            if *count == 0 {
                self.groups.remove(group);
            }
        }
        Some(fd)
    }

    /// A stored descriptor.
    pub(crate) fn get(&self, token: Token) -> Option<&F> {
        self.entries.get(&token).map(|entry| &entry.fd)
    }

    /// All descriptors with their names, the oldest first.
    pub(crate) fn all(&self) -> impl Iterator<Item = (&str, &F)> {
        self.entries.values().map(|entry| (entry.name.as_str(), &entry.fd))
    }

    /// Groups that were dropped because a descriptor hung up.
    pub(crate) fn hung_up(&self) -> impl Iterator<Item = &str> {
        self.hung_up.iter().map(String::as_str)
    }

    /// Numbers of descriptors and groups.
    pub(crate) fn len(&self) -> (usize, usize) {
        (self.entries.len(), self.groups.len())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn store(descriptors: usize, groups: usize) -> Store<u32> {
        Store::new(Bounds { descriptors, groups })
    }

    fn put(store: &mut Store<u32>, name: &str, fd: u32) -> Result<Option<Token>, StoreError> {
        match store.insert(name, fd, |a, b| a == b) {
            Insertion::Stored(token) => Ok(Some(token)),
            Insertion::Known(_) => Ok(None),
            Insertion::Full(error, _) => Err(error),
        }
    }

    fn held(store: &Store<u32>) -> Vec<(&str, u32)> {
        store.all().map(|(name, fd)| (name, *fd)).collect()
    }

    #[test]
    fn name_may_have_several_descriptors_and_loses_all_at_once() {
        let mut store = store(10, 10);
        assert!(put(&mut store, "a.x", 1).unwrap().is_some());
        assert!(put(&mut store, "a.x", 2).unwrap().is_some());
        assert_eq!(put(&mut store, "a.x", 1), Ok(None), "the same open file");
        assert!(put(&mut store, "a.y", 1).unwrap().is_some(), "another name");
        assert_eq!(store.len(), (3, 1));
        assert_eq!(store.remove("a.x"), [1, 2]);
        assert!(store.remove("a.x").is_empty());
        assert_eq!((held(&store), store.len()), (vec![("a.y", 1)], (1, 1)));
    }

    #[test]
    fn hang_up_drops_the_group_and_no_other() {
        let mut store = store(10, 10);
        let vmm = put(&mut store, "session-1.vmm", 1).unwrap().unwrap();
        put(&mut store, "session-1.memory", 2).unwrap();
        put(&mut store, "session-10.vmm", 3).unwrap();
        put(&mut store, "session", 4).unwrap();
        assert_eq!(store.hang_up(vmm), Some(("session-1".to_owned(), vec![1, 2])));
        assert_eq!(held(&store), [("session-10.vmm", 3), ("session", 4)]);
        assert_eq!(store.hang_up(vmm), None, "it is gone");
        assert_eq!(store.hung_up().collect::<Vec<_>>(), ["session-1"]);
        store.remove("session-1.vmm");
        assert_eq!(store.hung_up().count(), 0);
    }

    #[test]
    fn limits_are_enforced() {
        let mut store = store(3, 2);
        for (name, fd, expected) in [
            ("a.1", 1, Ok(true)),
            ("b.1", 2, Ok(true)),
            ("c.1", 3, Err(StoreError::Groups(2))),
            ("a.2", 4, Ok(true)),
            ("a.3", 5, Err(StoreError::Descriptors(3))),
            ("a.2", 4, Ok(false)),
        ] {
            assert_eq!(put(&mut store, name, fd).map(|token| token.is_some()), expected, "{name}");
        }
        store.remove("b.1");
        assert!(put(&mut store, "c.1", 3).is_ok());
    }

    #[test]
    fn list_of_hung_up_groups_is_bounded() {
        let mut store = store(10, 2);
        for round in 0..5 {
            let token = put(&mut store, &format!("g{round}.vmm"), round).unwrap().unwrap();
            store.hang_up(token);
        }
        assert_eq!(store.hung_up().count(), 2);
        assert_eq!(store.len(), (0, 0));
    }
}
