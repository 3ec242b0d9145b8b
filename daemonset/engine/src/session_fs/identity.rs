//! Which file a node is on the host, and the inode number that the guest sees for it.
//!
//! A guest distinguishes files by device and inode number; `cp -a`, `tar` and `rsync -H` take equal ones for hard links, and
//! `cmp` and `cp` for the same file. The guest has one device number for its mount, and another below each mount point that
//! is announced to it. The host has more, so two of its files can have the same number in the guest:
//!
//! | files | number in the guest |
//! |---|---|
//! | of the file system that their directory belongs to | the host's |
//! | mounted one by one over other files: FUSE announces directories only | made from device and number |
//! | of the layers of an overlayfs, where those are different file systems | made from device and number |
//! | below a mount point that is not announced | made from the mount point and the number |
//!
//! A made number has the highest bit set, which numbers of disk file systems do not use. It follows from what is on the
//! host alone, so every engine makes the same.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::sync::atomic::Ordering;

use rustc_hash::{FxHashMap, FxHashSet};
use rustix::fs::{AtFlags, Statx, StatxFlags, statx};
use virtiofsd::filesystem::{DirEntry, DirectoryIterator, Entry, FileSystem};
use virtiofsd::fuse::{ATTR_SUBMOUNT, Attr};

use crate::ledger::{Identity, ROOT, Slot};
use crate::mountinfo::mounted_names;

use super::SessionFs;
use super::staleness::NameBelow;
use super::state::State;

/// Set in numbers that are made here.
const MADE: u64 = 1 << 63;

/// The share's root directory and this process's mount table, to find out which file system a file belongs to.
pub(crate) struct HostTree {
    /// The root directory.
    pub(crate) root: OwnedFd,
    /// `/proc/self/mountinfo`.
    pub(crate) mountinfo: File,
}

/// What is known of the file systems below the root.
#[derive(Default)]
pub(super) struct FileSystems {
    /// The last components of all mount points; none: the mount table has changed since they were read.
    mounted: Option<FxHashSet<Vec<u8>>>,
    /// By domain, whether files have the device of their directory. An overlayfs of several file systems has another
    /// device for each, and that for all files.
    uniform: FxHashMap<u32, bool>,
}

impl FileSystems {
    /// The mount table has changed.
    pub(super) fn mounts_changed(&mut self) {
        *self = FileSystems::default();
    }

    /// True if a file of this name, in a directory of this domain, may belong to another file system than the directory.
    fn may_differ(&mut self, mountinfo: &File, domain: u32, name: &[u8]) -> bool {
        let mounted = self.mounted.get_or_insert_with(|| {
            let names = mounted_names(mountinfo);
            names.inspect_err(|error| tracing::warn!("reading the mount table: {error}")).unwrap_or_default()
        });
        mounted.contains(name) || self.uniform.get(&domain) != Some(&true)
    }
}

impl<F: FileSystem> SessionFs<F> {
    /// The identity of an entry that the library has returned for `name` below `parent`.
    pub(super) fn identify(&self, state: &mut State, (parent, name): NameBelow<'_>, entry: &Entry) -> Identity {
        let plain = identity(state.ledger.identity(parent), name, entry);
        let directory = entry.attr.mode & libc::S_IFMT == libc::S_IFDIR;
        if directory || !state.file_systems.may_differ(&self.host.mountinfo, plain.domain, name) {
            return plain;
        }
        match self.other_device(state, (parent, name), plain) {
            Some(device) => Identity { ino: made(device, plain.ino), ..plain },
            None => plain,
        }
    }

    /// The device of a file, if it is another one than its directory's.
    fn other_device(&self, state: &mut State, (parent, name): NameBelow<'_>, file: Identity) -> Option<u64> {
        let stat = |path: &[u8]| {
            // What is known to the kernel suffices: a source that hangs must not block this.
            let flags = AtFlags::SYMLINK_NOFOLLOW | AtFlags::NO_AUTOMOUNT | AtFlags::STATX_DONT_SYNC;
            statx(&self.host.root, path, flags, StatxFlags::INO | StatxFlags::MNT_ID).ok()
        };
        let found = stat(&state.ledger.path_of(parent, name)).filter(|found| found.stx_ino == file.ino)?;
        let above = stat(&state.ledger.path(parent))?;
        let differs = device(&found) != device(&above);
        if found.stx_mnt_id == above.stx_mnt_id {
            state.file_systems.uniform.insert(file.domain, !differs);
        }
        differs.then(|| device(&found))
    }

    /// Attributes of a node for the guest. The library always announces mount points, which distinguish file systems; the
    /// guest sees them only if it agreed to.
    pub(super) fn guest_attr(&self, state: &State, node: Slot, mut attr: Attr) -> Attr {
        if !self.submounts_agreed.load(Ordering::Relaxed) {
            attr.flags &= !ATTR_SUBMOUNT;
        }
        if node != ROOT {
            let identity = state.ledger.identity(node);
            attr.ino = self.numbering(identity.domain).number(identity.ino);
        }
        attr
    }

    /// How inode numbers of a domain are shown to the guest.
    pub(super) fn numbering(&self, domain: u32) -> Numbering {
        let announced = self.submounts_agreed.load(Ordering::Relaxed);
        Numbering((!announced && domain & Identity::BELOW_MOUNT != 0).then_some(domain))
    }
}

