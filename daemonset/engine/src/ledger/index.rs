//! Hash indexes whose chains run through the entries themselves. Linear hashing grows by one bucket at a time, so no
//! operation waits for a table to be copied.

use super::change::Change;

/// Longest chain that is followed: a longer one means a damaged ledger, or a guest that has guessed the key.
const MAX_STEPS: u32 = 4096;

/// Longest chain that is split in one change; a bucket with a longer one is split later.
const MAX_MOVED: usize = 64;

/// An index: its buckets and its entries.
pub(super) struct Index<E> {
    /// First word of the bucket table (half words).
    pub(super) buckets: u32,
    /// Header word with the number of buckets in use.
    pub(super) in_use: u32,
    /// Most buckets.
    pub(super) capacity: u32,
    /// Access to the entries.
    pub(super) entries: E,
}

/// What an index needs to know about its entries.
pub(super) trait Entries {
    /// The word whose upper half is the number of the next entry of the chain.
    fn next_word(&self, entry: u32) -> Option<u32>;
    /// The entry's hash.
    fn hash(&self, change: &Change<'_>, entry: u32) -> u32;
}

/// The bucket of a hash among `buckets`.
fn bucket_of(hash: u32, buckets: u32) -> u32 {
    let mask = buckets.next_power_of_two() - 1;
    let bucket = hash & mask;
    if bucket < buckets { bucket } else { hash & (mask >> 1) }
}

impl<E: Entries> Index<E> {
    fn bucket_count(&self, change: &Change<'_>) -> u32 {
        (change.get(self.in_use) as u32).clamp(1, self.capacity)
    }

    /// The entries in the bucket of this hash, the latest first.
    pub(super) fn candidates<'c>(&'c self, change: &'c Change<'_>, hash: u32) -> impl Iterator<Item = u32> + 'c {
        let bucket = bucket_of(hash, self.bucket_count(change));
        self.chain(change, change.half(self.buckets, bucket))
    }

    fn chain<'c>(&'c self, change: &'c Change<'_>, first: u32) -> impl Iterator<Item = u32> + 'c {
        let mut next = first;
        let mut steps = 0;
        std::iter::from_fn(move || {
            let entry = next;
            let word = self.entries.next_word(entry).filter(|_| steps < MAX_STEPS)?;
            steps += 1;
            next = change.high(word);
            Some(entry)
        })
    }

    /// Adds an entry, and grows the index by a bucket if `entries` (this one included) exceed the buckets.
    pub(super) fn insert(&self, change: &mut Change<'_>, entry: u32, entries: u64) {
        let hash = self.entries.hash(change, entry);
        self.push(change, bucket_of(hash, self.bucket_count(change)), entry);
        if entries > u64::from(self.bucket_count(change)) {
            self.grow(change);
        }
    }

    fn push(&self, change: &mut Change<'_>, bucket: u32, entry: u32) {
        if let Some(word) = self.entries.next_word(entry) {
            change.set_high(word, change.half(self.buckets, bucket));
            change.set_half(self.buckets, bucket, entry);
        }
    }

    /// Removes an entry.
    pub(super) fn remove(&self, change: &mut Change<'_>, entry: u32) {
        let hash = self.entries.hash(change, entry);
        let bucket = bucket_of(hash, self.bucket_count(change));
        let Some(next) = self.entries.next_word(entry).map(|word| change.high(word)) else { return };
        let first = change.half(self.buckets, bucket);
        if first == entry {
            change.set_half(self.buckets, bucket, next);
            return;
        }
        let before = self.chain(change, first).find(|candidate| self.next(change, *candidate) == Some(entry));
        if let Some(word) = before.and_then(|before| self.entries.next_word(before)) {
            change.set_high(word, next);
        }
    }

    fn next(&self, change: &Change<'_>, entry: u32) -> Option<u32> {
        self.entries.next_word(entry).map(|word| change.high(word))
    }

    /// Splits the next bucket.
    fn grow(&self, change: &mut Change<'_>) {
        let count = self.bucket_count(change);
        if count >= self.capacity {
            return;
        }
        let old = bucket_of(count, count);
        let entries: Vec<u32> = self.chain(change, change.half(self.buckets, old)).take(MAX_MOVED + 1).collect();
        if entries.len() > MAX_MOVED || !change.has_room(2 * entries.len() + 8) {
            return;
        }
        change.set(self.in_use, u64::from(count) + 1);
        change.set_half(self.buckets, old, 0);
        change.set_half(self.buckets, count, 0);
        for entry in entries.into_iter().rev() {
            let bucket = bucket_of(self.entries.hash(change, entry), count + 1);
            self.push(change, bucket, entry);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::bucket_of;

    #[test]
    fn growing_by_one_moves_entries_of_one_bucket_only() {
        for buckets in 1..200u32 {
            let split = bucket_of(buckets, buckets);
            for hash in 0..2000 {
                let (before, after) = (bucket_of(hash, buckets), bucket_of(hash, buckets + 1));
                assert!(before < buckets && after <= buckets);
                assert!(before == after || (before == split && after == buckets), "{hash} of {buckets}");
            }
        }
    }
}
