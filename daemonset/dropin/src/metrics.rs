//! Metrics: the agent's families, over HTTP or in a file for the text file collector of node_exporter.

use std::fs;
use std::io;
use std::net::{SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use axum::Router;
use axum::http::header::CONTENT_TYPE;
use axum::routing::get;
use prometheus::proto::MetricFamily;
use prometheus::{TEXT_FORMAT, TextEncoder};
use virtiofs_client::metrics::families;
use virtiofs_client::report::{Report, ShareReport};
use virtiofs_client::totals::RunningTotals;
use virtiofs_contract::control::Status;

/// Time between two versions of the file.
const WRITE_EVERY: Duration = Duration::from_secs(5);

/// What is known of the session, for all who read it.
#[derive(Clone, Debug, Default)]
pub(crate) struct Observed(Arc<Mutex<Inner>>);

#[derive(Debug, Default)]
struct Inner {
    status: Option<Status>,
    totals: RunningTotals,
    share: Option<ShareReport>,
}

impl Observed {
    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes in the broker's status.
    pub(crate) fn update(&self, status: &Status, share: ShareReport) {
        let mut inner = self.inner();
        inner.totals.observe(status);
        (inner.status, inner.share) = (Some(status.clone()), Some(share));
    }

    /// The broker does not answer.
    pub(crate) fn forget(&self) {
        self.inner().status = None;
    }

    fn families(&self) -> Vec<MetricFamily> {
        let inner = self.inner();
        let report = Report {
            broker: inner.status.is_some(),
            shares: inner.share.iter().cloned().collect(),
            ..Report::default()
        };
        families(&report, inner.status.as_ref(), &inner.totals.all())
    }
}

fn text(families: &[MetricFamily]) -> String {
    TextEncoder::new().encode_to_string(families).unwrap_or_else(|error| format!("# {error}\n"))
}

/// Serves `/metrics`, in a thread.
///
/// # Errors
/// The address cannot be used.
pub(crate) fn serve(address: SocketAddr, observed: Observed) -> io::Result<()> {
    let listener = TcpListener::bind(address)?;
    listener.set_nonblocking(true)?;
    tracing::info!(address = %listener.local_addr()?, "metrics are served");
    let page = move || async move { ([(CONTENT_TYPE, TEXT_FORMAT)], text(&observed.families())) };
    let router = Router::new().route("/metrics", get(page));
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let serve = move || {
        runtime.block_on(async {
            match tokio::net::TcpListener::from_std(listener) {
                Ok(listener) => virtiofs_http::serve(listener, router, None).await,
                Err(error) => tracing::error!(%error, "metrics are not served"),
            }
        });
    };
    thread::Builder::new().name("metrics".into()).spawn(serve)?;
    Ok(())
}

/// A file of metrics. Dropped, it is removed.
#[derive(Debug)]
pub(crate) struct MetricsFile {
    path: PathBuf,
    written: Option<Instant>,
}

impl MetricsFile {
    /// The file of this session; nothing is written yet.
    pub(crate) fn new(directory: &Path, session: &str) -> Self {
        MetricsFile { path: directory.join(format!("virtiofsd-live-{session}.prom")), written: None }
    }

    /// Writes it, if it is due.
    pub(crate) fn update(&mut self, observed: &Observed) {
        if self.written.is_some_and(|at| at.elapsed() < WRITE_EVERY) {
            return;
        }
        self.written = Some(Instant::now());
        let families = distinct(observed.families());
        // The collector reads only *.prom, so it never sees half a file.
        let temporary = self.path.with_extension("prom.new");
        let written = fs::write(&temporary, text(&families)).and_then(|()| fs::rename(&temporary, &self.path));
        if let Err(error) = written {
            tracing::warn!(file = %self.path.display(), %error, "metrics not written");
        }
    }
}

impl Drop for MetricsFile {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.path);
    }
}

/// Without samples that files of other sessions contain with the same labels, which the collector rejects.
fn distinct(families: Vec<MetricFamily>) -> Vec<MetricFamily> {
    let of_share = |family: &MetricFamily| {
        let labels =
            |metric: &prometheus::proto::Metric| metric.get_label().iter().any(|label| label.name() == "share");
        !family.get_metric().is_empty() && family.get_metric().iter().all(labels)
    };
    families.into_iter().filter(of_share).collect()
}
