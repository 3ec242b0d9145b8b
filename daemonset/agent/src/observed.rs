//! What the loop knows of the world, and how that grows: plain data, so that [`crate::plan`] and [`crate::report`]
//! can be functions of it.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Instant;

use virtiofs_contract::control::{Endpoint, EndpointKind, EndpointStatus, Status};
use virtiofs_contract::preflight::{Finding, Preflight};

use crate::desired::Desired;
use crate::offer::{offers, share_of};
use crate::plan::{Action, tried};
use crate::source::{Source, Space};
use crate::volume::Volumes;

/// What is known.
#[derive(Clone, Debug, Default)]
pub(crate) struct Observed {
    /// The broker's endpoints by name; none: no broker answers.
    pub(crate) endpoints: Option<BTreeMap<String, EndpointStatus>>,
    /// Since when no broker has answered.
    pub(crate) silent_since: Option<Instant>,
    /// What is known of each share's source.
    pub(crate) places: BTreeMap<String, Place>,
    /// What was done about each endpoint so far.
    pub(crate) efforts: BTreeMap<String, Effort>,
    /// Endpoints that somebody has asked for, beside those that are declared, by name.
    pub(crate) asked: BTreeMap<String, Asked>,
    /// The volumes of this node; none: this agent has nothing to do with volumes.
    pub(crate) volumes: Option<Volumes>,
}

/// What is known of one share's source.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Place {
    /// Where it was declared to be, the last time it was.
    pub(crate) declared: PathBuf,
    /// Since when a look at it has been under way.
    pub(crate) looking_since: Option<Instant>,
    /// The last look at it.
    pub(crate) look: Option<Look>,
    /// Where it was found first.
    pub(crate) pinned: Option<PathBuf>,
}

impl Place {
    /// Where it is, if it is there.
    pub(crate) fn source(&self) -> Option<&Source> {
        self.look.as_ref()?.found.as_ref().ok()
    }
}

/// A look at a source.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Look {
    /// When.
    pub(crate) at: Instant,
    /// What was there.
    pub(crate) found: Result<Source, Finding>,
    /// Is that an empty directory and no mount point, as it is left by a file system that was unmounted?
    pub(crate) bare: bool,
    /// How much room there is.
    pub(crate) space: Option<Space>,
}

/// What was done about one endpoint so far.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Effort {
    /// Since when an action on it has been under way.
    pub(crate) busy_since: Option<Instant>,
    /// The directory on which a trial of it is under way.
    pub(crate) trying: Option<PathBuf>,
    /// The last attempt to have it served.
    pub(crate) attempt: Option<Attempt>,
    /// Since when it has no longer been wanted.
    pub(crate) unwanted_since: Option<Instant>,
    /// How many VMs an exclusive share had refused there, and when that number grew last.
    pub(crate) refused: Option<u64>,
    pub(crate) refused_at: Option<Instant>,
}

/// An attempt to have an endpoint served.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Attempt {
    /// When it ended.
    pub(crate) at: Instant,
    /// What was asked of the broker.
    pub(crate) endpoint: Endpoint,
    /// The source at that time.
    pub(crate) source: Source,
    /// How often in a row the same was asked before, without it having become all right.
    pub(crate) repeated: u32,
    /// What came of it.
    pub(crate) outcome: Outcome,
}

/// What came of an attempt.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Outcome {
    /// Served; what the trial found.
    Served(Box<Preflight>),
    /// Refused by the broker, with its reason.
    Refused(Finding),
    /// Not to be, as the broker is now; its words.
    Impossible(String),
    /// The broker could not be asked, or its answer not be understood.
    Failed(String),
}

impl Outcome {
    /// Served, and nothing to complain of?
    pub(crate) fn is_flawless(&self) -> bool {
        matches!(self, Outcome::Served(preflight) if preflight.findings.is_empty())
    }
}

/// An endpoint that somebody has asked for.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Asked {
    /// As it was last seen, or, for a volume, as far as it does not follow from its share.
    pub(crate) endpoint: Endpoint,
    /// Where it is known from.
    pub(crate) by: Asker,
}

/// Where an endpoint is known from that was asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Asker {
    /// The broker with this process id had it.
    Broker(u32),
    /// It is a volume.
    Volume,
}

/// An action that has ended.
#[derive(Debug)]
pub(crate) enum Done {
    /// A source was looked for.
    Looked {
        /// The share it is of.
        share: String,
        /// Where that was declared to be.
        declared: PathBuf,
        /// What was there.
        look: Look,
    },
    /// The broker was asked to serve an endpoint.
    Tried(Box<Attempt>),
    /// The broker was told to stop listening at an endpoint.
    Withdrawn {
        /// Its name.
        endpoint: String,
    },
}

