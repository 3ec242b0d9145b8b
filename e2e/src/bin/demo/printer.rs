//! Output of the demo.

use std::time::Instant;

/// Prints steps with the time since the start, and indented details.
pub(crate) struct Printer {
    start: Instant,
}

impl Printer {
    pub(crate) fn new() -> Self {
        Self { start: Instant::now() }
    }

    pub(crate) fn step(&self, line: &str) {
        println!("[{:5.1} s] {line}", self.start.elapsed().as_secs_f64());
    }

    pub(crate) fn detail(&self, text: &str) {
        for line in text.lines() {
            println!("          | {line}");
        }
    }
}
