//! Options that protect the port of metrics.

use std::path::PathBuf;

use clap::Args;
use kube::Client;

use crate::authorization::Reviewer;
use crate::tls::{Certificate, CertificateError};

/// Who may read the metrics, and whether others on the network can read along.
#[derive(Args, Clone, Debug, Default)]
pub struct AccessArgs {
    /// Serve metrics over TLS with this certificate chain (PEM). Files are read again when they change.
    #[arg(long, value_name = "FILE", requires = "metrics_tls_key")]
    pub metrics_tls_cert: Option<PathBuf>,
    /// Private key of that certificate (PEM).
    #[arg(long, value_name = "FILE", requires = "metrics_tls_cert")]
    pub metrics_tls_key: Option<PathBuf>,
    /// Serve /metrics only to clients whose bearer token the API server authorizes to `get` this path.
    #[arg(long, requires = "metrics_tls_cert")]
    pub metrics_authorization: bool,
}

impl AccessArgs {
    /// The certificate, if metrics are served over TLS.
    ///
    /// # Errors
    /// A file cannot be read or is not what it should be.
    pub fn certificate(&self) -> Result<Option<Certificate>, CertificateError> {
        let files = self.metrics_tls_cert.clone().zip(self.metrics_tls_key.clone());
        files.map(|(chain, key)| Certificate::open(chain, key)).transpose()
    }

    /// The reviewer of clients, if they need a token.
    pub fn reviewer(&self, client: &Client) -> Option<Reviewer> {
        self.metrics_authorization.then(|| Reviewer::new(client.clone()))
    }
}
