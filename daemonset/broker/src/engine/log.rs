//! Log lines of an engine.
//!
//! The pipe never blocks the engine: lines that do not fit are lost, and lines over the rate are dropped here. A broker
//! that is busy, or stopped in a debugger, does not block the guest.

use std::io::{self, PipeReader, Read};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use crate::rate::LineRate;

/// Longest line; the rest is cut off.
const LINE: usize = 1024;

/// Burst of lines, and the interval after which one more is allowed.
const BURST: u32 = 50;
const PER_LINE: Duration = Duration::from_millis(100);

/// Bytes read at a time, so that a flood does not block the session.
const PER_DRAIN: usize = 64 << 10;

/// The broker's end of an engine's output.
#[derive(Debug)]
pub(crate) struct EngineLog {
    pipe: Option<PipeReader>,
    lines: Lines,
    rate: LineRate,
    last: String,
}

/// Creates a pipe: the log, and the engine's end.
pub(crate) fn pipe() -> io::Result<(EngineLog, OwnedFd)> {
    let (reader, writer) = io::pipe()?;
    for end in [reader.as_fd(), writer.as_fd()] {
        rustix::io::ioctl_fionbio(end, true)?;
    }
    let log = EngineLog {
        pipe: Some(reader),
        lines: Lines::default(),
        rate: LineRate::new(BURST, PER_LINE),
        last: String::new(),
    };
    Ok((log, writer.into()))
}

impl EngineLog {
    /// The log of an engine that an earlier broker started; none: it cannot be read any more.
    pub(crate) fn restored(pipe: Option<OwnedFd>) -> Self {
        let (lines, rate) = (Lines::default(), LineRate::new(BURST, PER_LINE));
        EngineLog { pipe: pipe.map(PipeReader::from), lines, rate, last: String::new() }
    }

    /// Logs the lines that arrived since the last call.
    pub(crate) fn drain(&mut self, session: &str) {
        let mut buffer = [0u8; 4096];
        let mut left = PER_DRAIN;
        while left > 0 {
            let Some(pipe) = &mut self.pipe else { return };
            match pipe.read(&mut buffer) {
                Ok(0) => self.pipe = None,
                Ok(length) => {
                    left = left.saturating_sub(length);
                    self.pass_on(session, &buffer[..length]);
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(_) => self.pipe = None,
            }
        }
    }

    fn pass_on(&mut self, session: &str, bytes: &[u8]) {
        for line in self.lines.feed(bytes) {
            match self.rate.pass(Instant::now()) {
                Some(0) => tracing::info!(session, "engine: {line}"),
                Some(dropped) => tracing::info!(session, dropped, "engine: {line}"),
                None => {}
            }
            self.last = line;
        }
    }

    /// The last line, as the end of a message about the engine's exit; empty: there was none.
    pub(crate) fn ending(&self) -> String {
        if self.last.is_empty() { String::new() } else { format!("; last log line: {}", self.last) }
    }

    pub(crate) fn fd(&self) -> Option<BorrowedFd<'_>> {
        self.pipe.as_ref().map(AsFd::as_fd)
    }
}

/// Assembles bytes to lines and removes control characters.
#[derive(Debug, Default)]
struct Lines {
    partial: Vec<u8>,
}

impl Lines {
    fn feed(&mut self, bytes: &[u8]) -> Vec<String> {
        let mut lines = Vec::new();
        for byte in bytes {
            match byte {
                b'\n' => lines.push(clean(&std::mem::take(&mut self.partial))),
                _ if self.partial.len() < LINE => self.partial.push(*byte),
                _ => {}
            }
        }
        lines.retain(|line| !line.is_empty());
        lines
    }
}

/// An engine may be under the control of its guest, so its output must not control a terminal.
fn clean(line: &[u8]) -> String {
    String::from_utf8_lossy(line).chars().filter(|c| !c.is_control()).collect::<String>().trim().to_owned()
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::Write;

    use super::*;

    #[test]
    fn lines_are_whole_clean_and_bounded() {
        let mut lines = Lines::default();
        assert_eq!(lines.feed(b"one\ntw"), ["one"]);
        assert_eq!(lines.feed(b"o\x1b[31m\n\n"), ["two[31m"]);
        let long = lines.feed(&[&[b'x'; 5000][..], b"\n"].concat());
        assert_eq!(long[0].len(), LINE);
    }

    #[test]
    fn full_pipe_does_not_block_the_engine() {
        let (mut log, end) = pipe().unwrap();
        let mut engine = File::from(end);
        let error = loop {
            if let Err(error) = engine.write_all(&[b'x'; 4096]) {
                break error;
            }
        };
        assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
        log.drain("test");
        engine.write_all(b"\nlast words\n").unwrap();
        drop(engine);
        // A child of another test holds a copy of this end until it calls exec.
        for _ in 0..1000 {
            log.drain("test");
            if log.fd().is_none() {
                break;
            }
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
        assert_eq!(log.ending(), "; last log line: last words");
        assert!(log.fd().is_none());
    }
}
