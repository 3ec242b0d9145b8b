//! Was it done? What a repeated request answers, from what was true before it and what is true now.
//!
//! The engine before died somewhere between beginning the request and telling the guest. Operations that may be
//! done twice are simply done twice. The others are decided here. All of it holds as long as nobody else changes
//! that name or that file in the milliseconds between.

use crate::ledger::Before;

use super::seams::Skip;

/// unlink, rmdir: the name is not there. Was it this request that took it away?
pub(super) fn removed(before: &Before, errno: i32) -> bool {
    errno == libc::ENOENT && before.existed
}

/// create, mkdir, mknod, symlink: the name is there. Was it this request that made it?
pub(super) fn made(before: &Before, errno: i32) -> bool {
    errno == libc::EEXIST && !before.existed
}

/// What two names lead to now; 0: nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Now {
    pub(super) from: u64,
    pub(super) to: u64,
}

/// rename: has it been carried out? `before.first` and `before.second` are the inodes that the names led to.
pub(super) fn renamed(before: &Before, now: Now, exchange: bool) -> bool {
    if before.first == 0 || before.first == before.second {
        // Two names of one file: rename(2) does nothing, as often as it is asked.
        return false;
    }
    now.to == before.first && if exchange { now.from == before.second } else { now.from != before.first }
}

/// fallocate that inserts or removes a range: has it been carried out?
pub(super) fn resized(before: &Before, size: u64, mode: u32, length: u64) -> bool {
    let expected = if mode & libc::FALLOC_FL_INSERT_RANGE as u32 != 0 {
        before.size.checked_add(length)
    } else if mode & libc::FALLOC_FL_COLLAPSE_RANGE as u32 != 0 {
        before.size.checked_sub(length)
    } else {
        None
    };
    expected == Some(size)
}

/// setxattr with XATTR_CREATE: the attribute is there. Was it this request that made it?
pub(super) fn attribute_made(before: &Before, errno: i32) -> bool {
    errno == libc::EEXIST && !before.existed
}

/// removexattr: the attribute is not there. Was it this request that took it away?
pub(super) fn attribute_removed(before: &Before, errno: i32) -> bool {
    errno == libc::ENODATA && before.existed
}

/// append: how much of `count` bytes stands in the file already?
pub(super) fn appended(before: &Before, size: u64, count: usize) -> Skip {
    match size.checked_sub(before.size) {
        None | Some(0) => Skip::Nothing,
        Some(grown) => Skip::Bytes { done: (grown as usize).min(count), rest_at: size },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn before(existed: bool, first: u64, second: u64, size: u64) -> Before {
        Before { known: true, existed, first, second, size }
    }

    #[test]
    fn a_name_that_was_there_and_is_gone_was_removed_by_the_first_run() {
        assert!(removed(&before(true, 0, 0, 0), libc::ENOENT));
        assert!(!removed(&before(false, 0, 0, 0), libc::ENOENT));
        assert!(!removed(&before(true, 0, 0, 0), libc::EACCES));
    }

    #[test]
    fn a_name_that_was_not_there_and_is_new_was_made_by_the_first_run() {
        assert!(made(&before(false, 0, 0, 0), libc::EEXIST));
        assert!(!made(&before(true, 0, 0, 0), libc::EEXIST), "it was there");
        assert!(!made(&before(false, 0, 0, 0), libc::ENOSPC));
    }

    #[test]
    fn renames_are_recognised_by_where_the_inodes_are() {
        let cases = [
            // first, second, from now, to now, exchange, done
            (5, 0, 0, 5, false, true),
            (5, 7, 0, 5, false, true),
            (5, 0, 5, 0, false, false),
            (5, 7, 5, 7, false, false),
            (5, 5, 5, 5, false, false),
            (5, 7, 7, 5, true, true),
            (5, 7, 5, 7, true, false),
            // A whiteout took the source's place.
            (5, 0, 99, 5, false, true),
            (0, 7, 0, 7, false, false),
        ];
        for (first, second, from, to, exchange, done) in cases {
            let now = Now { from, to };
            assert_eq!(renamed(&before(true, first, second, 0), now, exchange), done, "{first} {second} {now:?}");
        }
    }

    #[test]
    fn ranges_are_inserted_and_removed_once() {
        let (insert, collapse) = (libc::FALLOC_FL_INSERT_RANGE as u32, libc::FALLOC_FL_COLLAPSE_RANGE as u32);
        let was = before(true, 0, 0, 8192);
        assert!(resized(&was, 12288, insert, 4096));
        assert!(!resized(&was, 8192, insert, 4096));
        assert!(resized(&was, 4096, collapse, 4096));
        assert!(!resized(&was, 8192, collapse, 4096));
        assert!(!resized(&was, 8192, 0, 0), "any other may be done twice");
    }

    #[test]
    fn an_append_goes_on_where_it_was_cut_off() {
        let was = before(true, 0, 0, 100);
        assert_eq!(appended(&was, 100, 10), Skip::Nothing);
        assert_eq!(appended(&was, 110, 10), Skip::Bytes { done: 10, rest_at: 110 });
        assert_eq!(appended(&was, 104, 10), Skip::Bytes { done: 4, rest_at: 104 });
        assert_eq!(appended(&was, 90, 10), Skip::Nothing, "somebody truncated it");
    }

    #[test]
    fn attributes_are_made_and_removed_once() {
        assert!(attribute_made(&before(false, 0, 0, 0), libc::EEXIST));
        assert!(!attribute_made(&before(true, 0, 0, 0), libc::EEXIST));
        assert!(attribute_removed(&before(true, 0, 0, 0), libc::ENODATA));
        assert!(!attribute_removed(&before(false, 0, 0, 0), libc::ENODATA));
    }
}