impl Observed {
    /// Takes in what the broker says, or that it says nothing.
    pub(crate) fn hear(&mut self, now: Instant, status: Option<&Status>) {
        self.silent_since = status.is_none().then(|| self.silent_since.unwrap_or(now));
        self.endpoints =
            status.map(|status| status.endpoints.iter().map(|it| (it.endpoint.name.clone(), it.clone())).collect());
        if let Some(status) = status {
            self.note_asked(status);
            self.note_refused(now, status);
        }
    }

    /// How much room there is where shares are.
    pub(crate) fn spaces(&self) -> BTreeMap<String, Space> {
        let space = |(share, place): (&String, &Place)| Some((share.clone(), place.look.as_ref()?.space?));
        self.places.iter().filter_map(space).collect()
    }

    /// What was refused before this agent began is no news.
    fn note_refused(&mut self, now: Instant, status: &Status) {
        for it in &status.endpoints {
            let effort = self.efforts.entry(it.endpoint.name.clone()).or_default();
            if effort.refused.is_some_and(|before| it.rejected_exclusive > before) {
                effort.refused_at = Some(now);
            }
            effort.refused = Some(it.rejected_exclusive);
        }
    }

    /// Whoever wants an endpoint beside the declared ones asks the broker, which then is the one that knows. Another
    /// broker knows nothing of it: what its predecessor had is remembered, and what one and the same broker has no
    /// more was taken away.
    fn note_asked(&mut self, status: &Status) {
        let asked = |it: &&EndpointStatus| it.endpoint.kind == EndpointKind::Socket;
        let listening = status.endpoints.iter().filter(|it| it.listening).filter(asked);
        let by = Asker::Broker(status.pid);
        let mut now: BTreeMap<_, _> =
            listening.map(|it| (it.endpoint.name.clone(), Asked { endpoint: it.endpoint.clone(), by })).collect();
        self.asked.retain(|_, asked| asked.by != by);
        self.asked.append(&mut now);
    }

    /// Takes in which volumes there are.
    pub(crate) fn mount(&mut self, volumes: Option<Volumes>) {
        self.asked.retain(|_, asked| asked.by != Asker::Volume);
        let all = volumes.iter().flat_map(|volumes| &volumes.by_endpoint);
        self.asked.extend(
            all.map(|(name, volume)| (name.clone(), Asked { endpoint: volume.endpoint(name), by: Asker::Volume })),
        );
        self.volumes = volumes;
    }

    /// Keeps the memory in step with the declarations: what is gone is timed, what points elsewhere starts anew,
    /// what is of no use any more is forgotten.
    pub(crate) fn remember(&mut self, now: Instant, desired: &Desired) {
        for (name, share) in &desired.shares {
            self.declare(name, share.source.as_path());
        }
        self.places.retain(|name, place| desired.shares.contains_key(name) || place.looking_since.is_some());
        self.asked.retain(|name, _| share_of(name).is_some_and(|share| desired.shares.contains_key(share)));

        let wanted: Vec<_> = offers(desired, &self.asked).map(|offer| offer.name.to_owned()).collect();
        let served: Vec<_> = self.endpoints.iter().flat_map(BTreeMap::keys).cloned().collect();
        for name in served.iter().chain(&wanted) {
            self.efforts.entry(name.clone()).or_default();
        }
        for (name, effort) in &mut self.efforts {
            match wanted.contains(name) {
                true => effort.unwanted_since = None,
                false => _ = effort.unwanted_since.get_or_insert(now),
            }
        }
        let silent = self.endpoints.is_none();
        self.efforts.retain(|name, effort| {
            effort.unwanted_since.is_none() || effort.busy_since.is_some() || silent || served.contains(name)
        });
    }

    fn declare(&mut self, share: &str, source: &Path) {
        let place = self.places.entry(share.to_owned()).or_default();
        if place.declared == source {
            return;
        }
        *place = Place { declared: source.to_path_buf(), looking_since: place.looking_since, ..Place::default() };
        for (name, effort) in &mut self.efforts {
            if name == share || share_of(name) == Some(share) {
                effort.attempt = None;
            }
        }
    }

