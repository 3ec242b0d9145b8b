//! Metrics in Prometheus' text format.

mod families;
mod sample;
mod staleness;

pub use families::{families, page};
pub use sample::{Family, Labels};
