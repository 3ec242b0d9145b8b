//! The root directory that the ledger belongs to.
//!
//! A source may be unmounted and another file system mounted in its place. The nodes of the old one mean nothing under
//! the new one, although inode numbers may be the same: file systems begin to count at the same number. So the domain of
//! all identities begins at the root, and changes with it.

use super::Ledger;
use super::change::{Change, pair};
use super::handles::Handle;
use super::layout::header;
use super::nodes::{Identity, Node, ROOT};

impl Ledger {
    /// Sets the directory that this engine serves. `root` is equal for the same directory, and never 0.
    pub(crate) fn set_root(&mut self, root: u64) {
        self.root = root;
    }

    /// Makes the ledger one of the directory that this engine serves, after [`Ledger::take_over`]. True if it was one of
    /// another directory.
    pub(crate) fn update_root(&mut self) -> bool {
        let known = self.identity(ROOT);
        if known.ino == self.root {
            return false;
        }
        // 0 was recorded by an engine that knew no roots: the directory is the same.
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

    /// Drops all kernel file handles: on another file system, a copy of the first one for instance, they open other files.
    /// Open files can then only come from the fd stash.
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
    let another = (mixed >> 32) as u32 & !Identity::BELOW_MOUNT;
    // Never the previous domain.
    if another == domain { domain ^ 1 } else { another }
}

#[cfg(test)]
mod tests {
    use super::another_domain;

    #[test]
    fn another_root_has_another_domain() {
        for domain in [0, 1, u32::MAX >> 1] {
            for root in [1, 2, u64::MAX, 0x9e37_79b9_0000_0001] {
                assert_ne!(another_domain(domain, root), domain);
            }
        }
        assert_ne!(another_domain(0, 1), another_domain(0, 2));
    }
}
