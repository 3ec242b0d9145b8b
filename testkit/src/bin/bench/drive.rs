//! Drives a number of request chains concurrently from one thread, and measures them.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use testkit::fuse::call::{CallError, Pending, Reply};

/// Amount of work in a slice of time.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Measured {
    /// Operations, or bytes.
    pub(crate) amount: f64,
    /// Duration of the slice.
    pub(crate) elapsed: Duration,
}

impl Measured {
    pub(crate) fn per_second(&self) -> f64 {
        self.amount / self.elapsed.as_secs_f64()
    }
}

/// The next request of a chain.
pub(crate) struct Next {
    pub(crate) request: Option<Pending>,
    /// Amount of work that the last reply completed.
    pub(crate) done: f64,
}

impl Next {
    /// Sends another request.
    pub(crate) fn request(request: Pending, done: f64) -> Self {
        Self { request: Some(request), done }
    }

    /// Ends the chain.
    pub(crate) fn end(done: f64) -> Self {
        Self { request: None, done }
    }
}

/// State from which a chain continues.
pub(crate) struct Step {
    /// Number of the chain.
    pub(crate) chain: usize,
    /// The reply to its last request; `None` at its start.
    pub(crate) reply: Option<Reply>,
    /// True if the slice is over: complete what is open, start nothing.
    pub(crate) closing: bool,
}

/// Runs `depth` chains for a slice of time, in the order of their requests.
pub(crate) fn drive(
    depth: usize,
    slice: Duration,
    mut step: impl FnMut(Step) -> Result<Next, CallError>,
) -> Result<Measured, CallError> {
    let started = Instant::now();
    let mut amount = 0.0;
    let mut running: VecDeque<(usize, Pending)> = VecDeque::with_capacity(depth);
    for chain in 0..depth {
        let next = step(Step { chain, reply: None, closing: false })?;
        running.extend(next.request.map(|request| (chain, request)));
    }
    while let Some((chain, request)) = running.pop_front() {
        let reply = Some(request.wait()?);
        let closing = started.elapsed() >= slice;
        let next = step(Step { chain, reply, closing })?;
        amount += next.done;
        running.extend(next.request.map(|request| (chain, request)));
    }
    Ok(Measured { amount, elapsed: started.elapsed() })
}
