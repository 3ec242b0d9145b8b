//! Every operation with every special argument, under every configuration.

use std::ffi::CString;

use virtiofsd::filesystem::{SetattrValid, SetxattrFlags};
use virtiofsd::fuse::SetattrIn;
use virtiofsd::passthrough::PassthroughFs;
use virtiofsd::passthrough::read_only::PassthroughFsRo;

use super::operation::Operation::{self, *};
use super::pair::{End, Pair, Share, Start};
use super::settings::{SETTINGS, Setting};
use crate::orphaned::SetattrBy;

const FILES: &[Start] = &[
    Start { flags: libc::O_RDWR, mode: 0o644, unlinked: true, directory: false },
    Start { flags: libc::O_RDWR, mode: 0o6775, unlinked: false, directory: false },
    Start { flags: libc::O_WRONLY, mode: 0o2755, unlinked: true, directory: false },
    Start { flags: libc::O_RDWR | libc::O_APPEND, mode: 0, unlinked: true, directory: false },
    Start { flags: libc::O_RDWR | libc::O_DIRECT | libc::O_NOATIME, mode: 0o4711, unlinked: true, directory: false },
];

const FILES_READ: &[Start] = &[
    Start { flags: libc::O_RDONLY, mode: 0o6755, unlinked: true, directory: false },
    Start { flags: libc::O_RDONLY, mode: 0o600, unlinked: false, directory: false },
];

const DIRECTORIES: &[Start] = &[
    Start { flags: libc::O_RDONLY, mode: 0o755, unlinked: true, directory: true },
    Start { flags: libc::O_RDONLY, mode: 0o2777, unlinked: false, directory: true },
];

#[test]
fn files_open_for_writing_match_the_library() {
    compare_all::<PassthroughFs>(FILES);
}

#[test]
fn files_open_for_reading_match_the_library() {
    compare_all::<PassthroughFs>(FILES_READ);
}

#[test]
fn directories_match_the_library() {
    compare_all::<PassthroughFs>(DIRECTORIES);
}

#[test]
fn read_only_shares_match_the_library() {
    compare_all::<PassthroughFsRo>(FILES_READ);
    compare_all::<PassthroughFsRo>(DIRECTORIES);
}

fn compare_all<F: Share>(starts: &[Start]) {
    for setting in SETTINGS {
        for start in starts {
            compare_in_a_row::<F>(setting, *start, operations().iter());
        }
        compare_in_a_row::<F>(setting, starts[0], operations().iter().rev());
    }
}

fn compare_in_a_row<'a, F: Share>(setting: &Setting, start: Start, operations: impl Iterator<Item = &'a Operation>) {
    let mut pair = Pair::<F>::new(setting.1, start);
    for operation in operations {
        pair.compare(operation).unwrap_or_else(|difference| panic!("{}, {start:?}: {difference}", setting.0));
    }
}

pub(super) fn operations() -> Vec<Operation> {
    [reading(), writing(), space(), copying(), attributes(), owners(), times(), xattrs(), acls(), opening()].concat()
}

fn reading() -> Vec<Operation> {
    let sizes = [0, 1, 4096, 100_000];
    let offsets = [0, 7, 4096, 9_999, 10_000, 1 << 40, i64::MAX as u64 - 100_000];
    let reads = sizes.into_iter().flat_map(|size| offsets.map(|offset| Read { size, offset }));
    let past_every_file = Read { size: 1, offset: i64::MAX as u64 - 1 };
    let seeks = [0, 1, 4096, 20_000, 1 << 40, 1 << 63, u64::MAX, u64::MAX - 5]
        .into_iter()
        .flat_map(|offset| [0, 1, 2, 3, 4, 5, -1].map(|whence| Lseek { offset, whence }));
    reads.chain([past_every_file]).chain(seeks).chain([Flush, Statfs, Getattr]).collect()
}

