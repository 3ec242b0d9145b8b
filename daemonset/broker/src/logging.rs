//! Log lines on standard error, which may lead anywhere: to a disk that is full, to nobody, to somebody who has stopped
//! reading.
//!
//! Lines wait in a bounded queue for a thread that does nothing but write them. Sessions log while they replace
//! engines, and while they hold what `status` reads: none of that may wait for a terminal that was stopped with
//! Ctrl-S. (`tracing-appender` has such a queue; at the end it prints to standard output when nobody reads, which is
//! to wait all the same, and it does not say how much was lost.)

use std::io::{self, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering::SeqCst};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread;
use std::time::{Duration, Instant};

use clap::ValueEnum;
use tracing_subscriber::EnvFilter;

/// Lines that may wait: some 1 MB, and more than a few hundred sessions say at once.
const MOST_WAITING: usize = 4096;

/// How long the last lines are waited for.
const LAST_LINES: Duration = Duration::from_secs(1);

/// Between two looks whether they are written.
const GLANCE: Duration = Duration::from_millis(2);

/// How log lines look.
#[derive(Clone, Copy, ValueEnum)]
pub(crate) enum LogFormat {
    Text,
    Json,
}

/// Starts logging. What is returned is to be asked to [finish](Lines::finish) at the end.
pub(crate) fn start(filter: &str, format: LogFormat) -> anyhow::Result<Lines> {
    let filter = EnvFilter::try_new(filter)?;
    let lines = Lines::to(io::stderr(), |lost| tracing::warn!(lost, "log lines were lost: nobody read them in time"))?;
    let writer = lines.clone();
    // A line that cannot be written is lost; the library would print so, and panic where that fails too.
    let log = tracing_subscriber::fmt().with_env_filter(filter).log_internal_errors(false);
    let log = log.with_writer(move || writer.clone());
    match format {
        LogFormat::Text => log.with_ansi(false).init(),
        LogFormat::Json => log.json().init(),
    }
    Ok(lines)
}

/// Takes lines and never makes their writer wait: what does not fit into the queue is lost, and counted.
#[derive(Clone, Debug)]
pub(crate) struct Lines {
    queue: SyncSender<Vec<u8>>,
    counts: Arc<Counts>,
}

#[derive(Debug, Default)]
struct Counts {
    /// Lines that are not written yet.
    waiting: AtomicUsize,
    /// Lines that were lost since it was last said.
    lost: AtomicU64,
}

impl Lines {
    fn to(output: impl Write + Send + 'static, say_lost: impl Fn(u64) + Send + 'static) -> io::Result<Self> {
        let (queue, lines) = sync_channel(MOST_WAITING);
        let counts = Arc::new(Counts::default());
        let counted = counts.clone();
        let write_out = move || write_out(&lines, output, &counted, say_lost);
        thread::Builder::new().name("log".into()).spawn(write_out)?;
        Ok(Lines { queue, counts })
    }

    /// Waits until everything is written, as long as somebody reads it.
    pub(crate) fn finish(&self) {
        let end = Instant::now() + LAST_LINES;
        while self.counts.waiting.load(SeqCst) > 0 && Instant::now() < end {
            thread::sleep(GLANCE);
        }
    }
}

impl Write for Lines {
    /// One call, one line: that is how the library writes.
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        self.counts.waiting.fetch_add(1, SeqCst);
        if self.queue.try_send(line.to_vec()).is_err() {
            self.counts.waiting.fetch_sub(1, SeqCst);
            self.counts.lost.fetch_add(1, SeqCst);
        }
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn write_out(lines: &Receiver<Vec<u8>>, mut output: impl Write, counts: &Counts, say_lost: impl Fn(u64)) {
    for line in lines {
        // Nobody is left to be told that it failed.
        let _ = output.write_all(&line);
        counts.waiting.fetch_sub(1, SeqCst);
        let lost = counts.lost.swap(0, SeqCst);
        if lost > 0 {
            say_lost(lost);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::{BufRead, BufReader};
    use std::sync::Mutex;

    use super::*;

    #[test]
    fn nobody_waits_for_a_reader_and_what_is_lost_is_told() {
        let (reader, writer) = io::pipe().unwrap();
        let told = Arc::new(Mutex::new(0));
        let telling = told.clone();
        let mut lines = Lines::to(writer, move |lost| *telling.lock().unwrap() += lost).unwrap();
        let all = 64 * 1024;
        for number in 0..all {
            lines.write_all(format!("{number:063}\n").as_bytes()).unwrap();
        }
        let reading = thread::spawn(move || BufReader::new(reader).lines().map_while(Result::ok).count() as u64);
        while lines.counts.waiting.load(SeqCst) > 0 {
            thread::sleep(GLANCE);
        }
        lines.write_all(b"the last line\n").unwrap();
        drop(lines);
        let (read, lost) = (reading.join().unwrap(), *told.lock().unwrap());
        assert!(lost > 0 && read > MOST_WAITING as u64, "{read} lines were read, {lost} lost");
        assert_eq!(read + lost, all + 1);
    }

    #[test]
    fn the_last_lines_are_waited_for_and_a_failing_output_is_not() {
        let (reader, writer) = io::pipe().unwrap();
        let mut lines = Lines::to(writer, |_| {}).unwrap();
        lines.write_all(b"the end\n").unwrap();
        lines.finish();
        drop(lines);
        assert_eq!(io::read_to_string(reader).unwrap(), "the end\n");

        let (reader, writer) = io::pipe().unwrap();
        drop(reader);
        let mut lines = Lines::to(writer, |_| {}).unwrap();
        lines.write_all(b"to nobody\n").unwrap();
        lines.finish();
        assert_eq!(lines.counts.waiting.load(SeqCst), 0);
    }
}
