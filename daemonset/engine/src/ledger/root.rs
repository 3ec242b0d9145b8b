//! Which directory the ledger tells of.
//!
//! A share's source may be unmounted and another mounted in its place. What the guest was told under the old one means
//! nothing under the new one, though inode numbers may well be the same: file systems begin to count at the same
//! number. So the domain of all identities begins at the root, and changes with it.

use super::Ledger;
use super::change::{Change, pair};
use super::handles::Handle;
use super::layout::header;
use super::nodes::{Identity, Node, ROOT};

impl Ledger {
    /// This engine serves the directory that `root` stands for: equal for the same directory, never 0.
    pub(crate) fn serve(&mut self, root: u64) {
        self.root = root;
    }

    /// To be called with [`Ledger::take_over`]: makes the ledger one of the directory that this engine serves. True:
    /// it was of another one.
    pub(crate) fn accept_root(&mut self) -> bool {
        let known = self.identity(ROOT);
        if known.ino == self.root {
            return false;
        }
        // None is recorded where the ledger is of an engine that did not record any: then it is the same.
        let changed = known.ino != 0;
        if changed {
            self.forget_file_handles();
        }
        let domain = if changed { another_domain(known.domain, self.root) } else { known.domain };
        let words = self.words.clone();
        let mut change = Change::new(&words);
        if let Some(root) = Node::at(&self.geometry, ROOT) {
            root.set_identity(&mut change, Identity { ino: self.root, domain });
        }
        change.commit();
        changed
    }

    /// On another file system a file handle may open another file: that of a copy of the first one surely does. What
    /// is open is then to be had from the broker's keeping, or not at all.
    fn forget_file_handles(&self) {
        let high = (self.words.get(header::HANDLES_HIGH) as u32).min(self.geometry.handle_capacity);
        for handle in (1..high).filter_map(|slot| Handle::at(&self.geometry, slot)) {
            let mut change = Change::new(&self.words);
            handle.forget_file_handle(&mut change);
            change.commit();
        }
    }
}

fn another_domain(domain: u32, root: u64) -> u32 {
    let mixed = (root ^ pair(domain, domain)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    // Never the domain that it was.
    if (mixed >> 32) as u32 == domain { !domain } else { (mixed >> 32) as u32 }
}

#[cfg(test)]
mod tests {
    use super::another_domain;

    #[test]
    fn another_root_is_another_domain() {
        for domain in [0, 1, u32::MAX] {
            for root in [1, 2, u64::MAX, 0x9e37_79b9_0000_0001] {
                assert_ne!(another_domain(domain, root), domain);
            }
        }
        assert_ne!(another_domain(0, 1), another_domain(0, 2));
    }
}
