//! Places at which a broker can be made to die, for tests (feature `die-at-step`): before and after each record, deposit and
//! message.

/// A place between two effects. With the feature, and `VIRTIOFS_DIE_AT_STEP=N` in the environment, the process gets SIGKILL
/// at the Nth.
#[cfg(feature = "die-at-step")]
pub(crate) fn step() {
    use std::sync::OnceLock;
    use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

    static AT: OnceLock<Option<u64>> = OnceLock::new();
    static STEPS: AtomicU64 = AtomicU64::new(0);
    let at = *AT.get_or_init(|| std::env::var("VIRTIOFS_DIE_AT_STEP").ok()?.parse().ok());
    if at == Some(STEPS.fetch_add(1, Relaxed) + 1) {
        let _ = rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::KILL);
    }
}

/// A place between two effects.
#[cfg(not(feature = "die-at-step"))]
pub(crate) fn step() {}
