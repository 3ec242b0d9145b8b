//! The FUSE request that is being served, passed by value to everything that serves it.

use std::thread::{self, ThreadId};

use virtiofsd::fuse::Opcode;

/// Identity of a FUSE request, as the device read it from the ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct RequestContext {
    /// The ring that it came from: what it takes is recorded in that ring's in-flight record.
    pub(crate) ring: usize,
    /// FUSE opcode.
    pub(crate) opcode: u32,
    /// True if an engine that died had started it.
    pub(crate) repeated: bool,
}

impl RequestContext {
    /// True for a LOOKUP, whose name is that of a path walk; not for READDIRPLUS.
    pub(super) fn is_lookup(self) -> bool {
        self.opcode == Opcode::Lookup as u32
    }
}

/// Holds the request while it passes through the library, whose `FileSystem` trait has no parameter for it.
///
/// This is correct only while one thread serves all rings, which [`CurrentRequest::begin`] checks: with two threads, one
/// request would be served under the identity of the other. Before a second thread serves, each needs a value of its own.
#[derive(Debug, Default)]
pub(super) struct CurrentRequest {
    request: Option<RequestContext>,
    serving: Option<ThreadId>,
}

impl CurrentRequest {
    /// Sets the request for the calls that the library makes until [`CurrentRequest::finish`].
    ///
    /// # Panics
    /// If another request is in progress, or another thread has served before.
    pub(super) fn begin(&mut self, request: RequestContext) {
        let thread = thread::current().id();
        assert_eq!(*self.serving.get_or_insert(thread), thread, "a second thread serves requests");
        let unfinished = self.request.replace(request);
        assert!(unfinished.is_none(), "{request:?} begins before {unfinished:?} is finished");
    }

    /// The request is finished.
    pub(super) fn finish(&mut self) {
        self.request = None;
    }

    /// The request in progress.
    ///
    /// # Panics
    /// If there is none.
    pub(super) fn get(&self) -> RequestContext {
        match self.request {
            Some(request) => request,
            None => panic!("a file system operation outside of a request"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const REQUEST: RequestContext = RequestContext { ring: 1, opcode: 3, repeated: false };

    #[test]
    fn one_request_is_current_until_it_is_finished() {
        let mut current = CurrentRequest::default();
        current.begin(REQUEST);
        assert_eq!(current.get(), REQUEST);
        current.finish();
        current.begin(RequestContext { ring: 0, ..REQUEST });
        assert_eq!(current.get().ring, 0);
    }

    #[test]
    #[should_panic(expected = "begins before")]
    fn two_requests_at_once_are_an_error() {
        let mut current = CurrentRequest::default();
        current.begin(REQUEST);
        current.begin(REQUEST);
    }

    #[test]
    #[should_panic(expected = "outside of a request")]
    fn no_operation_runs_without_a_request() {
        CurrentRequest::default().get();
    }

    #[test]
    fn a_second_serving_thread_is_an_error() {
        let mut current = CurrentRequest::default();
        current.begin(REQUEST);
        current.finish();
        let other = thread::spawn(move || current.begin(REQUEST));
        assert!(other.join().is_err());
    }
}
