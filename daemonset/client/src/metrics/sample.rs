//! Metric families, built at each scrape from numbers that are counted elsewhere.

use prometheus::proto::{Bucket, Counter, Gauge, Histogram, LabelPair, Metric, MetricFamily, MetricType};
use virtiofs_contract::counters::LATENCY_BOUNDS_NS;

const NANOSECONDS: f64 = 1e9;

/// Labels of one sample: names and values.
pub type Labels<'a> = &'a [(&'a str, &'a str)];

/// A family that is being filled.
pub struct Family(MetricFamily);

impl Family {
    /// A count that only grows; its name ends in `_total`.
    pub fn counter(name: &str, help: &str) -> Self {
        Self::new(name, help, MetricType::COUNTER)
    }

    /// A value that comes and goes.
    pub fn gauge(name: &str, help: &str) -> Self {
        Self::new(name, help, MetricType::GAUGE)
    }

    /// A distribution.
    pub fn histogram(name: &str, help: &str) -> Self {
        Self::new(name, help, MetricType::HISTOGRAM)
    }

    fn new(name: &str, help: &str, kind: MetricType) -> Self {
        let mut family = MetricFamily::default();
        family.set_name(name.to_owned());
        family.set_help(help.to_owned());
        family.set_field_type(kind);
        Family(family)
    }

    /// Adds a count.
    pub fn count(&mut self, labels: Labels<'_>, value: u64) {
        let mut counter = Counter::default();
        counter.set_value(value as f64);
        self.add(labels, |metric| metric.set_counter(counter));
    }

    /// Adds a value.
    pub fn value(&mut self, labels: Labels<'_>, value: f64) {
        let mut gauge = Gauge::default();
        gauge.set_value(value);
        self.add(labels, |metric| metric.set_gauge(gauge));
    }

    /// Adds a distribution of durations: how many by [`LATENCY_BOUNDS_NS`], and their sum in nanoseconds.
    pub fn durations(&mut self, labels: Labels<'_>, counts: &[u64], nanoseconds: u64) {
        let mut histogram = Histogram::default();
        let mut below = 0;
        let mut buckets = Vec::with_capacity(LATENCY_BOUNDS_NS.len());
        for (bound, count) in LATENCY_BOUNDS_NS.iter().zip(counts) {
            below += count;
            let mut bucket = Bucket::default();
            bucket.set_upper_bound(*bound as f64 / NANOSECONDS);
            bucket.set_cumulative_count(below);
            buckets.push(bucket);
        }
        histogram.set_bucket(buckets);
        histogram.set_sample_count(counts.iter().sum());
        histogram.set_sample_sum(nanoseconds as f64 / NANOSECONDS);
        self.add(labels, |metric| metric.set_histogram(histogram));
    }

    fn add(&mut self, labels: Labels<'_>, set: impl FnOnce(&mut Metric)) {
        let mut metric = Metric::default();
        metric.set_label(labels.iter().map(|(name, value)| label(name, value)).collect());
        set(&mut metric);
        self.0.mut_metric().push(metric);
    }

    /// The family, unless it has no samples: the text format knows no empty ones.
    pub fn finish(self) -> Option<MetricFamily> {
        (!self.0.get_metric().is_empty()).then_some(self.0)
    }
}

fn label(name: &str, value: &str) -> LabelPair {
    let mut label = LabelPair::default();
    label.set_name(name.to_owned());
    label.set_value(value.to_owned());
    label
}