fn write(data: &[u8], offset: u64, flags: i32) -> Operation {
    Write { data: data.into(), offset, delayed: false, kill_priv: false, flags }
}

fn writing() -> Vec<Operation> {
    let append = libc::O_APPEND | libc::O_WRONLY;
    vec![
        write(b"", 3, 0),
        write(b"begin", 0, 0),
        write(b"middle", 5000, libc::O_SYNC | libc::O_DIRECT),
        write(b"end", 10_000, 0),
        write(b"after a hole", 30_000, 0),
        write(b"at the end whatever the offset", 1, append),
        write(b"beyond what a file can be", i64::MAX as u64 - 25, 0),
        write(&[b'm'; 70_000], 100, append),
        Write { data: b"where the guest says".to_vec(), offset: 40, delayed: true, kill_priv: false, flags: append },
        set_mode(0o6777),
        write(b"keeps set-id bits", 0, 0),
        Write { data: b"loses set-id bits".to_vec(), offset: 0, delayed: false, kill_priv: true, flags: 0 },
        set_mode(0o2745),
        Write { data: b"appends and loses".to_vec(), offset: 0, delayed: false, kill_priv: true, flags: append },
        Fsync { datasync: false },
        Fsync { datasync: true },
        Flush,
    ]
}

fn space() -> Vec<Operation> {
    let (keep, punch) = (libc::FALLOC_FL_KEEP_SIZE, libc::FALLOC_FL_PUNCH_HOLE);
    let modes = [
        0,
        keep,
        punch,
        punch | keep,
        libc::FALLOC_FL_ZERO_RANGE,
        libc::FALLOC_FL_COLLAPSE_RANGE,
        libc::FALLOC_FL_INSERT_RANGE,
        libc::FALLOC_FL_UNSHARE_RANGE,
        1 << 30,
        -1,
    ];
    let ranges = [(0, 4096), (4096, 4096), (1, 10), (65_536, 4096), (0, 0), (1 << 63, 1), (1, u64::MAX)];
    let all = modes.into_iter().flat_map(|mode| ranges.map(|(offset, length)| Fallocate { mode, offset, length }));
    all.chain([Lseek { offset: 0, whence: libc::SEEK_HOLE }, Lseek { offset: 4096, whence: libc::SEEK_DATA }]).collect()
}

fn copying() -> Vec<Operation> {
    let (this, other) = (End::This, End::Other);
    let copy = |from, offset_in, to, offset_out, len| Copy { from, offset_in, to, offset_out, len, flags: 0 };
    vec![
        copy(this, 0, this, 20_000, 5000),
        copy(this, 0, this, 10, 5000),
        copy(other, 100, this, 3, 700),
        copy(this, 100, other, 3, 700),
        copy(other, 0, other, 50_000, 10),
        copy(other, 1 << 40, this, 0, 10),
        copy(other, 1 << 63, this, 0, 10),
        copy(other, 0, this, 1 << 63, 10),
        copy(other, 0, this, i64::MAX as u64 - 3, 10),
        copy(other, 0, this, 0, u64::MAX),
        copy(other, 0, this, 0, 0),
        Copy { from: other, offset_in: 0, to: this, offset_out: 0, len: 10, flags: 1 },
        Copy { from: other, offset_in: 0, to: this, offset_out: 0, len: 10, flags: u64::MAX },
    ]
}

fn both(attr: SetattrIn, valid: SetattrValid) -> [Operation; 2] {
    [SetattrBy::Handle, SetattrBy::Node].map(|through| Setattr { attr, valid, through })
}

fn set_mode(mode: u32) -> Operation {
    Setattr { attr: SetattrIn { mode, ..Default::default() }, valid: SetattrValid::MODE, through: SetattrBy::Handle }
}

