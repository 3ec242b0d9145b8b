//! The control socket: handles the agent's requests in order, with a thread for each connection.

#[cfg(test)]
mod fuzz;

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::thread;
use std::time::Duration;

use virtiofs_contract::Versions;
use virtiofs_contract::channel::{ChannelError, FramedStream};
use virtiofs_contract::control::{Request, Response};

use crate::broker::{Broker, InvalidRequest};

/// Most connections at a time. The agent needs one, and each command that a person runs needs one.
const MAX_CONNECTIONS: usize = 32;

/// Pause if no connection can be accepted.
const ACCEPT_AGAIN: Duration = Duration::from_millis(100);

/// Handles requests until the process ends.
pub(crate) fn serve(listener: UnixListener, broker: Arc<Broker>) -> io::Result<()> {
    let connections = Arc::new(AtomicUsize::new(0));
    let accept = move || {
        for stream in listener.incoming() {
            match stream {
                Ok(stream) => take_in(stream, &broker, &connections),
                Err(error) => {
                    tracing::warn!(%error, "control connection not accepted");
                    thread::sleep(ACCEPT_AGAIN);
                }
            }
        }
    };
    thread::Builder::new().name("control".into()).spawn(accept)?;
    Ok(())
}

fn take_in(stream: UnixStream, broker: &Arc<Broker>, connections: &Arc<AtomicUsize>) {
    if connections.fetch_add(1, SeqCst) >= MAX_CONNECTIONS {
        connections.fetch_sub(1, SeqCst);
        tracing::warn!(limit = MAX_CONNECTIONS, "control connection refused");
        return;
    }
    let (broker, counted) = (broker.clone(), connections.clone());
    let converse = move || {
        if let Err(error) = converse(FramedStream::new(stream), &broker) {
            tracing::warn!(%error, "control connection");
        }
        counted.fetch_sub(1, SeqCst);
    };
    if let Err(error) = thread::Builder::new().name("control-peer".into()).spawn(converse) {
        connections.fetch_sub(1, SeqCst);
        tracing::warn!(%error, "no thread for a control connection");
    }
}

fn converse(mut peer: FramedStream, broker: &Broker) -> Result<(), ChannelError> {
    let mut greeted = false;
    loop {
        let (request, fds) = match peer.receive_with::<Request>() {
            Ok(received) => received,
            Err(ChannelError::Closed) => return Ok(()),
            Err(ChannelError::Malformed(error)) => {
                return peer.send(&Response::InvalidRequest { message: error.to_string() });
            }
            Err(error) => return Err(error),
        };
        let response = match request {
            Request::Hello { version, newest } => {
                let theirs = Versions::of_message(version, newest);
                let Some(version) = Versions::OURS.common(theirs) else { return peer.send(&other_version(theirs)) };
                greeted = true;
                Response::Welcome { version, pid: std::process::id() }
            }
            _ if !greeted => return peer.send(&not_greeted()),
            request => answer(broker, request, fds),
        };
        peer.send(&response)?;
    }
}

fn answer(broker: &Broker, request: Request, fds: Vec<OwnedFd>) -> Response {
    match request {
        Request::Apply { endpoint, reuse_preflight_of } => broker.apply(endpoint, reuse_preflight_of.as_deref(), fds),
        Request::Remove { name, force } => broker.remove(&name, force),
        Request::HandOver { name, session } => either(broker.hand_over(&name, session.as_deref())),
        Request::Close { name, session } => either(broker.close(&name, session.as_deref())),
        Request::Release { name, deadline_ms, force } => either(broker.release(&name, deadline_ms, force)),
        Request::Resume { name } => either(broker.resume(&name)),
        Request::Trace { session, duration_ms, rate } => either(broker.trace(&session, duration_ms, rate)),
        Request::ReadTrace { session, after } => either(broker.read_trace(&session, after)),
        Request::Put { key, value } => broker.put(key, value),
        Request::Get { key } => Response::Value { value: broker.store.get(&key) },
        Request::ListKeys { prefix } => Response::Keys { keys: broker.store.keys(&prefix) },
        Request::Preflight { source, sub_path, engine } => broker.preflight(source, sub_path, &engine),
        Request::Drain => broker.drain(),
        Request::Status { after } => Response::Status(Box::new(broker.status(after.as_ref()))),
        Request::Hello { .. } => not_greeted(),
    }
}

fn either(result: Result<Response, InvalidRequest>) -> Response {
    result.unwrap_or_else(|InvalidRequest(message)| Response::InvalidRequest { message })
}

fn other_version(theirs: Versions) -> Response {
    let message = format!(
        "{theirs} of the messages; this broker speaks {}; install programs of one release, or of two neighbouring ones",
        Versions::OURS
    );
    Response::InvalidRequest { message }
}

fn not_greeted() -> Response {
    Response::InvalidRequest { message: "the first request must be Hello".into() }
}
