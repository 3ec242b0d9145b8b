//! Keeps a number of request chains going at once from one thread, and measures.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use testkit::fuse::call::{CallError, Pending, Reply};

/// What was done in a slice of time.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Measured {
    /// Operations, or bytes.
    pub(crate) amount: f64,
    /// In this time.
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
    /// What the reply just taken completed.
    pub(crate) done: f64,
}

impl Next {
    /// Another request.
    pub(crate) fn go(request: Pending, done: f64) -> Self {
        Self { request: Some(request), done }
    }

    /// The chain ends here.
    pub(crate) fn end(done: f64) -> Self {
        Self { request: None, done }
    }
}

/// What a chain continues from.
pub(crate) struct Turn {
    /// Number of the chain.
    pub(crate) chain: usize,
    /// The reply to its last request; none at its start.
    pub(crate) reply: Option<Reply>,
    /// Time is up: finish what is open, begin nothing.
    pub(crate) closing: bool,
}

/// Runs `depth` chains for a slice of time. Chains are served in turn, as their requests were made.
pub(crate) fn drive(
    depth: usize,
    slice: Duration,
    mut step: impl FnMut(Turn) -> Result<Next, CallError>,
) -> Result<Measured, CallError> {
    let started = Instant::now();
    let mut amount = 0.0;
    let mut running: VecDeque<(usize, Pending)> = VecDeque::with_capacity(depth);
    for chain in 0..depth {
        let next = step(Turn { chain, reply: None, closing: false })?;
        running.extend(next.request.map(|request| (chain, request)));
    }
    while let Some((chain, request)) = running.pop_front() {
        let reply = Some(request.wait()?);
        let closing = started.elapsed() >= slice;
        let next = step(Turn { chain, reply, closing })?;
        amount += next.done;
        running.extend(next.request.map(|request| (chain, request)));
    }
    Ok(Measured { amount, elapsed: started.elapsed() })
}
