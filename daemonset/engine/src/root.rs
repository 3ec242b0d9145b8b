//! Identifies the share's root directory.

use std::io;
use std::path::Path;

use rustix::fs::{AtFlags, CWD, StatxFlags, statvfs, statx};

/// A number that identifies the directory in every engine; never 0.
///
/// Device and inode number do not suffice: both are reused, by the next file system that is mounted and by the next
/// directory that is created. The birth time, if the file system has it, makes them unique. The device changes when the
/// same file system is mounted again (btrfs, a loop device), so the number of the file system is used if it has one.
pub(crate) fn root_stamp(root: &Path) -> io::Result<u64> {
    let found = statx(CWD, root, AtFlags::empty(), StatxFlags::INO | StatxFlags::BTIME)?;
    let born = if found.stx_mask & StatxFlags::BTIME.bits() == 0 { (0, 0) } else { birth(&found) };
    let number = statvfs(root)?.f_fsid;
    let device = u64::from(found.stx_dev_major) << 32 | u64::from(found.stx_dev_minor);
    let file_system = if number == 0 || born == (0, 0) { (0, device) } else { (1, number) };
    Ok(mix(&[file_system.0, file_system.1, found.stx_ino, born.0, born.1]))
}

fn birth(found: &rustix::fs::Statx) -> (u64, u64) {
    (found.stx_btime.tv_sec as u64, u64::from(found.stx_btime.tv_nsec))
}

fn mix(numbers: &[u64]) -> u64 {
    let mixed = numbers.iter().fold(0u64, |mixed, number| {
        (mixed.rotate_left(23) ^ number).wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15)
    });
    mixed.max(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_directory_keeps_its_number() {
        let scratch = tempfile::tempdir().unwrap();
        let (one, other) = (scratch.path().join("one"), scratch.path().join("other"));
        std::fs::create_dir(&one).unwrap();
        std::fs::create_dir(&other).unwrap();
        let before = root_stamp(&one).unwrap();
        std::fs::write(one.join("file"), "").unwrap();
        assert_eq!(root_stamp(&one).unwrap(), before);
        assert_ne!(root_stamp(&other).unwrap(), before);
        std::fs::rename(&one, scratch.path().join("elsewhere")).unwrap();
        assert_eq!(root_stamp(&scratch.path().join("elsewhere")).unwrap(), before);
    }

    #[test]
    fn every_input_changes_the_stamp() {
        let numbers = [8, 1, 2, 3, 4];
        for at in 0..numbers.len() {
            let mut others = numbers;
            others[at] += 1;
            assert_ne!(mix(&numbers), mix(&others), "{at}");
        }
        assert_ne!(mix(&[0, 1]), mix(&[1, 0]));
    }
}
