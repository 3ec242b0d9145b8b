//! Random operations in random order.

use std::ffi::CString;

use proptest::collection::vec;
use proptest::prelude::*;
use proptest::sample::select;
use virtiofsd::filesystem::{SetattrValid, SetxattrFlags};
use virtiofsd::fuse::SetattrIn;
use virtiofsd::passthrough::PassthroughFs;

use super::operation::Operation::{self, *};
use super::pair::{End, Pair, Start};
use super::settings::SETTINGS;
use crate::orphaned::SetattrBy;

proptest! {
    #![proptest_config(ProptestConfig { cases: 192, max_shrink_iters: 2000, ..ProptestConfig::default() })]

    #[test]
    fn whatever_a_guest_does_is_answered_as_by_the_library(
        setting in select(SETTINGS),
        start in start(),
        operations in vec(operation(), 1..40),
    ) {
        let mut pair = Pair::<PassthroughFs>::new(setting.1, start);
        for operation in &operations {
            pair.compare(operation).map_err(|difference| TestCaseError::fail(format!("{}: {difference}", setting.0)))?;
        }
    }
}

fn start() -> impl Strategy<Value = Start> {
    let flags = select(&[libc::O_RDONLY, libc::O_WRONLY, libc::O_RDWR, libc::O_RDWR | libc::O_APPEND]);
    (flags, 0..0o10000_u32, any::<bool>()).prop_map(|(flags, mode, unlinked)| Start {
        flags,
        mode,
        unlinked,
        directory: false,
    })
}

/// Mostly within the file, sometimes any offset.
fn offset() -> impl Strategy<Value = u64> {
    prop_oneof![8 => 0..20_000_u64, 2 => (0..8_u64).prop_map(|page| page * 4096), 1 => 0..1_u64 << 40]
}

fn length() -> impl Strategy<Value = u64> {
    prop_oneof![8 => 0..9000_u64, 2 => (1..5_u64).prop_map(|pages| pages * 4096)]
}

fn extreme() -> impl Strategy<Value = u64> {
    prop_oneof![9 => offset(), 1 => any::<u64>()]
}

fn open_flags() -> impl Strategy<Value = i32> {
    select(&[0, libc::O_RDWR, libc::O_APPEND, libc::O_WRONLY | libc::O_APPEND, libc::O_TRUNC | libc::O_RDWR])
}

fn operation() -> impl Strategy<Value = Operation> {
    prop_oneof![
        3 => (0..9000_u32, offset()).prop_map(|(size, offset)| Read { size, offset }),
        4 => write(),
        1 => any::<bool>().prop_map(|datasync| Fsync { datasync }),
        1 => Just(Flush),
        2 => (extreme(), 0..6_i32).prop_map(|(offset, whence)| Lseek { offset, whence }),
        2 => (0..0x80_i32, extreme(), length()).prop_map(|(mode, offset, length)| Fallocate { mode, offset, length }),
        2 => copy(),
        1 => Just(Getattr),
        4 => setattr(),
        4 => xattr(),
        1 => (any::<bool>(), open_flags()).prop_map(|(kill_priv, flags)| Open { kill_priv, flags }),
    ]
}

fn write() -> impl Strategy<Value = Operation> {
    (vec(any::<u8>(), 0..5000), offset(), any::<bool>(), any::<bool>(), open_flags())
        .prop_map(|(data, offset, delayed, kill_priv, flags)| Write { data, offset, delayed, kill_priv, flags })
}

fn copy() -> impl Strategy<Value = Operation> {
    let end = || select(&[End::This, End::Other]);
    (end(), extreme(), end(), extreme(), length()).prop_map(|(from, offset_in, to, offset_out, len)| Copy {
        from,
        offset_in,
        to,
        offset_out,
        len,
        flags: 0,
    })
}

fn setattr() -> impl Strategy<Value = Operation> {
    let ids = || prop_oneof![0..5000_u32, any::<u32>()];
    let seconds = || prop_oneof![0..1_u64 << 32, any::<u64>()];
    let times = (seconds(), seconds(), 0..1_100_000_000_u32, any::<u32>());
    let through = select(&[SetattrBy::Handle, SetattrBy::Node]);
    (any::<u32>(), extreme(), any::<u32>(), ids(), ids(), times, through).prop_map(
        |(valid, size, mode, uid, gid, (atime, mtime, atimensec, mtimensec), through)| Setattr {
            attr: SetattrIn {
                size,
                mode,
                uid: uid.into(),
                gid: gid.into(),
                atime,
                mtime,
                atimensec,
                mtimensec,
                ..Default::default()
            },
            valid: SetattrValid::from_bits_truncate(valid & valid >> 7),
            through,
        },
    )
}

fn xattr() -> impl Strategy<Value = Operation> {
    let names = [c"user.a", c"user.secret", c"trusted.b", c"security.c", c"security.capability", c"user.guest.user.a"];
    let name = select(names.map(CString::from).to_vec());
    (name, vec(any::<u8>(), 0..40), 0..3_i32, prop_oneof![Just(0), 1..50_u32, any::<u32>()], 0..4_u8).prop_map(
        |(name, value, flags, size, which)| match which {
            0 => Setxattr { name, value, flags, extra: SetxattrFlags::empty() },
            1 => Getxattr { name, size },
            2 => Listxattr { size },
            _ => Removexattr { name },
        },
    )
}
