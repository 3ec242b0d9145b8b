//! What was answered, in a form that two files with different inode numbers and clocks share.

use std::fmt::{self, Debug, Formatter};
use std::io;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use virtiofsd::filesystem::{GetxattrReply, ListxattrReply};
use virtiofsd::fuse::Attr;

/// An answer, or the error number that the guest would see.
pub(super) type Told = Result<(String, Bytes), i32>;

/// What a file or an answer contains; too much to be shown whole.
#[derive(PartialEq, Eq)]
pub(super) struct Bytes(pub(super) Vec<u8>);

impl Debug for Bytes {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let shown = &self.0[..self.0.len().min(300)];
        write!(f, "{} bytes that begin with {}", self.0.len(), shown.escape_ascii())
    }
}

pub(super) fn told<T: Debug>(result: io::Result<T>) -> Told {
    told_with(result.map(|value| (value, Vec::new())))
}

pub(super) fn told_with<T: Debug>(result: io::Result<(T, Vec<u8>)>) -> Told {
    let text = |(value, bytes)| (format!("{value:?}"), Bytes(bytes));
    result.map(text).map_err(|error| error.raw_os_error().unwrap_or(libc::EIO))
}

/// Inode numbers differ, and blocks are given when the file system likes.
pub(super) fn told_attr(result: io::Result<(Attr, Duration)>, since: SystemTime) -> Told {
    told(result.map(|(attr, timeout)| {
        let time = |seconds, nanoseconds| told_time(seconds, nanoseconds, since);
        let times = [time(attr.atime, attr.atimensec), time(attr.mtime, attr.mtimensec)];
        let Attr { size, mode, nlink, uid, gid, rdev, blksize, flags, .. } = attr;
        (times, size, mode, nlink, uid, gid, rdev, blksize, flags, timeout)
    }))
}

pub(super) fn told_value(result: io::Result<GetxattrReply>) -> Told {
    told_with(result.map(|reply| match reply {
        GetxattrReply::Value(value) => (None, value),
        GetxattrReply::Count(count) => (Some(count), Vec::new()),
    }))
}

pub(super) fn told_names(result: io::Result<ListxattrReply>) -> Told {
    told_with(result.map(|reply| match reply {
        ListxattrReply::Names(names) => (None, names),
        ListxattrReply::Count(count) => (Some(count), Vec::new()),
    }))
}

/// Free space changes under the hands of everybody else.
pub(super) fn told_statfs(result: io::Result<libc::statvfs64>) -> Told {
    told(result.map(|fs| (fs.f_bsize, fs.f_frsize, fs.f_blocks, fs.f_files, fs.f_fsid, fs.f_flag, fs.f_namemax)))
}

/// A time that was set, or "now" for one since the comparison began.
pub(super) fn told_time(seconds: u64, nanoseconds: u32, since: SystemTime) -> String {
    let slack = Duration::from_secs(2);
    let at = UNIX_EPOCH.checked_add(Duration::from_secs(seconds));
    match at {
        Some(at) if at + slack >= since && at <= SystemTime::now() + slack => "now".into(),
        _ => format!("{seconds}.{nanoseconds}"),
    }
}