    /// Notes that an action has begun.
    pub(crate) fn begin(&mut self, now: Instant, action: &Action) {
        match action {
            Action::Look { share } => self.places.entry(share.clone()).or_default().looking_since = Some(now),
            Action::Apply { endpoint, .. } => {
                let effort = self.efforts.entry(endpoint.name.clone()).or_default();
                (effort.busy_since, effort.trying) = (Some(now), Some(tried(endpoint)));
            }
            Action::Withdraw { endpoint, .. } => {
                self.efforts.entry(endpoint.clone()).or_default().busy_since = Some(now)
            }
        }
    }

    /// Notes that an action has ended.
    pub(crate) fn finish(&mut self, done: Done) {
        match done {
            Done::Looked { share, declared, look } => {
                let place = self.places.entry(share).or_default();
                place.looking_since = None;
                if place.declared == declared {
                    if let (None, Ok(source)) = (&place.pinned, &look.found) {
                        place.pinned = Some(source.path.clone());
                    }
                    place.look = Some(look);
                }
            }
            Done::Tried(attempt) => {
                let effort = self.efforts.entry(attempt.endpoint.name.clone()).or_default();
                (effort.busy_since, effort.trying) = (None, None);
                effort.attempt = Some(*attempt);
            }
            Done::Withdrawn { endpoint } => self.efforts.entry(endpoint).or_default().busy_since = None,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::desired::tests::{declared, desired};
    use crate::plan::endpoint;
    use crate::plan::tests::{self, listening, site, source};

    fn wanted(path: &str) -> Desired {
        desired([declared("a", path)])
    }

    fn looked(at: Instant, path: &str) -> Done {
        let look = Look { at, found: Ok(source(path, 1)), bare: false, space: None };
        Done::Looked { share: "a".into(), declared: path.into(), look }
    }

    fn status(pid: u32, endpoints: Vec<Endpoint>) -> Status {
        tests::status(pid, endpoints.into_iter().map(listening).collect())
    }

    /// An endpoint of share `a` that somebody asked for.
    fn asked() -> Endpoint {
        let own = endpoint(&site().runtime_dir, &declared("a", "/srv/a"), &source("/srv/a", 2));
        Endpoint { name: "a.vm-7".into(), kind: EndpointKind::Socket, ..own }
    }

    #[test]
    fn another_source_starts_anew_and_a_late_look_at_the_old_one_is_ignored() {
        let now = Instant::now();
        let mut observed = Observed { endpoints: Some(BTreeMap::new()), ..Observed::default() };
        observed.remember(now, &wanted("/old"));
        observed.finish(looked(now, "/old"));
        assert_eq!(observed.places["a"].pinned, Some("/old".into()));

        observed.remember(now, &wanted("/new"));
        assert_eq!((&observed.places["a"].pinned, &observed.places["a"].look), (&None, &None));
        observed.finish(looked(now, "/old"));
        assert_eq!(observed.places["a"].look, None);
    }

    #[test]
    fn absence_is_timed_from_its_beginning_and_forgotten_with_the_endpoint() {
        let now = Instant::now();
        let mut observed = Observed::default();
        observed.remember(now, &wanted("/a"));
        observed.remember(now, &Desired::default());
        observed.remember(now + Duration::from_secs(1), &Desired::default());
        assert_eq!(observed.efforts["a"].unwanted_since, Some(now));
        observed.endpoints = Some(BTreeMap::new());
        observed.remember(now, &Desired::default());
        assert!(observed.efforts.is_empty() && observed.places.is_empty());
    }

    #[test]
    fn what_was_asked_of_a_broker_outlives_it_until_it_is_taken_away() {
        let now = Instant::now();
        let mut observed = Observed::default();
        let desired = wanted("/srv/a");
        let mut turn = |status: Option<Status>| {
            observed.hear(now, status.as_ref());
            observed.remember(now, &desired);
            observed.asked.keys().cloned().collect::<Vec<_>>()
        };
        assert_eq!(turn(Some(status(1, vec![asked()]))), ["a.vm-7"]);
        assert_eq!(turn(None), ["a.vm-7"], "no broker answers");
        assert_eq!(turn(Some(status(2, vec![]))), ["a.vm-7"], "another broker has not been told yet");
        assert_eq!(turn(Some(status(2, vec![asked()]))), ["a.vm-7"]);
        assert_eq!(turn(Some(status(2, vec![]))), [""; 0], "it was taken away");
    }

    #[test]
    fn what_was_asked_goes_with_its_share() {
        let now = Instant::now();
        let mut observed = Observed::default();
        observed.hear(now, Some(&status(1, vec![asked()])));
        observed.remember(now, &Desired::default());
        assert!(observed.asked.is_empty());
        assert_eq!(observed.efforts["a.vm-7"].unwanted_since, Some(now));
    }
}
