//! Letting go of the source, so that the host can unmount it; the guest waits meanwhile.
//!
//! Nothing of the source stays open: an engine that is being started is waited for and ended, the one that serves
//! comes to rest between two requests and ends, and so does the spare. The ledger has what the next one needs.

use std::sync::mpsc;
use std::time::Instant;

use virtiofs_contract::engine::Predecessor;
use virtiofs_contract::preflight::{Finding, Reason};

use super::{Deeds, Engines, REST_DEADLINE};
use crate::engine::finding;

/// An order to let go.
#[derive(Debug)]
pub(crate) struct ReleaseOrder {
    /// When the session goes on by itself.
    pub(crate) until: Instant,
    /// Also if the guest loses open files by it?
    pub(crate) force: bool,
    /// Told once it is done, or why it is not; then the session serves as before.
    pub(crate) answer: mpsc::Sender<Result<(), Finding>>,
}

/// A source that is not to be touched.
#[derive(Debug)]
pub(super) struct Hold {
    pub(super) until: Instant,
    force: bool,
    /// Whoever waits for it; none: it is done.
    answer: Option<mpsc::Sender<Result<(), Finding>>>,
}

impl Hold {
    /// For a session that begins while its source is released.
    pub(super) fn from_the_start(until: Instant) -> Self {
        Hold { until, force: false, answer: None }
    }
}

impl Engines {
    /// The source is to be let go of.
    pub(crate) fn release(&mut self, order: ReleaseOrder) {
        let ReleaseOrder { until, force, answer } = order;
        let nothing_open = self.serving.is_none() && self.spare.is_none() && self.order.is_none();
        if self.is_released() || nothing_open && self.dying.is_none() && self.estate.parking.count() == 0 {
            self.hold = Some(Hold { until, force, answer: None });
            // Nobody waits any more: the broker has given this session up as stuck.
            let _ = answer.send(Ok(()));
        } else {
            self.hold = Some(Hold { until, force, answer: Some(answer) });
        }
    }

    /// The source may be used again.
    pub(crate) fn resume(&mut self) {
        if self.hold.take().is_some() {
            tracing::info!(session = self.session, "source taken up again");
            self.not_before = None;
            self.history.failures = 0;
        }
    }

    /// Has the source been let go of?
    pub(crate) fn is_released(&self) -> bool {
        self.hold.as_ref().is_some_and(|hold| hold.answer.is_none())
    }

    pub(super) fn look_at_the_hold(&mut self) {
        if self.hold.as_ref().is_none_or(|hold| hold.until > Instant::now()) {
            return;
        }
        if !self.is_released() {
            self.refuse_release(stuck("its time was over before the source was let go of"));
        } else {
            tracing::warn!(session = self.session, "the time for which the source was released is over");
            self.resume();
        }
    }

    /// Lets go, as far as that is possible now. What is still to come comes by mail.
    pub(super) fn let_go_of_the_source(&mut self, deeds: &mut Deeds<'_>) {
        if self.is_released() || self.order.as_ref().is_some_and(|order| !order.overdue) {
            return;
        }
        if self.order.is_some() || self.dying.is_some() {
            return self.refuse_release(stuck("an engine is stuck in the source, from before"));
        }
        match self.bring_to_an_end(deeds) {
            Ok(()) => self.released(),
            Err(finding) => self.refuse_release(finding),
        }
    }

    fn bring_to_an_end(&mut self, deeds: &mut Deeds<'_>) -> Result<(), Finding> {
        let Some(mut engine) = self.serving.take() else { return self.check_parked() };
        match engine.let_go(REST_DEADLINE) {
            Ok(()) => {}
            Err(error) if error.is_unrest() => {
                self.goes_on(engine, deeds);
                return Err(stuck(&error.to_string()));
            }
            Err(error) => {
                self.serving = Some(engine);
                self.lose_serving(&format!("; {error}"), deeds);
                return match self.dying {
                    Some(_) => Err(stuck("its engine was killed and does not die")),
                    None => self.check_parked(),
                };
            }
        }
        engine.engine.parking.settle();
        match self.check_parked() {
            Ok(()) => {
                self.predecessor = Predecessor::Quiesced;
                Ok(())
            }
            Err(held) => {
                self.goes_on(engine, deeds);
                Err(held)
            }
        }
    }

    fn check_parked(&self) -> Result<(), Finding> {
        let force = self.hold.as_ref().is_some_and(|hold| hold.force);
        match self.estate.parking.nameless() {
            files if files > 0 && !force => Err(finding(
                Reason::OrphanedFilesOpen,
                format!("session {} has {files} open files that no name leads to; it would lose them", self.session),
                "have the guest close them (or the programs that use them), or release with force",
            )),
            _ => Ok(()),
        }
    }

    fn released(&mut self) {
        (self.serving, self.spare) = (None, None);
        self.estate.parking.clear();
        (self.lost, self.trouble, self.not_before) = (None, None, None);
        tracing::info!(session = self.session, "source released");
        self.answer_release(Ok(()));
    }

    fn refuse_release(&mut self, why: Finding) {
        tracing::warn!(session = self.session, finding = %why, "source not released");
        self.answer_release(Err(why));
        self.hold = None;
    }

    fn answer_release(&mut self, result: Result<(), Finding>) {
        if let Some(answer) = self.hold.as_mut().and_then(|hold| hold.answer.take()) {
            // Nobody waits any more: the broker has given this session up as stuck.
            let _ = answer.send(result);
        }
    }
}

/// The finding for a source that is not let go of.
pub(crate) fn stuck(why: &str) -> Finding {
    finding(
        Reason::EngineStuck,
        format!("the source was not released: {why}"),
        "see whether the file system below the source answers, then release it once more; sessions go on as before",
    )
}
