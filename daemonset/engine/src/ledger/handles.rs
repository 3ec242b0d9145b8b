//! Handles: files and directories that the guest has open.

use smallvec::SmallVec;

use super::change::{Change, pair};
use super::layout::{Geometry, HANDLE_WORDS};
use super::nodes::Slot;
use crate::orphaned::MAX_FILE_HANDLE;

/// Words of the file handle's bytes.
const FILE_HANDLE_WORDS: u32 = (MAX_FILE_HANDLE / 8) as u32;

const FREE: u32 = 0;
const FILE: u32 = 1;
const DIRECTORY: u32 = 2;

/// On the stack for the file systems that most shares are on.
pub(crate) type FileHandleBytes = SmallVec<[u8; 24]>;

/// A kernel file handle, as `name_to_handle_at` returns it: identifies a file even when its inode number is reused.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct FileHandle {
    /// Type of handle, defined by the file system.
    pub(crate) kind: i32,
    /// The handle; empty: the file system has none.
    pub(crate) bytes: FileHandleBytes,
    /// The file system: a handle means nothing on another one. 0 without a handle.
    pub(crate) file_system: u64,
}

/// What is open.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum OpenKind {
    File,
    Directory,
}

/// A handle's words.
#[derive(Clone, Copy)]
pub(super) struct Handle {
    at: u32,
}

impl Handle {
    pub(super) fn at(geometry: &Geometry, slot: u32) -> Option<Handle> {
        (slot != 0 && slot < geometry.handle_capacity).then(|| Handle { at: geometry.handles + slot * HANDLE_WORDS })
    }

    pub(super) fn generation(self, change: &Change<'_>) -> u32 {
        change.high(self.at)
    }

    pub(super) fn kind(self, change: &Change<'_>) -> Option<OpenKind> {
        match change.low(self.at) {
            FILE => Some(OpenKind::File),
            DIRECTORY => Some(OpenKind::Directory),
            _ => None,
        }
    }

    pub(super) fn node(self, change: &Change<'_>) -> Slot {
        change.high(self.at + 1)
    }

    /// The flags to reopen it with.
    pub(super) fn flags(self, change: &Change<'_>) -> u32 {
        change.low(self.at + 1)
    }

    pub(super) fn file_handle(self, change: &Change<'_>) -> FileHandle {
        let length = (change.low(self.at + 2) as usize).min(MAX_FILE_HANDLE);
        let mut bytes: FileHandleBytes =
            (0..length.div_ceil(8) as u32).flat_map(|word| change.get(self.at + 3 + word).to_le_bytes()).collect();
        bytes.truncate(length);
        FileHandle { kind: change.high(self.at + 2) as i32, bytes, file_system: change.get(self.file_system()) }
    }

    fn file_system(self) -> u32 {
        self.at + 3 + FILE_HANDLE_WORDS
    }

    /// Neighbours in the chain of handles that are open on the same node; 0: none.
    pub(super) fn previous(self, change: &Change<'_>) -> u32 {
        change.high(self.file_system() + 1)
    }

    pub(super) fn next(self, change: &Change<'_>) -> u32 {
        change.low(self.file_system() + 1)
    }

    pub(super) fn set_previous(self, change: &mut Change<'_>, slot: u32) {
        change.set_high(self.file_system() + 1, slot);
    }

    pub(super) fn set_next(self, change: &mut Change<'_>, slot: u32) {
        change.set_low(self.file_system() + 1, slot);
    }

    pub(super) fn begin(
        self,
        change: &mut Change<'_>,
        kind: OpenKind,
        node: Slot,
        flags: u32,
        file_handle: &FileHandle,
    ) {
        let generation = self.generation(change).wrapping_add(1);
        let kind = match kind {
            OpenKind::File => FILE,
            OpenKind::Directory => DIRECTORY,
        };
        let length = file_handle.bytes.len().min(MAX_FILE_HANDLE);
        change.set(self.at, pair(generation, kind));
        change.set(self.at + 1, pair(node, flags));
        change.set(self.at + 2, pair(file_handle.kind as u32, length as u32));
        change.set(self.file_system(), file_handle.file_system);
        change.set(self.file_system() + 1, 0);
        for (word, chunk) in (0u32..).zip(file_handle.bytes[..length].chunks(8)) {
            let mut bytes = [0u8; 8];
            bytes[..chunk.len()].copy_from_slice(chunk);
            change.set(self.at + 3 + word, u64::from_le_bytes(bytes));
        }
    }

    /// Drops the kernel file handle.
    pub(super) fn forget_file_handle(self, change: &mut Change<'_>) {
        change.set_low(self.at + 2, 0);
    }

    pub(super) fn end(self, change: &mut Change<'_>) {
        change.set_low(self.at, FREE);
    }
}
