//! The output of the demo.

use std::time::Instant;

/// Prints each step with the time since the start.
pub(crate) struct Printer {
    start: Instant,
}

impl Printer {
    pub(crate) fn new() -> Self {
        Self { start: Instant::now() }
    }

    pub(crate) fn say(&self, line: &str) {
        println!("[{:5.1} s] {line}", self.start.elapsed().as_secs_f64());
    }

    pub(crate) fn show(&self, text: &str) {
        for line in text.lines() {
            println!("          | {line}");
        }
    }
}
