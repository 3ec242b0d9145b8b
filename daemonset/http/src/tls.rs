//! A certificate from files that can change while it is used, as those of a mounted Secret do.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::SystemTime;

use rustls::ServerConfig;
use rustls::crypto::ring::default_provider;
use rustls::pki_types::pem::{self, PemObject};
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio_rustls::TlsAcceptor;

/// Why a certificate cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum CertificateError {
    /// A file cannot be read.
    #[error("{}", path.display())]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// The error.
        source: io::Error,
    },
    /// A file is not PEM, or has no certificate or key in it.
    #[error("{}: not a certificate or private key in PEM format", path.display())]
    NotPem {
        /// The file.
        path: PathBuf,
        /// The error.
        source: pem::Error,
    },
    /// Certificate and key do not fit together, or are of a kind that is not supported.
    #[error("{}: cannot be used with {}", chain.display(), key.display())]
    Unusable {
        /// The file of the certificate.
        chain: PathBuf,
        /// The file of the key.
        key: PathBuf,
        /// The error.
        source: rustls::Error,
    },
}

/// When both files last changed.
type Stamp = [Option<SystemTime>; 2];

/// A certificate and its private key.
#[derive(Debug)]
pub struct Certificate {
    chain: PathBuf,
    key: PathBuf,
    loaded: Mutex<(Stamp, Arc<ServerConfig>)>,
}

impl Certificate {
    /// Reads both files.
    ///
    /// # Errors
    /// A file cannot be read or is not what it should be.
    pub fn open(chain: PathBuf, key: PathBuf) -> Result<Self, CertificateError> {
        let loaded = Mutex::new((stamp(&chain, &key), load(&chain, &key)?));
        Ok(Certificate { chain, key, loaded })
    }

    /// Accepts connections with the certificate that the files have now. If they are unusable, the last one is used on.
    pub fn acceptor(&self) -> TlsAcceptor {
        let mut loaded = self.loaded.lock().unwrap_or_else(PoisonError::into_inner);
        let now = stamp(&self.chain, &self.key);
        if loaded.0 != now {
            loaded.0 = now;
            match load(&self.chain, &self.key) {
                Ok(config) => loaded.1 = config,
                Err(error) => tracing::warn!(error = %with_cause(&error), "certificate not read; the last one stays"),
            }
        }
        TlsAcceptor::from(loaded.1.clone())
    }
}

fn with_cause(error: &CertificateError) -> String {
    let cause = std::error::Error::source(error).map(|cause| format!(": {cause}"));
    format!("{error}{}", cause.unwrap_or_default())
}

fn stamp(chain: &Path, key: &Path) -> Stamp {
    [chain, key].map(|file| file.metadata().and_then(|it| it.modified()).ok())
}

fn load(chain: &Path, key: &Path) -> Result<Arc<ServerConfig>, CertificateError> {
    let not_pem = |path: &Path| {
        let path = path.to_owned();
        |source| CertificateError::NotPem { path, source }
    };
    let certificates: Vec<_> =
        CertificateDer::pem_slice_iter(&read(chain)?).collect::<Result<_, _>>().map_err(not_pem(chain))?;
    let private = PrivateKeyDer::from_pem_slice(&read(key)?).map_err(not_pem(key))?;
    let unusable = |source| CertificateError::Unusable { chain: chain.to_owned(), key: key.to_owned(), source };
    let config = ServerConfig::builder_with_provider(Arc::new(default_provider()))
        .with_safe_default_protocol_versions()
        .and_then(|builder| builder.with_no_client_auth().with_single_cert(certificates, private));
    config.map(Arc::new).map_err(unusable)
}

fn read(path: &Path) -> Result<Vec<u8>, CertificateError> {
    std::fs::read(path).map_err(|source| CertificateError::Unreadable { path: path.to_owned(), source })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_unusable_file_is_named() {
        let dir = tempfile::tempdir().expect("a directory");
        let [chain, key] = ["tls.crt", "tls.key"].map(|name| dir.path().join(name));
        let error = || with_cause(&Certificate::open(chain.clone(), key.clone()).expect_err("no certificate"));
        assert!(error().contains("tls.crt: No such file"), "{}", error());
        std::fs::write(&chain, "").expect("a file");
        std::fs::write(&key, "no key").expect("a file");
        assert!(error().contains("tls.key: not a certificate or private key in PEM format"), "{}", error());
    }
}
