//! Layout of the ledger.
//!
//! The unit is the word of 8 bytes. The capacities of the tables follow from the size of the file alone, so the broker,
//! which never reads it, decides by the size that it creates.
//!
//! | part | words | content |
//! |---|---|---|
//! | header | 512 | version, counts, high-water marks, the guest's FUSE_INIT |
//! | redo record | 4096 | the change that is being made |
//! | in-flight records | 8192 per ring | the request that is being served, and the lookups it has counted |
//! | name buckets, identity buckets | half a word each | linear hashing, grown one bucket at a time |
//! | nodes | 6 each | nodes that the guest holds |
//! | handles | 24 each | files and directories that the guest has open |
//! | page classes | 1 each | size of the cells in the page |
//! | pages | 512 each | cells for names |

use virtiofs_contract::engine::QUEUES;

/// "VFSLEDGR".
pub(super) const MAGIC: u64 = 0x5647_4445_4c53_4656;

/// Incremented with every change that another engine would misread.
pub(super) const VERSION: u64 = 2;

/// Words of one page.
pub(super) const PAGE: u32 = 512;

/// Words of the header, by name.
pub(super) mod header {
    pub(crate) const MAGIC: u32 = 0;
    pub(crate) const VERSION: u32 = 1;
    /// Two words: the key of the hash, so that a guest cannot choose names that collide.
    pub(crate) const KEY: u32 = 2;
    /// Slots at or above were never used.
    pub(crate) const NODES_HIGH: u32 = 4;
    pub(crate) const HANDLES_HIGH: u32 = 5;
    pub(crate) const PAGES_HIGH: u32 = 6;
    pub(crate) const NODES: u32 = 7;
    pub(crate) const HANDLES: u32 = 8;
    pub(crate) const NAMES: u32 = 9;
    pub(crate) const NAME_BUCKETS: u32 = 10;
    pub(crate) const IDENTITY_BUCKETS: u32 = 11;
    /// Length of the recorded FUSE_INIT request in bytes; 0: not mounted.
    pub(crate) const INIT_REQUEST_LENGTH: u32 = 12;
    pub(crate) const INIT_REPLY_LENGTH: u32 = 13;
    /// How often the guest has mounted.
    pub(crate) const MOUNTS: u32 = 14;
    pub(crate) const INIT_REQUEST: u32 = 32;
    pub(crate) const INIT_REPLY: u32 = 64;
    /// Most bytes of either.
    pub(crate) const INIT_BYTES: usize = 256;
}

/// First word of the redo record: the number of pairs that follow it.
pub(super) const REDO: u32 = PAGE;
/// Most pairs of address and value in one change.
pub(super) const REDO_PAIRS: usize = 2000;
const REDO_WORDS: u32 = 8 * PAGE;

/// First word of the in-flight records.
const FLIGHT: u32 = REDO + REDO_WORDS;
/// Words of one ring's record.
const FLIGHT_WORDS: u32 = 16 * PAGE;
/// Offset of the counted lookups in a ring's record: half a word each.
pub(super) const FLIGHT_REFS: u32 = PAGE;
/// Most lookups that one request may count: more than a reply of 1 MiB has room for.
pub(super) const MAX_REFS: u32 = (FLIGHT_WORDS - FLIGHT_REFS) * 2;

const TABLES: u32 = FLIGHT + FLIGHT_WORDS * QUEUES as u32;

/// Words of a node.
pub(super) const NODE_WORDS: u32 = 6;
/// Words of a handle.
pub(super) const HANDLE_WORDS: u32 = 24;

/// Most handles of a ledger.
const MAX_HANDLES: u32 = 1 << 18;

/// Buckets of an empty index.
pub(super) const FIRST_BUCKETS: u32 = 64;

/// Offsets and capacities of the tables of a ledger of a given size.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Geometry {
    pub(super) name_buckets: u32,
    pub(super) identity_buckets: u32,
    pub(super) nodes: u32,
    pub(super) handles: u32,
    pub(super) page_classes: u32,
    pub(super) pages: u32,
    /// Capacity for nodes; also for buckets of each index.
    pub(super) node_capacity: u32,
    pub(super) handle_capacity: u32,
    pub(super) page_capacity: u32,
}

impl Geometry {
    /// The geometry of a ledger of `words` words; none: too few.
    pub(super) fn of(words: u32) -> Option<Self> {
        let room = words.checked_sub(TABLES)?;
        // Of every 32 words for nodes and names: one for the two index entries, six for the node, the rest for
        // names, of which an average one takes six.
        let handle_capacity = MAX_HANDLES.min(room / (16 * HANDLE_WORDS));
        let room = room - handle_capacity * HANDLE_WORDS;
        let node_capacity = room / 32 / PAGE * PAGE;
        if node_capacity == 0 {
            return None;
        }
        let name_buckets = TABLES;
        let identity_buckets = name_buckets + node_capacity / 2;
        let nodes = identity_buckets + node_capacity / 2;
        let handles = nodes + node_capacity * NODE_WORDS;
        let page_classes = handles + handle_capacity * HANDLE_WORDS;
        let left = words - page_classes;
        let page_capacity = (left / (PAGE + 1)).checked_sub(1)?;
        let pages = (page_classes + page_capacity).next_multiple_of(PAGE);
        Some(Geometry {
            name_buckets,
            identity_buckets,
            nodes,
            handles,
            page_classes,
            pages,
            node_capacity,
            handle_capacity,
            page_capacity,
        })
    }

    /// First word of a ring's in-flight record.
    pub(super) fn flight(ring: usize) -> u32 {
        FLIGHT + FLIGHT_WORDS * (ring.min(QUEUES - 1)) as u32
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables_do_not_overlap() {
        for megabytes in [8, 64, 1024, 20_000] {
            let words = megabytes * ((1 << 20) / 8);
            let g = Geometry::of(words).unwrap();
            let starts = [g.name_buckets, g.identity_buckets, g.nodes, g.handles, g.page_classes, g.pages];
            assert!(starts.is_sorted(), "{g:?}");
            assert!(g.nodes + g.node_capacity * NODE_WORDS <= g.handles);
            assert!(g.pages + g.page_capacity * PAGE <= words, "{g:?}");
            assert!(u64::from(g.page_capacity) * 256 / 3 >= u64::from(g.node_capacity), "room for a name per node");
        }
        assert_eq!(Geometry::of(1000), None);
    }

    #[test]
    fn the_fixed_parts_do_not_overlap() {
        assert!(header::INIT_REPLY + (header::INIT_BYTES / 8) as u32 <= REDO);
        assert!(header::INIT_REQUEST + (header::INIT_BYTES / 8) as u32 <= header::INIT_REPLY);
        assert!(REDO + 1 + 2 * REDO_PAIRS as u32 <= FLIGHT);
        assert_eq!(Geometry::flight(QUEUES - 1) + FLIGHT_WORDS, TABLES);
    }
}
