//! All endpoints of this broker.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use thiserror::Error;
use virtiofs_contract::config::EngineConfig;
use virtiofs_contract::control::{Endpoint as Spec, Response, Status};
use virtiofs_contract::preflight::{Finding, Reason};

use crate::endpoint::Endpoint;
use crate::engine::finding;
use crate::engine::process::Population;
use crate::engine::start::Starter;
use crate::listen::ListenError;

/// How long sessions may take to end when they are asked to.
const END_DEADLINE: Duration = Duration::from_secs(5);

/// The broker's state.
#[derive(Debug)]
pub(crate) struct Broker {
    starter: Arc<Starter>,
    engines: Arc<Population>,
    endpoints: Mutex<BTreeMap<String, Arc<Endpoint>>>,
    /// Held while endpoints change, never while anything is tried or waited for.
    changing: Mutex<()>,
}

/// What is wrong with an endpoint that cannot be.
#[derive(Debug, Error, PartialEq, Eq)]
pub(crate) enum InvalidEndpoint {
    #[error("name {0:?}: 1 to 253 of a-z, 0-9, '.', '-' are expected")]
    Name(String),
    #[error("source {0}: an absolute path is expected")]
    Source(String),
    #[error("socket path {0}: an absolute path is expected")]
    Socket(String),
    #[error("socket mode {0:o}: permission bits up to 777 are expected")]
    Mode(u32),
    #[error("socket path {path} belongs to endpoint {owner}")]
    SocketOf { path: String, owner: String },
    #[error("endpoint {name} serves {source_now} to {sessions} sessions; its source cannot change under them")]
    SourceInUse { name: String, source_now: String, sessions: usize },
}

impl Broker {
    pub(crate) fn new(starter: Arc<Starter>, engines: Arc<Population>) -> Self {
        Broker { starter, engines, endpoints: Mutex::default(), changing: Mutex::default() }
    }

    fn endpoints(&self) -> MutexGuard<'_, BTreeMap<String, Arc<Endpoint>>> {
        let mut endpoints = self.endpoints.lock().unwrap_or_else(PoisonError::into_inner);
        endpoints.retain(|_, endpoint| !endpoint.is_over());
        endpoints
    }

    fn all(&self) -> Vec<Arc<Endpoint>> {
        self.endpoints().values().cloned().collect()
    }

    pub(crate) fn apply(&self, spec: Spec) -> Response {
        if let Err(invalid) = check(&spec) {
            return Response::Invalid { message: invalid.to_string() };
        }
        // The slow part, which may hang with the source, before anything is locked.
        let preflight = match self.starter.preflight(&spec.source, &spec.engine) {
            Ok(preflight) => preflight,
            Err(finding) => return Response::Refused { finding },
        };
        let _changing = self.changing.lock().unwrap_or_else(PoisonError::into_inner);
        let known = match self.known(&spec) {
            Ok(known) => known,
            Err(invalid) => return Response::Invalid { message: invalid.to_string() },
        };
        let name = spec.name.clone();
        let endpoint = known.unwrap_or_else(|| Endpoint::new(spec.clone(), preflight.clone(), self.starter.clone()));
        match endpoint.apply(spec, preflight.clone()) {
            Ok(()) => {
                self.endpoints().insert(name, endpoint);
                Response::Applied { preflight }
            }
            Err(error) => Response::Refused { finding: no_socket(&error) },
        }
    }

    /// The endpoint of this name, if the new one may take its place.
    fn known(&self, spec: &Spec) -> Result<Option<Arc<Endpoint>>, InvalidEndpoint> {
        for endpoint in self.all() {
            let other = endpoint.spec();
            let sessions = endpoint.sessions();
            if other.name == spec.name {
                if other.source != spec.source && sessions > 0 {
                    let source_now = other.source.display().to_string();
                    return Err(InvalidEndpoint::SourceInUse { name: other.name, source_now, sessions });
                }
            } else if other.socket.path == spec.socket.path && endpoint.is_listening() {
                let path = spec.socket.path.display().to_string();
                return Err(InvalidEndpoint::SocketOf { path, owner: other.name });
            }
        }
        Ok(self.endpoints().get(&spec.name).cloned())
    }

    pub(crate) fn preflight(&self, source: &Path, config: &EngineConfig) -> Response {
        if !source.is_absolute() {
            let message = InvalidEndpoint::Source(source.display().to_string()).to_string();
            return Response::Invalid { message };
        }
        match self.starter.preflight(source, config) {
            Ok(preflight) => Response::Tried { preflight },
            Err(finding) => Response::Refused { finding },
        }
    }

    pub(crate) fn remove(&self, name: &str, force: bool) -> Response {
        let changing = self.changing.lock().unwrap_or_else(PoisonError::into_inner);
        let endpoint = self.endpoints().get(name).cloned();
        if let Some(endpoint) = endpoint {
            endpoint.remove(force);
            drop(changing);
            if force && !endpoint.wait_until_empty(END_DEADLINE) {
                tracing::warn!(endpoint = name, "sessions are still ending");
            }
        }
        Response::Done
    }

    pub(crate) fn exchange(&self, name: &str) -> Response {
        let endpoint = self.endpoints().get(name).cloned();
        match endpoint {
            Some(endpoint) => {
                endpoint.exchange();
                Response::Done
            }
            None => Response::Invalid { message: format!("there is no endpoint {name}") },
        }
    }

    pub(crate) fn status(&self) -> Status {
        let endpoints = self.all().iter().map(|endpoint| endpoint.status()).collect();
        Status { pid: std::process::id(), endpoints }
    }

    /// Stops listening, ends all sessions, and waits until no engine is left.
    pub(crate) fn shut_down(&self) {
        let _changing = self.changing.lock().unwrap_or_else(PoisonError::into_inner);
        let endpoints = self.all();
        for endpoint in &endpoints {
            endpoint.remove(true);
        }
        for endpoint in &endpoints {
            endpoint.wait_until_empty(END_DEADLINE);
        }
        match self.engines.wait_until_gone(END_DEADLINE) {
            0 => {}
            left => tracing::warn!(engines = left, "engines are still ending: a hung source keeps them"),
        }
    }
}

