//! Checks whether sockets are still at their paths, in a thread for each file system, because a check of a hung one hangs.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::listening::by_device;
use crate::blocking::Call;
use crate::listen::BoundSocket;

/// Time for which the first status that finds a file system hung waits for it.
const PATIENCE: Duration = Duration::from_millis(500);

/// Time after which nobody can connect to a socket whose file system has not responded: a VMM would wait like the check.
const UNREACHABLE: Duration = Duration::from_secs(5);

/// The checks that are under way, by device, and when they began.
#[derive(Clone, Debug, Default)]
pub(crate) struct SocketChecks(Arc<Mutex<BTreeMap<u64, Instant>>>);

impl SocketChecks {
    /// Checks sockets, whose results are in them afterwards. Waits for no file system that has not responded to an earlier
    /// check.
    pub(crate) fn check(&self, sockets: Vec<Arc<BoundSocket>>) {
        let deadline = Instant::now() + PATIENCE;
        let calls: Vec<_> = by_device(sockets).into_iter().filter_map(|it| self.start(it)).collect();
        calls.into_iter().for_each(|call| _ = call.until(deadline));
    }

    fn start(&self, (device, sockets): (u64, Vec<Arc<BoundSocket>>)) -> Option<Call<()>> {
        if let Some(since) = self.running().get(&device) {
            if since.elapsed() > UNREACHABLE && sockets.iter().any(|socket| socket.in_place()) {
                tracing::warn!(sockets = sockets.len(), "the file system of sockets does not respond");
                sockets.iter().for_each(|socket| socket.presume_missing());
            }
            return None;
        }
        self.running().insert(device, Instant::now());
        let checks = self.clone();
        let check = move || {
            sockets.iter().for_each(|socket| _ = socket.check());
            checks.running().remove(&device);
        };
        match Call::start(check, |()| {}) {
            Ok(call) => Some(call),
            Err(error) => {
                self.running().remove(&device);
                tracing::warn!(%error, "no thread to check sockets");
                None
            }
        }
    }

    fn running(&self) -> MutexGuard<'_, BTreeMap<u64, Instant>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
