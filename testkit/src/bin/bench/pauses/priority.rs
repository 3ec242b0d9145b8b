//! Running ahead of everything else on the machine, for machines that others use as well: their share of the
//! processors comes in slices of milliseconds, which is what is being measured.

use std::io;

/// The lowest of the real-time priorities: ahead of everything ordinary, behind what the kernel needs.
const PRIORITY: i32 = 1;

/// Has this thread, and what it starts from now on, run ahead of all others; or ends that.
pub(crate) fn ahead(on: bool) -> io::Result<()> {
    let (policy, sched_priority) = if on { (libc::SCHED_RR, PRIORITY) } else { (libc::SCHED_OTHER, 0) };
    let parameters = libc::sched_param { sched_priority };
    // SAFETY: 0 is this thread; the parameters live for the call.
    match unsafe { libc::sched_setscheduler(0, policy, &parameters) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}