fn check(spec: &Spec) -> Result<(), InvalidEndpoint> {
    let allowed = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '.' || c == '-';
    if spec.name.is_empty() || spec.name.len() > 253 || !spec.name.chars().all(allowed) {
        return Err(InvalidEndpoint::Name(spec.name.clone()));
    }
    if !spec.source.is_absolute() {
        return Err(InvalidEndpoint::Source(spec.source.display().to_string()));
    }
    if !spec.socket.path.is_absolute() {
        return Err(InvalidEndpoint::Socket(spec.socket.path.display().to_string()));
    }
    if spec.socket.mode & !0o777 != 0 {
        return Err(InvalidEndpoint::Mode(spec.socket.mode));
    }
    Ok(())
}

fn no_socket(error: &ListenError) -> Finding {
    let remedy = match error {
        ListenError::Foreign(_) => "move that file away, or choose another path for the socket",
        ListenError::Taken(_) => "end the process that listens there, or choose another path for the socket",
        ListenError::NotAPath(_) => "name a file in an existing directory",
        ListenError::Directory { .. } => "create the directory, and let the broker's user enter it",
        ListenError::Io { .. } => {
            "let the broker's user write in the directory; setting an owner needs CAP_CHOWN and CAP_FOWNER"
        }
    };
    finding(Reason::SocketUnavailable, error.to_string(), remedy)
}

#[cfg(test)]
mod tests {
    use virtiofs_contract::config::Access;
    use virtiofs_contract::control::SocketSpec;

    use super::*;

    fn spec() -> Spec {
        Spec {
            name: "share".into(),
            source: "/srv".into(),
            socket: SocketSpec { path: "/run/s.sock".into(), owner: None, group: None, mode: 0o660 },
            engine: EngineConfig::stock(Access::ReadOnly),
            exclusive: false,
        }
    }

    #[test]
    fn endpoints_that_cannot_be_are_refused_by_field() {
        assert_eq!(check(&spec()), Ok(()));
        let mut table = Vec::new();
        for name in ["", "Share", "a/b", "a b", &"x".repeat(254)] {
            table.push((Spec { name: name.into(), ..spec() }, InvalidEndpoint::Name(name.into())));
        }
        table.push((Spec { source: "srv".into(), ..spec() }, InvalidEndpoint::Source("srv".into())));
        let socket = |path: &str, mode| SocketSpec { path: path.into(), mode, ..spec().socket };
        table.push((Spec { socket: socket("s", 0o600), ..spec() }, InvalidEndpoint::Socket("s".into())));
        table.push((Spec { socket: socket("/s", 0o4755), ..spec() }, InvalidEndpoint::Mode(0o4755)));
        for (wrong, expected) in table {
            assert_eq!(check(&wrong), Err(expected));
        }
    }
}
