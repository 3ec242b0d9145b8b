//! Processor time that processes have used: on a busy machine it says more than the clock.

use std::fs;
use std::path::Path;
use std::time::Duration;

/// User and system time of all threads that these processes have now.
pub(crate) fn cpu_time(processes: &[i32]) -> Duration {
    let threads = processes.iter().filter_map(|process| fs::read_dir(format!("/proc/{process}/task")).ok());
    threads.flat_map(Iterator::flatten).map(|thread| thread_time(&thread.path())).sum()
}

/// The first number of `schedstat`: nanoseconds on a processor.
fn thread_time(thread: &Path) -> Duration {
    let schedstat = fs::read_to_string(thread.join("schedstat")).unwrap_or_default();
    let nanoseconds = schedstat.split_whitespace().next().and_then(|number| number.parse().ok());
    Duration::from_nanos(nanoseconds.unwrap_or(0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn work_takes_processor_time() {
        let this = [std::process::id() as i32];
        let before = cpu_time(&this);
        let mut sum = 0_u64;
        while cpu_time(&this) < before + Duration::from_millis(20) {
            sum = (0..100_000).fold(sum, |sum, number| std::hint::black_box(sum ^ number));
        }
        assert!(!before.is_zero());
    }
}