/// How inode numbers of a domain are shown to the guest. With a domain: with the numbers of other domains, on one device.
#[derive(Clone, Copy, Debug)]
pub(super) struct Numbering(Option<u32>);

impl Numbering {
    fn number(self, ino: u64) -> u64 {
        self.0.map_or(ino, |domain| made(domain.into(), ino))
    }
}

/// The entries of a directory, with the numbers that their nodes have.
pub(crate) struct Listing<D> {
    /// None: a directory that the guest removed.
    entries: Option<D>,
    numbering: Numbering,
}

impl<D> Listing<D> {
    pub(super) fn of(entries: D, numbering: Numbering) -> Self {
        Listing { entries: Some(entries), numbering }
    }

    /// Of a removed directory, which has not even `.` and `..`.
    pub(super) fn empty() -> Self {
        Listing { entries: None, numbering: Numbering(None) }
    }
}

impl<D: DirectoryIterator> DirectoryIterator for Listing<D> {
    fn next(&mut self) -> Option<DirEntry<'_>> {
        let entry = self.entries.as_mut()?.next()?;
        Some(DirEntry { ino: self.numbering.number(entry.ino), ..entry })
    }
}

/// The identity of an entry below a node of identity `above`, if the file belongs to its directory's file system.
pub(super) fn identity(above: Identity, name: &[u8], entry: &Entry) -> Identity {
    let ino = entry.attr.ino;
    let mount = entry.attr.flags & ATTR_SUBMOUNT != 0;
    Identity { ino, domain: if mount { below_mount(above.domain, name, ino) } else { above.domain } }
}

/// True if the identity is of a file of another file system than its directory's: [`identity`] cannot say so.
pub(super) fn is_made(identity: Identity) -> bool {
    identity.ino & MADE != 0
}

/// True if a node of identity `node` can be at `name` below one of identity `above`: both belong to the same root directory.
pub(super) fn belongs_below(above: Identity, name: &[u8], node: Identity) -> bool {
    node.domain == above.domain || node.domain == below_mount(above.domain, name, node.ino)
}

/// True if `found` at a name of the ledger's below `above` is the node of identity `known`. The root of a mount has an
/// identity by the name that it was found at; only a rename gives it another one.
pub(super) fn is_same_node(above: Identity, found: Identity, known: Identity) -> bool {
    let is_root = |it: Identity| it.domain & Identity::BELOW_MOUNT != 0 && it.domain != above.domain;
    found == known || (found.ino == known.ino && is_root(found) && is_root(known))
}

/// The domain of identities below a mount point. Not by the number of its root directory alone: that is the same on most
/// file systems of a type. Not by the device: that may be another one when the same file system is mounted again.
fn below_mount(above: u32, name: &[u8], ino: u64) -> u32 {
    let start = mix(ino ^ (u64::from(above) << 32));
    let mixed = name.iter().fold(start, |mixed, byte| mix(mixed ^ u64::from(*byte)));
    (mixed >> 32) as u32 | Identity::BELOW_MOUNT
}

fn device(found: &Statx) -> u64 {
    u64::from(found.stx_dev_major) << 32 | u64::from(found.stx_dev_minor)
}

/// A number for the file with the number `ino` on one of several devices.
fn made(device: u64, ino: u64) -> u64 {
    mix(mix(device) ^ ino) | MADE
}

/// A bijective mix in which every bit depends on every other (the finalizer of SplitMix64).
fn mix(number: u64) -> u64 {
    let mut mixed = number.wrapping_add(0x9e37_79b9_7f4a_7c15);
    mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    mixed ^ (mixed >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nodes_of_another_root_belong_nowhere() {
        let (root, node) = (Identity { ino: 1, domain: 7 }, Identity { ino: 12, domain: 7 });
        assert!(belongs_below(root, b"m", node));
        assert!(belongs_below(root, b"m", Identity { domain: below_mount(7, b"m", 12), ..node }), "a mount point");
        assert!(!belongs_below(root, b"m", Identity { domain: below_mount(7, b"m", 13), ..node }));
        assert!(!belongs_below(root, b"m", Identity { domain: below_mount(7, b"n", 12), ..node }));
        assert!(!belongs_below(Identity { domain: 8, ..root }, b"m", node));
        let mounted_at = |name: &[u8], ino| Identity { ino, domain: below_mount(7, name, ino) };
        assert!(is_same_node(root, mounted_at(b"new", 256), mounted_at(b"old", 256)), "a mount point was renamed");
        assert!(!is_same_node(root, mounted_at(b"new", 257), mounted_at(b"old", 256)));
        assert!(!is_same_node(root, Identity { ino: 256, ..root }, mounted_at(b"old", 256)), "it is unmounted");
    }

    #[test]
    fn domains_differ_by_mount_point_and_by_the_domain_above() {
        let domains = [
            0,
            below_mount(0, b"a", 2),
            below_mount(0, b"b", 2),
            below_mount(0, b"a", 3),
            below_mount(below_mount(0, b"a", 2), b"a", 2),
        ];
        assert_eq!(FxHashSet::from_iter(domains).len(), domains.len());
    }

    #[test]
    fn made_numbers_differ_by_device_and_by_number_and_from_the_hosts() {
        let mut numbers: FxHashSet<u64> = (0..1000).collect();
        for device in 0..100 {
            numbers.extend((0..1000).map(|ino| made(device, ino)));
        }
        assert_eq!(numbers.len(), 101 * 1000);
    }
}