fn attributes() -> Vec<Operation> {
    let modes = [0, 0o644, 0o7777, 0o100_755, u32::MAX]
        .into_iter()
        .flat_map(|mode| both(SetattrIn { mode, ..Default::default() }, SetattrValid::MODE));
    let sizes = [0, 1, 70_000, 1 << 30, 1 << 62, 1 << 63, u64::MAX].into_iter().flat_map(|size| {
        let attr = SetattrIn { size, mode: 0o6755, ..Default::default() };
        [
            SetattrValid::SIZE,
            SetattrValid::SIZE | SetattrValid::KILL_SUIDGID,
            SetattrValid::SIZE | SetattrValid::MODE | SetattrValid::KILL_SUIDGID,
        ]
        .into_iter()
        .flat_map(move |valid| both(attr, valid))
    });
    let nothing = both(SetattrIn::default(), SetattrValid::empty());
    // The state after a failure in the middle is compared as well.
    let half = both(
        SetattrIn { mode: 0o700, size: u64::MAX, ..Default::default() },
        SetattrValid::MODE | SetattrValid::SIZE | SetattrValid::MTIME,
    );
    modes.chain(sizes).chain(nothing).chain(half).chain([Getattr]).collect()
}

fn owners() -> Vec<Operation> {
    let ids = [0, 1, 999, 1000, 1500, 3005, 100_000, u32::MAX];
    let each = ids.into_iter().flat_map(|id| {
        let attr = SetattrIn { uid: id.into(), gid: id.into(), ..Default::default() };
        [SetattrValid::UID, SetattrValid::GID, SetattrValid::UID | SetattrValid::GID]
            .into_iter()
            .flat_map(move |valid| [set_mode(0o6755)].into_iter().chain(both(attr, valid)))
    });
    each.chain([Getattr]).collect()
}

fn times() -> Vec<Operation> {
    use SetattrValid as V;
    let valids = [
        V::ATIME,
        V::MTIME,
        V::ATIME | V::MTIME,
        V::ATIME | V::ATIME_NOW,
        V::MTIME | V::MTIME_NOW,
        V::ATIME | V::ATIME_NOW | V::MTIME | V::MTIME_NOW,
        V::ATIME_NOW,
        V::MTIME_NOW,
        V::CTIME,
    ];
    let moments = [(0, 0), (1_234_567_890, 987_654_321), (u64::MAX, 5), (1 << 33, 0), (5, 1_000_000_000)];
    let odd = [(7, libc::UTIME_NOW as u32), (7, libc::UTIME_OMIT as u32), (7, u32::MAX)];
    let all = moments.into_iter().chain(odd).flat_map(|(seconds, nanoseconds)| {
        let attr = SetattrIn {
            atime: seconds,
            atimensec: nanoseconds,
            mtime: seconds / 2,
            mtimensec: nanoseconds,
            ctime: 1,
            ..Default::default()
        };
        valids.into_iter().flat_map(move |valid| both(attr, valid))
    });
    all.collect()
}

const XATTRS: [&str; 11] = [
    "user.one",
    "user.secret.two",
    "user.guest.user.one",
    "trusted.three",
    "security.capability",
    "security.other",
    "system.posix_acl_default",
    "system.",
    "nonsense",
    "",
    "user.",
];

fn xattrs() -> Vec<Operation> {
    let set = |name: &CString, value: &[u8], flags| Setxattr {
        name: name.clone(),
        value: value.into(),
        flags,
        extra: SetxattrFlags::empty(),
    };
    let each = XATTRS.into_iter().flat_map(|name| {
        let name = CString::new(name).unwrap();
        let gets = [0, 1, 5, 100, 1 << 20, u32::MAX].map(|size| Getxattr { name: name.clone(), size });
        let sets = [
            set(&name, b"other", libc::XATTR_REPLACE),
            set(&name, CAPABILITY, libc::XATTR_CREATE),
            set(&name, CAPABILITY, libc::XATTR_CREATE),
            set(&name, b"value", 0),
            set(&name, b"", 0),
            set(&name, CAPABILITY, libc::XATTR_REPLACE),
            set(&name, b"value", 77),
            set(&name, &[b'v'; 70_000], 0),
        ];
        let losing = [
            write(b"x", 0, 0),
            set_owner(1),
            Setattr {
                attr: SetattrIn { size: 9, ..Default::default() },
                valid: SetattrValid::SIZE,
                through: SetattrBy::Node,
            },
        ]
        .into_iter()
        .flat_map({
            let (name, again) = (name.clone(), set(&name, CAPABILITY, 0));
            move |loss| [again.clone(), loss, Getxattr { name: name.clone(), size: 100 }]
        });
        let lists = [0, 1, 10, 1000, u32::MAX].map(|size| Listxattr { size });
        let removals = [Removexattr { name: name.clone() }, Removexattr { name: name.clone() }];
        gets.clone().into_iter().chain(sets).chain(losing).chain(gets).chain(lists).chain(removals).collect::<Vec<_>>()
    });
    each.chain([Listxattr { size: 0 }, Listxattr { size: 100 }]).collect()
}

