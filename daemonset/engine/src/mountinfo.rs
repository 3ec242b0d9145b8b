//! The mounts of this process, from `/proc/self/mountinfo`.

use std::fs::File;
use std::io::{self, Seek};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use rustc_hash::FxHashSet;

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

/// The last components of all mount points.
pub(crate) fn mounted_names(mountinfo: &File) -> io::Result<FxHashSet<Vec<u8>>> {
    // The position in the file is that of whoever reads it next: the library reads on other threads.
    let (mut text, mut part) = (Vec::new(), vec![0; 64 << 10]);
    loop {
        match mountinfo.read_at(&mut part, text.len() as u64)? {
            0 => return Ok(text.split(|byte| *byte == b'\n').filter_map(last_component).collect()),
            read => text.extend_from_slice(&part[..read]),
        }
    }
}

fn last_component(line: &[u8]) -> Option<Vec<u8>> {
    let point = line.split(|byte| *byte == b' ').nth(4)?;
    Some(unescape_bytes(point.rsplit(|byte| *byte == b'/').next()?))
}

/// The kernel writes bytes that would separate fields as a backslash and three octal digits.
fn unescape_bytes(field: &[u8]) -> Vec<u8> {
    let (mut bytes, mut rest) = (Vec::new(), field);
    while let Some((first, after)) = rest.split_first() {
        let digits = after.first_chunk::<3>().filter(|_| *first == b'\\');
        let byte = digits.and_then(|digits| u8::from_str_radix(str::from_utf8(digits).ok()?, 8).ok());
        bytes.push(byte.unwrap_or(*first));
        rest = if byte.is_some() { &after[3..] } else { after };
    }
    bytes
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
    fn names_of_mount_points_are_unescaped() {
        for (line, name) in [
            (&b"24 23 0:5 / /srv/my\\040share/a\\134b rw - tmpfs tmpfs rw"[..], &b"a\\b"[..]),
            (b"24 23 0:5 /f /srv/\xff\\011\\012\\043 rw - tmpfs tmpfs rw", b"\xff\t\n#"),
            (b"22 1 8:1 / / rw - ext4 /dev/sda rw", b""),
        ] {
            assert_eq!(last_component(line).unwrap(), name);
        }
        assert_eq!(last_component(b""), None);
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
