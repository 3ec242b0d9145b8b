//! Publishes the report as a file, for `virtiofsctl status`.

use std::path::PathBuf;

use tokio::sync::watch;
use virtiofs_client::published::Published;
use virtiofs_client::report::Report;

use crate::model::pass::Pass;

/// Publishes each report that differs from the one before. Ends with the reconcile loop.
pub(crate) async fn follow(mut passes: watch::Receiver<Pass>, path: PathBuf, shares_dir: Option<PathBuf>) {
    let mut known = Report::default();
    while passes.changed().await.is_ok() {
        let report = passes.borrow_and_update().report.clone();
        if report != known {
            let published = Published::new(shares_dir.clone(), report.clone());
            if let Err(error) = published.write(&path) {
                tracing::warn!(%error, path = %path.display(), "cannot publish the report");
            }
            known = report;
        }
    }
}
