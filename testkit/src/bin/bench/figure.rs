//! A figure of the report, and what it is to reach.

use serde::Serialize;

/// One measured value.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(crate) struct Figure {
    pub(crate) name: String,
    pub(crate) value: f64,
    pub(crate) unit: &'static str,
    /// The same of the peer that it is compared with, if there is one.
    pub(crate) peer: Option<f64>,
    /// `value` to `peer`.
    pub(crate) ratio: Option<f64>,
    #[serde(skip)]
    pub(crate) aim: Option<Aim>,
}

/// What a figure is to reach.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Aim {
    /// So many times the peer's.
    Ratio(f64),
    /// No more than this.
    AtMost(f64),
}

impl Figure {
    /// A figure without a peer.
    pub(crate) fn alone(name: String, value: f64, unit: &'static str) -> Self {
        Self { name, value, unit, peer: None, ratio: None, aim: None }
    }

    /// With what it is compared with.
    pub(crate) fn beside(self, peer: Option<f64>) -> Self {
        Self { peer, ratio: peer.map(|peer| self.value / peer), ..self }
    }

    /// With what it is to reach.
    pub(crate) fn aiming(self, aim: Aim) -> Self {
        Self { aim: Some(aim), ..self }
    }

    /// What it is to reach and does not.
    pub(crate) fn falls_short(&self) -> Option<Aim> {
        self.aim.filter(|aim| match aim {
            Aim::Ratio(least) => self.ratio.is_none_or(|ratio| ratio < *least),
            Aim::AtMost(most) => self.value > *most,
        })
    }
}

impl std::fmt::Display for Aim {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Ratio(least) => write!(f, "at least {least} of the peer's"),
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
        assert_eq!(figure(9.0).falls_short(), None);
        assert_eq!(figure(9.0).aiming(Aim::AtMost(9.0)).falls_short(), None);
        assert!(figure(9.1).aiming(Aim::AtMost(9.0)).falls_short().is_some());
        assert_eq!(figure(9.0).beside(Some(9.0)).aiming(Aim::Ratio(1.0)).falls_short(), None);
        assert!(figure(9.0).beside(Some(10.0)).aiming(Aim::Ratio(1.0)).falls_short().is_some());
        assert!(figure(9.0).aiming(Aim::Ratio(1.0)).falls_short().is_some(), "no peer, no ratio");
    }
}
