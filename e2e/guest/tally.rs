//! Counts operations, errors by errno, and wrong contents.

use std::collections::BTreeMap;
use std::io;
use std::time::{Duration, Instant};

/// Number of failures that are printed. All failures are counted.
const PRINTED: usize = 8;

#[derive(Default)]
pub struct Tally {
    operations: u64,
    errors: BTreeMap<String, u64>,
    wrong: u64,
    details: Vec<String>,
    slowest: Duration,
}

impl Tally {
    /// Runs one operation and counts it and its result.
    pub fn of<T>(&mut self, what: &str, operation: impl FnOnce() -> io::Result<T>) -> Option<T> {
        let start = Instant::now();
        let result = operation();
        self.slowest = self.slowest.max(start.elapsed());
        self.operations += 1;
        match result {
            Ok(value) => Some(value),
            Err(error) => {
                let errno = errno_name(&error);
                self.add_detail(format!("{what}: {errno}"));
                *self.errors.entry(errno).or_default() += 1;
                None
            }
        }
    }

    /// Counts a wrong content or a wrong result of a call that succeeded.
    pub fn expect(&mut self, right: bool, what: impl FnOnce() -> String) {
        if !right {
            self.wrong += 1;
            self.add_detail(what());
        }
    }

    fn add_detail(&mut self, line: String) {
        if self.details.len() < PRINTED {
            self.details.push(line);
        }
    }

    /// The summary as one line of JSON.
    pub fn json(&self, rounds: u64) -> String {
        let errors: Vec<_> = self.errors.iter().map(|(errno, count)| format!("{}:{count}", quoted(errno))).collect();
        let details: Vec<_> = self.details.iter().map(|line| quoted(line)).collect();
        format!(
            "{{\"rounds\":{rounds},\"operations\":{},\"errors\":{{{}}},\"wrong\":{},\"details\":[{}],\"slowest_us\":{}}}",
            self.operations,
            errors.join(","),
            self.wrong,
            details.join(","),
            self.slowest.as_micros()
        )
    }
}

fn quoted(text: &str) -> String {
    let mut out = String::from('"');
    for c in text.chars() {
        match c {
            '"' | '\\' => out.extend(['\\', c]),
            c if c.is_control() => out.push_str(&format!("\\u{:04x}", c as u32)),
            c => out.push(c),
        }
    }
    out.push('"');
    out
}

/// Names of the errors of file systems. The numbers are Linux's, which are the same on all architectures of guests.
fn errno_name(error: &io::Error) -> String {
    let Some(number) = error.raw_os_error() else { return error.to_string() };
    let name = match number {
        1 => "EPERM",
        2 => "ENOENT",
        4 => "EINTR",
        5 => "EIO",
        9 => "EBADF",
        12 => "ENOMEM",
        13 => "EACCES",
        16 => "EBUSY",
        17 => "EEXIST",
        18 => "EXDEV",
        20 => "ENOTDIR",
        21 => "EISDIR",
        22 => "EINVAL",
        23 => "ENFILE",
        24 => "EMFILE",
        28 => "ENOSPC",
        30 => "EROFS",
        36 => "ENAMETOOLONG",
        38 => "ENOSYS",
        39 => "ENOTEMPTY",
        40 => "ELOOP",
        95 => "EOPNOTSUPP",
        107 => "ENOTCONN",
        116 => "ESTALE",
        _ => return format!("errno {number}"),
    };
    name.to_owned()
}
