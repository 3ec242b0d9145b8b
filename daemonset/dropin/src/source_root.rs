//! What is at the path of the shared directory, read in a thread of its own: a source that hangs must not hang the thread that
//! follows the session.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::{self, JoinHandle};

use virtiofs_client::observation::is_bare;
use virtiofs_remedy::Root;

/// Reads it.
type Read = dyn Fn() -> Root + Send + Sync;

/// The path, and the read of it that is in progress.
pub(crate) struct SourceRoot {
    read: Arc<Read>,
    reading: Option<JoinHandle<Root>>,
}

impl SourceRoot {
    pub(crate) fn of(path: PathBuf) -> Self {
        Self::reading(move || root(&path))
    }

    fn reading(read: impl Fn() -> Root + Send + Sync + 'static) -> Self {
        SourceRoot { read: Arc::new(read), reading: None }
    }

    /// What the read since the last call found, and starts the next one. [`Root::Missing`] while none has ended, which is also
    /// the case while the source hangs; then no other read is started.
    pub(crate) fn observe(&mut self) -> Root {
        let found = match self.reading.take_if(|reading| reading.is_finished()) {
            Some(ended) => ended.join().unwrap_or(Root::Missing),
            None => Root::Missing,
        };
        if self.reading.is_none() {
            let read = self.read.clone();
            // Without a thread nothing is known.
            self.reading = thread::Builder::new().name("source".into()).spawn(move || read()).ok();
        }
        found
    }

    /// Forgets what an earlier read found.
    pub(crate) fn forget(&mut self) {
        self.reading.take_if(|reading| reading.is_finished());
    }
}

impl std::fmt::Debug for SourceRoot {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SourceRoot").field("reading", &self.reading).finish_non_exhaustive()
    }
}

fn root(path: &Path) -> Root {
    if path.read_dir().is_err() {
        Root::Missing
    } else if is_bare(path) {
        Root::Bare
    } else {
        Root::Present
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;
    use std::sync::mpsc::channel;
    use std::time::Duration;

    use super::*;

    fn settled(observed: &mut SourceRoot) -> Root {
        observed.observe();
        while !observed.reading.as_ref().is_some_and(JoinHandle::is_finished) {
            thread::sleep(Duration::from_millis(1));
        }
        observed.observe()
    }

    #[test]
    fn path_is_present_bare_or_missing() {
        let directory = tempfile::tempdir().unwrap();
        let observe = |path: &Path| settled(&mut SourceRoot::of(path.to_path_buf()));
        assert_eq!(observe(directory.path()), Root::Bare);
        std::fs::write(directory.path().join("file"), "").unwrap();
        assert_eq!(observe(directory.path()), Root::Present);
        assert_eq!(observe(&directory.path().join("file")), Root::Missing);
        assert_eq!(observe(Path::new("/nowhere")), Root::Missing);
    }

    #[test]
    fn source_that_hangs_delays_nobody_and_is_read_once() {
        let (release, released) = channel::<()>();
        let (start, started) = channel();
        let released = Mutex::new(released);
        let mut observed = SourceRoot::reading(move || {
            let _ = start.send(());
            let _ = released.lock().unwrap().recv();
            Root::Present
        });
        for _ in 0..3 {
            assert_eq!(observed.observe(), Root::Missing);
        }
        started.recv().unwrap();
        assert!(started.try_recv().is_err(), "one read at a time");
        drop(release);
        assert_eq!(settled(&mut observed), Root::Present);
    }
}
