//! QEMU's monitor: commands to the VM that no guest can give.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};

/// Stopping a VM stops its devices first, and they wait for requests in progress.
const ANSWER: Duration = Duration::from_secs(30);

/// Has QEMU carry out one command (QMP; the socket serves one connection after the other).
pub(crate) fn execute(socket: &Path, command: &str, arguments: &Value) -> Result<()> {
    let stream = UnixStream::connect(socket).context("QEMU's monitor does not answer")?;
    stream.set_read_timeout(Some(ANSWER)).context("setting a time limit")?;
    let mut stream = BufReader::new(stream);
    let greeting = message(&mut stream)?;
    ensure!(greeting.get("QMP").is_some(), "QEMU's monitor began with {greeting}");
    ask(&mut stream, "qmp_capabilities", &json!({}))?;
    ask(&mut stream, command, arguments)
}

fn ask(stream: &mut BufReader<UnixStream>, command: &str, arguments: &Value) -> Result<()> {
    let request = format!("{}\n", json!({"execute": command, "arguments": arguments}));
    stream.get_mut().write_all(request.as_bytes()).with_context(|| format!("sending `{command}` to QEMU"))?;
    loop {
        let answer = message(stream).with_context(|| format!("waiting for `{command}`"))?;
        // Everything else is an event.
        if let Some(error) = answer.get("error") {
            bail!("QEMU refused `{command}`: {error}");
        }
        if answer.get("return").is_some() {
            return Ok(());
        }
    }
}

fn message(stream: &mut BufReader<UnixStream>) -> Result<Value> {
    let mut line = String::new();
    let length = stream.read_line(&mut line).context("reading from QEMU's monitor")?;
    ensure!(length > 0, "QEMU closed its monitor");
    serde_json::from_str(&line).with_context(|| format!("QEMU's monitor said '{}'", line.trim_end()))
}
