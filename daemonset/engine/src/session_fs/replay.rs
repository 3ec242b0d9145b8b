//! Whether the first run of a repeated request took effect, from the state before it and the state now.
//!
//! The engine before this one died after it had begun the request and before the guest received the reply. Idempotent
//! operations are run again. The others are decided here. The decisions hold if no other process changes that name or
//! file in the milliseconds between.

use crate::ledger::PriorState;

use super::library_io::Written;

/// UNLINK, RMDIR: the name does not exist. True if the first run removed it.
pub(super) fn removed(prior: &PriorState, errno: i32) -> bool {
    errno == libc::ENOENT && prior.existed
}

/// CREATE, MKDIR, MKNOD, SYMLINK: the name exists. True if the first run made it.
pub(super) fn made(prior: &PriorState, errno: i32) -> bool {
    errno == libc::EEXIST && !prior.existed
}

/// Inode numbers at the two names of a RENAME now; 0: the name does not exist.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct NamesNow {
    pub(super) from: u64,
    pub(super) to: u64,
}

/// RENAME: true if the first run took effect. `prior.first` and `prior.second` are the inode numbers that were at the names.
pub(super) fn renamed(prior: &PriorState, now: NamesNow, exchange: bool) -> bool {
    if prior.first == 0 || prior.first == prior.second {
        // Two names of one file: rename(2) does nothing, however often it runs.
        return false;
    }
    now.to == prior.first && if exchange { now.from == prior.second } else { now.from != prior.first }
}

/// FALLOCATE that inserts or collapses a range: true if the first run took effect.
pub(super) fn resized(prior: &PriorState, size: u64, mode: u32, length: u64) -> bool {
    let expected = if mode & libc::FALLOC_FL_INSERT_RANGE as u32 != 0 {
        prior.size.checked_add(length)
    } else if mode & libc::FALLOC_FL_COLLAPSE_RANGE as u32 != 0 {
        prior.size.checked_sub(length)
    } else {
        None
    };
    expected == Some(size)
}

/// COPY_FILE_RANGE within one file: how much of `length` bytes from `offset` on was there before the first run.
pub(super) fn copied(prior: &PriorState, offset: u64, length: u64) -> u64 {
    length.min(prior.size.saturating_sub(offset))
}

/// SETXATTR with XATTR_CREATE: the attribute exists. True if the first run made it.
pub(super) fn attribute_made(prior: &PriorState, errno: i32) -> bool {
    errno == libc::EEXIST && !prior.existed
}

/// REMOVEXATTR: the attribute does not exist. True if the first run removed it.
pub(super) fn attribute_removed(prior: &PriorState, errno: i32) -> bool {
    errno == libc::ENODATA && prior.existed
}

/// WRITE that appends: how much of `count` bytes the first run wrote.
pub(super) fn appended(prior: &PriorState, size: u64, count: usize) -> Written {
    match size.checked_sub(prior.size) {
        None | Some(0) => Written::Nothing,
        Some(grown) => Written::Bytes { done: (grown as usize).min(count), rest_at: size },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn prior(existed: bool, first: u64, second: u64, size: u64) -> PriorState {
        PriorState { known: true, existed, first, second, size }
    }

    #[test]
    fn a_name_that_existed_and_is_gone_was_removed() {
        assert!(removed(&prior(true, 0, 0, 0), libc::ENOENT));
        assert!(!removed(&prior(false, 0, 0, 0), libc::ENOENT));
        assert!(!removed(&prior(true, 0, 0, 0), libc::EACCES));
    }

    #[test]
    fn a_name_that_did_not_exist_and_does_was_made() {
        assert!(made(&prior(false, 0, 0, 0), libc::EEXIST));
        assert!(!made(&prior(true, 0, 0, 0), libc::EEXIST), "it existed");
        assert!(!made(&prior(false, 0, 0, 0), libc::ENOSPC));
    }

    #[test]
    fn renames_are_recognised_by_inode_numbers() {
        let cases = [
            // first, second, from now, to now, exchange, done
            (5, 0, 0, 5, false, true),
            (5, 7, 0, 5, false, true),
            (5, 0, 5, 0, false, false),
            (5, 7, 5, 7, false, false),
            (5, 5, 5, 5, false, false),
            (5, 7, 7, 5, true, true),
            (5, 7, 5, 7, true, false),
            // A whiteout replaced the source.
            (5, 0, 99, 5, false, true),
            (0, 7, 0, 7, false, false),
        ];
        for (first, second, from, to, exchange, done) in cases {
            let now = NamesNow { from, to };
            assert_eq!(renamed(&prior(true, first, second, 0), now, exchange), done, "{first} {second} {now:?}");
        }
    }

    #[test]
    fn ranges_are_inserted_and_collapsed_once() {
        let (insert, collapse) = (libc::FALLOC_FL_INSERT_RANGE as u32, libc::FALLOC_FL_COLLAPSE_RANGE as u32);
        let was = prior(true, 0, 0, 8192);
        assert!(resized(&was, 12288, insert, 4096));
        assert!(!resized(&was, 8192, insert, 4096));
        assert!(resized(&was, 4096, collapse, 4096));
        assert!(!resized(&was, 8192, collapse, 4096));
        assert!(!resized(&was, 8192, 0, 0), "other modes are idempotent");
    }

    #[test]
    fn a_copy_ends_where_the_file_ended() {
        let before = prior(true, 0, 0, 10);
        for (offset, length, expected) in
            [(0, 10, 10), (0, 100, 10), (4, 100, 6), (4, 2, 2), (10, 5, 0), (u64::MAX, 5, 0)]
        {
            assert_eq!(copied(&before, offset, length), expected, "{offset}, {length}");
        }
    }

    #[test]
    fn an_append_continues_where_it_ended() {
        let was = prior(true, 0, 0, 100);
        assert_eq!(appended(&was, 100, 10), Written::Nothing);
        assert_eq!(appended(&was, 110, 10), Written::Bytes { done: 10, rest_at: 110 });
        assert_eq!(appended(&was, 104, 10), Written::Bytes { done: 4, rest_at: 104 });
        assert_eq!(appended(&was, 90, 10), Written::Nothing, "another process truncated it");
    }

    #[test]
    fn attributes_are_set_and_removed_once() {
        assert!(attribute_made(&prior(false, 0, 0, 0), libc::EEXIST));
        assert!(!attribute_made(&prior(true, 0, 0, 0), libc::EEXIST));
        assert!(attribute_removed(&prior(true, 0, 0, 0), libc::ENODATA));
        assert!(!attribute_removed(&prior(false, 0, 0, 0), libc::ENODATA));
    }
}
