//! Plans the events of a run and their times from the seed. Pure.

use std::collections::BTreeMap;
use std::fmt;
use std::ops::RangeInclusive;
use std::time::Duration;

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// A disruption. A broker and a keeper are never killed together.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, clap::ValueEnum)]
pub(crate) enum Event {
    /// SIGKILL of an engine.
    EngineKill,
    /// Hand-over of all sessions.
    HandOver,
    /// Another configuration for all sessions.
    Reconfiguration,
    /// SIGKILL of the broker.
    BrokerKill,
    /// SIGTERM of the broker.
    BrokerStop,
    /// SIGKILL of the broker during hand-overs.
    BrokerKillInHandOver,
    /// SIGKILL of the broker and of an engine.
    BrokerAndEngineKill,
    /// SIGKILL of the keeper.
    KeeperKill,
    /// SIGKILL of the keeper and of an engine.
    KeeperAndEngineKill,
}

impl fmt::Display for Event {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Event::EngineKill => "engine kills",
            Event::HandOver => "hand-overs",
            Event::Reconfiguration => "reconfigurations",
            Event::BrokerKill => "broker kills",
            Event::BrokerStop => "broker stops",
            Event::BrokerKillInHandOver => "broker kills in hand-overs",
            Event::BrokerAndEngineKill => "kills of broker and engine",
            Event::KeeperKill => "keeper kills",
            Event::KeeperAndEngineKill => "kills of keeper and engine",
        })
    }
}

/// One event of a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Step {
    /// Time since the previous event.
    pub(crate) pause: Duration,
    pub(crate) event: Event,
    /// Time between the two parts of an event that has two.
    pub(crate) between: Duration,
    /// Chooses an engine.
    pub(crate) choice: usize,
}

/// The first `count` events of a seed, of these kinds.
pub(crate) fn plan(seed: u64, count: usize, kinds: &[Event], pause: RangeInclusive<Duration>) -> Vec<Step> {
    let mut random = ChaCha8Rng::seed_from_u64(seed);
    let step = |_| Step {
        pause: random.random_range(pause.clone()),
        event: kinds[random.random_range(0..kinds.len())],
        between: random.random_range(Duration::ZERO..=Duration::from_millis(40)),
        choice: random.random_range(0..1 << 16),
    };
    (0..count).map(step).collect()
}

/// Number of events of each kind.
pub(crate) type Done = BTreeMap<Event, u64>;

#[cfg(test)]
mod tests {
    use clap::ValueEnum;

    use super::*;

    #[test]
    fn plan_follows_from_the_seed() {
        let pause = Duration::ZERO..=Duration::from_millis(60);
        let of = |seed, count| plan(seed, count, Event::value_variants(), pause.clone());
        let long = of(7, 500);
        assert_eq!(of(7, 100), long[..100]);
        assert_ne!(of(8, 100), long[..100]);
        for event in Event::value_variants() {
            assert!(long.iter().any(|step| step.event == *event), "{event}");
        }
    }
}
