//! What to do with the engines of a restored session. Pure.

/// The owner of the rings when the broker ended, according to the journal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Rings {
    Nobody,
    /// The engine of this serial number, in a known state.
    Engine(u64),
    /// An engine was being changed, replaced or killed.
    Unknown,
}

/// An engine of which the holder had a descriptor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Found {
    pub(crate) serial: u64,
    pub(crate) condition: Condition,
}

/// What is known about a process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Condition {
    /// It runs, and all its descriptors are held.
    Running,
    /// It runs, and cannot be used: a descriptor is missing, or it has another version of the messages.
    Unusable,
    /// No thread of it runs user code any more.
    Ended,
    /// Unknown: its pidfd is missing. It never served; otherwise the journal would name it.
    Unknown,
}

/// What to do.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Verdict {
    /// This engine continues to serve.
    pub(crate) reattach: Option<u64>,
    /// Kill these, and wait until they can no longer access a ring, before another engine gets the rings.
    pub(crate) wait: Vec<u64>,
    /// End these. They have no rings.
    pub(crate) end: Vec<u64>,
    /// True if an engine had the rings and no longer has them.
    pub(crate) lost: bool,
}

/// The engine that the journal names may still run, and its state is unknown.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct OutOfReach(pub(crate) u64);

/// Decides what to do with each engine.
///
/// # Errors
/// If the session cannot be restored.
pub(crate) fn decide(rings: Rings, engines: &[Found]) -> Result<Verdict, OutOfReach> {
    let mut verdict = Verdict { lost: rings != Rings::Nobody, ..Verdict::default() };
    if let Rings::Engine(serial) = rings
        && !engines.iter().any(|found| found.serial == serial && found.condition != Condition::Unknown)
    {
        return Err(OutOfReach(serial));
    }
    for Found { serial, condition } in engines.iter().copied() {
        match (rings, condition) {
            (Rings::Engine(owner), Condition::Running) if owner == serial => {
                (verdict.reattach, verdict.lost) = (Some(serial), false);
            }
            (Rings::Engine(owner), _) if owner != serial => verdict.end.push(serial),
            (Rings::Nobody, _) | (_, Condition::Unknown) => verdict.end.push(serial),
            (_, Condition::Running | Condition::Unusable | Condition::Ended) => verdict.wait.push(serial),
        }
    }
    Ok(verdict)
}

#[cfg(test)]
mod tests {
    use super::*;
    use Condition::{Ended, Running, Unknown, Unusable};

    fn decided(rings: Rings, engines: &[(u64, Condition)]) -> Result<Verdict, OutOfReach> {
        let engines: Vec<Found> =
            engines.iter().map(|(serial, condition)| Found { serial: *serial, condition: *condition }).collect();
        decide(rings, &engines)
    }

    fn verdict(reattach: Option<u64>, wait: &[u64], end: &[u64], lost: bool) -> Result<Verdict, OutOfReach> {
        Ok(Verdict { reattach, wait: wait.into(), end: end.into(), lost })
    }

    #[test]
    fn each_engine_is_reattached_awaited_or_ended() {
        use Rings::{Engine, Nobody};
        for (rings, engines, expected) in [
            (Nobody, &[][..], verdict(None, &[], &[], false)),
            (Nobody, &[(1, Running), (2, Unknown)], verdict(None, &[], &[1, 2], false)),
            (Engine(1), &[(1, Running)], verdict(Some(1), &[], &[], false)),
            (Engine(1), &[(1, Running), (2, Running)], verdict(Some(1), &[], &[2], false)),
            (Engine(1), &[(1, Ended), (2, Running)], verdict(None, &[1], &[2], true)),
            (Engine(1), &[(1, Unusable)], verdict(None, &[1], &[], true)),
            (Engine(1), &[(2, Running)], Err(OutOfReach(1))),
            (Engine(1), &[(1, Unknown)], Err(OutOfReach(1))),
            (Rings::Unknown, &[(1, Running), (2, Running)], verdict(None, &[1, 2], &[], true)),
            (Rings::Unknown, &[(1, Ended), (2, Unusable)], verdict(None, &[1, 2], &[], true)),
            (Rings::Unknown, &[], verdict(None, &[], &[], true)),
        ] {
            assert_eq!(decided(rings, engines), expected, "{rings:?} {engines:?}");
        }
    }

    #[test]
    fn two_engines_never_have_the_rings() {
        let conditions = [Running, Unusable, Ended, Unknown];
        for rings in [Rings::Nobody, Rings::Engine(1), Rings::Engine(2), Rings::Unknown] {
            for first in conditions {
                for second in conditions {
                    let Ok(verdict) = decided(rings, &[(1, first), (2, second)]) else { continue };
                    // An engine that may have the rings either continues, or the broker waits for its end.
                    for (serial, condition) in [(1, first), (2, second)] {
                        let owner = rings == Rings::Engine(serial) || rings == Rings::Unknown;
                        if owner && condition != Unknown {
                            let handled = verdict.reattach == Some(serial) || verdict.wait.contains(&serial);
                            assert!(handled, "{rings:?} {first:?} {second:?}");
                        }
                    }
                    assert!(verdict.reattach.is_none() || verdict.wait.is_empty());
                }
            }
        }
    }
}
