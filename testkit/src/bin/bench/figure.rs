//! A figure of the report, and its target.

use std::time::Duration;

use serde::Serialize;

/// A duration as figures show it.
pub(crate) fn millis(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e3
}

/// One measured value.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(crate) struct Figure {
    pub(crate) name: String,
    pub(crate) value: f64,
    pub(crate) unit: &'static str,
    /// The value of the peer, if there is one.
    pub(crate) peer: Option<f64>,
    /// `value` divided by `peer`.
    pub(crate) ratio: Option<f64>,
    #[serde(skip)]
    pub(crate) target: Option<Target>,
}

/// The target of a figure.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Target {
    /// At least this multiple of the peer's value.
    Ratio(f64),
    /// At most this multiple of the peer's value.
    RatioAtMost(f64),
    /// At most this value.
    AtMost(f64),
}

impl Figure {
    /// A figure without a peer.
    pub(crate) fn alone(name: String, value: f64, unit: &'static str) -> Self {
        Self { name, value, unit, peer: None, ratio: None, target: None }
    }

    /// Adds the peer's value.
    pub(crate) fn beside(self, peer: Option<f64>) -> Self {
        Self { peer, ratio: peer.map(|peer| self.value / peer), ..self }
    }

    /// Adds the target.
    pub(crate) fn with_target(self, target: Target) -> Self {
        Self { target: Some(target), ..self }
    }

    /// The target, if the figure misses it.
    pub(crate) fn missed_target(&self) -> Option<Target> {
        self.target.filter(|target| match target {
            Target::Ratio(least) => self.ratio.is_none_or(|ratio| ratio < *least),
            Target::RatioAtMost(most) => self.ratio.is_none_or(|ratio| ratio > *most),
            Target::AtMost(most) => self.value > *most,
        })
    }
}

impl std::fmt::Display for Target {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Ratio(least) => write!(f, "at least {least} times the peer"),
            Self::RatioAtMost(most) => write!(f, "at most {most} times the peer"),
            Self::AtMost(most) => write!(f, "at most {most}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_figure_is_compared_with_its_own_target() {
        let figure = |value| Figure::alone("x".into(), value, "ms");
        assert_eq!(figure(9.0).missed_target(), None);
        assert_eq!(figure(9.0).with_target(Target::AtMost(9.0)).missed_target(), None);
        assert!(figure(9.1).with_target(Target::AtMost(9.0)).missed_target().is_some());
        assert_eq!(figure(9.0).beside(Some(9.0)).with_target(Target::Ratio(1.0)).missed_target(), None);
        assert!(figure(9.0).beside(Some(10.0)).with_target(Target::Ratio(1.0)).missed_target().is_some());
        assert!(figure(9.0).with_target(Target::Ratio(1.0)).missed_target().is_some(), "no peer, no ratio");
        let limit = Target::RatioAtMost(1.5);
        assert_eq!(figure(15.0).beside(Some(10.0)).with_target(limit).missed_target(), None);
        assert!(figure(15.1).beside(Some(10.0)).with_target(limit).missed_target().is_some());
    }
}