fn set_owner(uid: u32) -> Operation {
    Setattr {
        attr: SetattrIn { uid: uid.into(), ..Default::default() },
        valid: SetattrValid::UID,
        through: SetattrBy::Handle,
    }
}

/// A valid value of `security.capability`: version 2, CAP_CHOWN permitted.
const CAPABILITY: &[u8] = &[0, 0, 0, 2, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];

/// Version 2; owner rwx, group r-x, others r--, none of them named.
const ACL: &[u8] =
    &[2, 0, 0, 0, 1, 0, 7, 0, 255, 255, 255, 255, 4, 0, 5, 0, 255, 255, 255, 255, 0x20, 0, 4, 0, 255, 255, 255, 255];

fn acls() -> Vec<Operation> {
    let name = CString::from(c"system.posix_acl_access");
    let set = |extra| Setxattr { name: name.clone(), value: ACL.into(), flags: 0, extra };
    vec![
        set_mode(0o2770),
        set(SetxattrFlags::empty()),
        Getattr,
        set_mode(0o2770),
        set(SetxattrFlags::SETXATTR_ACL_KILL_SGID),
        Getattr,
        Getxattr { name: name.clone(), size: 100 },
        Listxattr { size: 100 },
        Removexattr { name },
    ]
}

fn accessed_long_ago() -> Operation {
    Setattr {
        attr: SetattrIn { atime: 1_000_000_000, ..Default::default() },
        valid: SetattrValid::ATIME,
        through: SetattrBy::Handle,
    }
}

fn opening() -> Vec<Operation> {
    let flags = [
        libc::O_RDONLY,
        libc::O_WRONLY,
        libc::O_RDWR,
        libc::O_RDWR | libc::O_APPEND,
        libc::O_RDWR | libc::O_TRUNC,
        libc::O_RDONLY | libc::O_TRUNC,
        libc::O_RDONLY | libc::O_CREAT,
        libc::O_RDONLY | libc::O_EXCL,
        libc::O_RDONLY | libc::O_DIRECTORY,
        libc::O_RDWR | libc::O_DIRECT,
        libc::O_RDONLY | libc::O_NOATIME,
        libc::O_RDONLY | libc::O_NOFOLLOW,
        libc::O_ACCMODE,
        libc::O_RDWR | libc::O_SYNC,
        i32::MIN,
    ];
    flags
        .into_iter()
        .flat_map(|flags| {
            [
                write(b"there was something", 0, 0),
                set_mode(0o6755),
                accessed_long_ago(),
                Setxattr {
                    name: c"security.capability".into(),
                    value: CAPABILITY.into(),
                    flags: 0,
                    extra: SetxattrFlags::empty(),
                },
                Open { kill_priv: flags & libc::O_EXCL == 0, flags },
                Read { size: 4096, offset: 0 },
                write(b"written", 4096, flags),
                write(&[b'w'; 4096], 8192, flags),
                Lseek { offset: 3, whence: libc::SEEK_CUR },
            ]
        })
        .collect()
}
