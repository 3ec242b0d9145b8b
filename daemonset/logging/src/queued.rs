//! A writer that never blocks its caller.
//!
//! Standard error may lead to a full disk, to a closed pipe or to a terminal that is stopped with Ctrl-S. The broker
//! logs while it replaces engines and while it holds the lock that `status` needs, so it must not wait for a reader.
//! Lines go through a bounded queue to a thread that only writes them. (`tracing-appender` has such a queue, but at the
//! end it prints to standard output, which blocks too, and it does not report how many lines it dropped.)

use std::io::{self, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering::SeqCst};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread;
use std::time::{Duration, Instant};

/// Capacity of the queue in lines: about 1 MB, more than a few hundred sessions log at once.
const QUEUE_LINES: usize = 4096;

/// How long [`QueuedWriter::finish`] waits.
const FINISH_DEADLINE: Duration = Duration::from_secs(1);

/// Interval at which [`QueuedWriter::finish`] checks the queue.
const FINISH_POLL: Duration = Duration::from_millis(2);

/// Queues lines for a thread that writes them. If the queue is full, lines are dropped and counted.
#[derive(Clone, Debug)]
pub struct QueuedWriter {
    queue: SyncSender<Vec<u8>>,
    counts: Arc<Counts>,
}

#[derive(Debug, Default)]
struct Counts {
    /// Lines that are not written yet.
    queued: AtomicUsize,
    /// Lines that were dropped since the last report.
    dropped: AtomicU64,
}

impl QueuedWriter {
    /// Starts the thread. `report_dropped` receives the number of lines that were dropped.
    pub(crate) fn new(
        output: impl Write + Send + 'static,
        report_dropped: impl Fn(u64) + Send + 'static,
    ) -> io::Result<Self> {
        let (queue, lines) = sync_channel(QUEUE_LINES);
        let counts = Arc::new(Counts::default());
        let shared = counts.clone();
        let write_out = move || write_out(&lines, output, &shared, report_dropped);
        thread::Builder::new().name("log".into()).spawn(write_out)?;
        Ok(QueuedWriter { queue, counts })
    }

    /// Waits until all lines are written, for at most one second.
    pub fn finish(&self) {
        let deadline = Instant::now() + FINISH_DEADLINE;
        while self.counts.queued.load(SeqCst) > 0 && Instant::now() < deadline {
            thread::sleep(FINISH_POLL);
        }
    }
}

impl Write for QueuedWriter {
    /// Queues one line; `tracing-subscriber` makes one call for each line.
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        self.counts.queued.fetch_add(1, SeqCst);
        if self.queue.try_send(line.to_vec()).is_err() {
            self.counts.queued.fetch_sub(1, SeqCst);
            self.counts.dropped.fetch_add(1, SeqCst);
        }
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn write_out(lines: &Receiver<Vec<u8>>, mut output: impl Write, counts: &Counts, report_dropped: impl Fn(u64)) {
    for line in lines {
        // There is no other place to report that standard error failed.
        let _ = output.write_all(&line);
        counts.queued.fetch_sub(1, SeqCst);
        let dropped = counts.dropped.swap(0, SeqCst);
        if dropped > 0 {
            report_dropped(dropped);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::{BufRead, BufReader};
    use std::sync::Mutex;

    use super::*;

    #[test]
    fn full_queue_drops_and_counts_lines() {
        let (reader, writer) = io::pipe().unwrap();
        let reported = Arc::new(Mutex::new(0));
        let total = reported.clone();
        let mut lines = QueuedWriter::new(writer, move |dropped| *total.lock().unwrap() += dropped).unwrap();
        let all = 64 * 1024;
        for number in 0..all {
            lines.write_all(format!("{number:063}\n").as_bytes()).unwrap();
        }
        let reading = thread::spawn(move || BufReader::new(reader).lines().map_while(Result::ok).count() as u64);
        while lines.counts.queued.load(SeqCst) > 0 {
            thread::sleep(FINISH_POLL);
        }
        lines.write_all(b"the last line\n").unwrap();
        drop(lines);
        let (read, dropped) = (reading.join().unwrap(), *reported.lock().unwrap());
        assert!(dropped > 0 && read > QUEUE_LINES as u64, "{read} lines were read, {dropped} dropped");
        assert_eq!(read + dropped, all + 1);
    }

    #[test]
    fn finish_waits_for_queued_lines() {
        let (reader, writer) = io::pipe().unwrap();
        let mut lines = QueuedWriter::new(writer, |_| {}).unwrap();
        lines.write_all(b"the end\n").unwrap();
        lines.finish();
        drop(lines);
        assert_eq!(io::read_to_string(reader).unwrap(), "the end\n");
    }

    #[test]
    fn finish_does_not_wait_for_a_broken_output() {
        let (reader, writer) = io::pipe().unwrap();
        drop(reader);
        let mut lines = QueuedWriter::new(writer, |_| {}).unwrap();
        lines.write_all(b"lost\n").unwrap();
        lines.finish();
        assert_eq!(lines.counts.queued.load(SeqCst), 0);
    }
}
