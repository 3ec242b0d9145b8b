//! Real-time priority, for machines that others use too: without it their slices of the processors, of milliseconds,
//! would be measured as well.

use std::io;

/// The lowest real-time priority: above all ordinary processes, below the kernel's threads.
const PRIORITY: i32 = 1;

/// Gives this thread and the processes that it starts a real-time priority, or removes it.
pub(crate) fn set_real_time(on: bool) -> io::Result<()> {
    let (policy, sched_priority) = if on { (libc::SCHED_RR, PRIORITY) } else { (libc::SCHED_OTHER, 0) };
    let parameters = libc::sched_param { sched_priority };
    // SAFETY: 0 is this thread; the parameters outlive the call.
    match unsafe { libc::sched_setscheduler(0, policy, &parameters) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}
