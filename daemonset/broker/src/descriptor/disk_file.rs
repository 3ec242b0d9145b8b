//! Guest memory in a file on a disk, such as an NVDIMM.
//!
//! The broker reads ring positions from guest memory, so a file must not be one that somebody can hang: a FUSE server, or a
//! server in a network. Its file system is found out without a request to it: statx(2) with `AT_STATX_DONT_SYNC` reports
//! what the kernel has in memory (`fuse_update_get_attr` and `nfs_getattr` heed the flag, which fstat(2) and fstatfs(2)
//! cannot have), and the type of a mount is in the mount table.

use std::os::fd::BorrowedFd;

use rustix::fs::{AtFlags, FileType, StatxFlags, statx};

/// File systems on disks of this host.
const DISK_FILE_SYSTEMS: [&str; 8] = ["ext2", "ext3", "ext4", "xfs", "btrfs", "f2fs", "bcachefs", "zfs"];

/// True if this is a regular file of a file system on a disk that is mounted in the broker's mount namespace.
pub(super) fn is_on_disk(fd: BorrowedFd<'_>) -> bool {
    let flags = AtFlags::EMPTY_PATH | AtFlags::STATX_DONT_SYNC;
    let Ok(found) = statx(fd, c"", flags, StatxFlags::TYPE | StatxFlags::MNT_ID) else { return false };
    if FileType::from_raw_mode(found.stx_mode.into()) != FileType::RegularFile {
        return false;
    }
    let Ok(mounts) = std::fs::read_to_string("/proc/self/mountinfo") else { return false };
    let file_system = type_of(&mounts, found.stx_mnt_id, (found.stx_dev_major, found.stx_dev_minor));
    file_system.is_some_and(|name| DISK_FILE_SYSTEMS.contains(&name))
}

/// The type of a mount of proc_pid_mountinfo(5), by the number of the mount. A VMM in another mount namespace has mounts
/// with other numbers; then the device says it. (The files of btrfs have devices that no mount has.)
fn type_of(mounts: &str, mount: u64, (major, minor): (u32, u32)) -> Option<&str> {
    let device = format!("{major}:{minor}");
    let lines = || mounts.lines().filter_map(|line| line.split_once(" - "));
    let field = |fields: &str, number: usize, value: &str| fields.split(' ').nth(number) == Some(value);
    let by_mount = lines().find(|(fields, _)| field(fields, 0, &mount.to_string()));
    let found = by_mount.or_else(|| lines().find(|(fields, _)| field(fields, 2, &device)));
    found.and_then(|(_, rest)| rest.split(' ').next())
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::fd::AsFd;

    use super::*;

    const MOUNTS: &str = "\
24 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw
25 24 0:21 / /proc rw shared:2 - proc proc rw
31 24 0:45 / /srv/a\\040-\\040b rw shared:9 master:2 - fuse.sshfs host: rw
32 24 0:46 / /srv/pool rw - btrfs /dev/sdb rw
33 24 8:17 / /srv/ntfs rw - fuseblk /dev/sdc1 rw
";

    #[test]
    fn type_of_a_mount_is_found_by_its_number_then_by_its_device() {
        for (mount, device, expected) in [
            (24, (8, 1), Some("ext4")),
            (31, (0, 45), Some("fuse.sshfs")),
            (32, (0, 60), Some("btrfs")),
            (33, (8, 17), Some("fuseblk")),
            (900, (8, 1), Some("ext4")),
            (900, (0, 45), Some("fuse.sshfs")),
            (900, (0, 60), None),
            (900, (8, 2), None),
        ] {
            assert_eq!(type_of(MOUNTS, mount, device), expected, "{mount} {device:?}");
        }
    }

    #[test]
    fn files_of_the_kernel_and_directories_are_not_on_disk() {
        for path in ["/proc/self/maps", "/dev/null", "/"] {
            assert!(!is_on_disk(File::open(path).unwrap().as_fd()), "{path}");
        }
    }
}
