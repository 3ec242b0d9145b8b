//! Directory entries in replies to READDIR and READDIRPLUS.

use zerocopy::FromBytes;

use super::wire::{Dirent, DirentPlus, EntryOut};

/// A directory entry.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// The name's bytes.
    pub name: Vec<u8>,
    /// Inode number on the host.
    pub ino: u64,
    /// Position at which a later read continues after this entry.
    pub next: u64,
    /// Type as in `d_type`.
    pub kind: u32,
    /// The node, which READDIRPLUS also looks up. Node id 0: not looked up.
    pub found: Option<EntryOut>,
}

/// A malformed listing.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum DirentError {
    /// The listing ends within an entry.
    #[error("the listing ends within the entry at byte {at}")]
    Truncated {
        /// Offset of the entry.
        at: usize,
    },
    /// The name of the entry is invalid.
    #[error("the entry at byte {at} has an invalid name {name:?}")]
    Name {
        /// Offset of the entry.
        at: usize,
        /// The name, escaped.
        name: String,
    },
}

/// Parses a READDIR reply.
pub fn parse(listing: &[u8]) -> Result<Vec<Entry>, DirentError> {
    parse_with(listing, |bytes| {
        let (dirent, rest) = Dirent::read_from_prefix(bytes).ok()?;
        Some((None, dirent, rest))
    })
}

/// Parses a READDIRPLUS reply.
pub fn parse_plus(listing: &[u8]) -> Result<Vec<Entry>, DirentError> {
    parse_with(listing, |bytes| {
        let (plus, rest) = DirentPlus::read_from_prefix(bytes).ok()?;
        Some((Some(plus.entry), plus.dirent, rest))
    })
}

type Head<'a> = Option<(Option<EntryOut>, Dirent, &'a [u8])>;

fn parse_with(listing: &[u8], head: impl for<'a> Fn(&'a [u8]) -> Head<'a>) -> Result<Vec<Entry>, DirentError> {
    let mut entries = Vec::new();
    let mut rest = listing;
    while !rest.is_empty() {
        let at = listing.len() - rest.len();
        let truncated = DirentError::Truncated { at };
        let (found, dirent, after) = head(rest).ok_or(truncated)?;
        let len = dirent.namelen as usize;
        // Entries are padded to 8 bytes (FUSE_DIRENT_ALIGN).
        let padded = len.next_multiple_of(8);
        let (Some(name), Some(after)) = (after.get(..len), after.get(padded..)) else {
            return Err(DirentError::Truncated { at });
        };
        if name.is_empty() || name.contains(&b'/') || name.contains(&0) {
            let name = String::from_utf8_lossy(name).into_owned();
            return Err(DirentError::Name { at, name });
        }
        entries.push(Entry { name: name.to_vec(), ino: dirent.ino, next: dirent.off, kind: dirent.kind, found });
        rest = after;
    }
    Ok(entries)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use zerocopy::IntoBytes;

    fn encode(entries: &[Entry]) -> Vec<u8> {
        let mut bytes = Vec::new();
        for entry in entries {
            let dirent = Dirent { ino: entry.ino, off: entry.next, namelen: entry.name.len() as u32, kind: entry.kind };
            if let Some(found) = entry.found {
                bytes.extend_from_slice(found.as_bytes());
            }
            bytes.extend_from_slice(dirent.as_bytes());
            bytes.extend_from_slice(&entry.name);
            bytes.resize(bytes.len().next_multiple_of(8), 0);
        }
        bytes
    }

    fn entries(plus: bool) -> impl Strategy<Value = Vec<Entry>> {
        let name = prop::collection::vec(any::<u8>().prop_filter("a name's byte", |b| *b != 0 && *b != b'/'), 1..256);
        let entry = (name, any::<u64>(), any::<u64>(), 0_u32..16, any::<u64>()).prop_map(
            move |(name, ino, next, kind, nodeid)| Entry {
                name,
                ino,
                next,
                kind,
                found: plus.then(|| EntryOut { nodeid, ..EntryOut::default() }),
            },
        );
        prop::collection::vec(entry, 0..8)
    }

    proptest! {
        #[test]
        fn encoded_entries_are_parsed(plain in entries(false), plus in entries(true)) {
            prop_assert_eq!(parse(&encode(&plain)).unwrap(), plain);
            prop_assert_eq!(parse_plus(&encode(&plus)).unwrap(), plus);
        }

        #[test]
        fn garbage_is_an_error_not_a_panic(bytes in prop::collection::vec(any::<u8>(), 0..512)) {
            let _ = parse(&bytes);
            let _ = parse_plus(&bytes);
        }
    }

    #[test]
    fn a_name_with_a_slash_is_rejected() {
        let entry = Entry { name: b"a/b".to_vec(), ino: 1, next: 1, kind: 8, found: None };
        assert!(matches!(parse(&encode(&[entry])), Err(DirentError::Name { at: 0, .. })));
    }
}
