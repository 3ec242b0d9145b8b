//! The mounts of this process, from `/proc/self/mountinfo`.

use std::fs::File;
use std::io::{self, Seek};
use std::path::{Path, PathBuf};

/// A mount of the share.
pub(crate) struct Mount {
    /// Mount point relative to the share's root; `.` for the root itself.
    pub(crate) relative: String,
    /// Mount point as this process sees it.
    pub(crate) path: PathBuf,
    pub(crate) fs_type: String,
}

/// All mounts, as mount points and file system types.
pub(crate) fn mount_points(mountinfo: &File) -> io::Result<Vec<(String, String)>> {
    let text = read_from_start(mountinfo)?;
    Ok(text.lines().filter_map(mount_point_and_type).map(|(point, fs_type)| (point, fs_type.to_owned())).collect())
}

/// The mount of `root` and every mount below it. `prefix`: what to strip from mount points.
pub(crate) fn mounts_below(mountinfo: &File, prefix: Option<&str>, root: &str) -> io::Result<Vec<Mount>> {
    let text = read_from_start(mountinfo)?;
    let prefix = match (prefix, root) {
        (Some(prefix), _) => prefix,
        (None, "/") => "",
        (None, root) => root,
    };
    let mut mounts = parse_mounts(&text, prefix, Path::new(root));
    mounts.sort_by(|a, b| a.relative.cmp(&b.relative));
    mounts.dedup_by(|a, b| a.relative == b.relative);
    Ok(mounts)
}

fn read_from_start(mountinfo: &File) -> io::Result<String> {
    let mut table = mountinfo.try_clone()?;
    table.rewind()?;
    io::read_to_string(&table)
}

fn parse_mounts(text: &str, prefix: &str, root: &Path) -> Vec<Mount> {
    let mut root_type = String::from("unknown");
    let mut longest = 0;
    let mut mounts = Vec::new();
    for (point, fs_type) in text.lines().filter_map(mount_point_and_type) {
        match point.strip_prefix(prefix).map(|rest| rest.trim_start_matches('/')) {
            Some("") => (root_type, longest) = (fs_type.to_owned(), usize::MAX),
            Some(relative) if prefix.is_empty() || point[prefix.len()..].starts_with('/') => {
                mounts.push(Mount {
                    relative: relative.to_owned(),
                    path: root.join(relative),
                    fs_type: fs_type.to_owned(),
                });
            }
            // The mount of the share's root may begin above it: the longest mount point that contains it.
            _ if is_above(&point, prefix) && point.len() >= longest => {
                (root_type, longest) = (fs_type.to_owned(), point.len());
            }
            _ => {}
        }
    }
    mounts.push(Mount { relative: ".".into(), path: root.to_owned(), fs_type: root_type });
    mounts
}

fn is_above(point: &str, path: &str) -> bool {
    point == "/" || path.strip_prefix(point).is_some_and(|rest| rest.starts_with('/'))
}

fn mount_point_and_type(line: &str) -> Option<(String, &str)> {
    let (front, back) = line.split_once(" - ")?;
    Some((unescape(front.split(' ').nth(4)?), back.split(' ').next()?))
}

/// The kernel writes space, tab, newline and backslash as three octal digits.
fn unescape(field: &str) -> String {
    field.replace("\\040", " ").replace("\\011", "\t").replace("\\012", "\n").replace("\\134", "\\")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mounts_of_a_chroot_are_found_below_its_prefix() {
        let text = "22 1 8:1 / / rw - ext4 /dev/sda rw\n\
                    23 22 8:2 / /srv/my\\040share rw - xfs /dev/sdb rw\n\
                    24 23 0:5 / /srv/my\\040share/sub rw - tmpfs tmpfs rw\n\
                    25 22 0:6 / /srv/my\\040shared rw - nfs4 host:/ rw\n";
        let mounts = parse_mounts(text, "/srv/my share", Path::new("/"));
        let found: Vec<_> = mounts.iter().map(|m| (m.relative.as_str(), m.fs_type.as_str())).collect();
        assert_eq!(found, [("sub", "tmpfs"), (".", "xfs")]);
    }

    #[test]
    fn the_mount_of_the_root_may_begin_above_it() {
        let text = "22 1 8:1 / / rw - ext4 /dev/sda rw\n23 22 8:2 / /srv rw - xfs /dev/sdb rw\n";
        let mounts = parse_mounts(text, "/srv/share", Path::new("/"));
        assert_eq!((mounts.len(), mounts[0].fs_type.as_str()), (1, "xfs"));
    }

    #[test]
    fn in_a_namespace_every_mount_is_below_the_root() {
        let text = "30 1 8:2 /share / ro - xfs /dev/sdb rw\n31 30 0:5 / /sub ro - tmpfs tmpfs rw\n";
        let mounts = parse_mounts(text, "", Path::new("/"));
        let found: Vec<_> = mounts.iter().map(|m| (m.relative.as_str(), m.path.to_str().unwrap())).collect();
        assert_eq!(found, [("sub", "/sub"), (".", "/")]);
    }
}
